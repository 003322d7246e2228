"""The noise's size before a run: against drawn noise, and against what was measured once on the shipped model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax import lora
from fedvlm_jax.analysis.explain import explain
from fedvlm_jax.analysis.noise_size import expect_products
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.reporting.noise_report import tabulate_noise

EVERYBODY = PrivacyOptions(noise=1.0, clip=1.4, sampling="all")


def test_expected_norms_are_those_of_drawn_noise():
    """Of stacked layers and of plain ones, the root of the mean square over 400 draws."""
    rng = np.random.default_rng(0)
    shapes = {"deep": (3, 20, 16), "wide": (12, 40)}
    adapter = {
        name: {
            "a": jnp.asarray(rng.normal(size=(*stack, d_in, 4))), "b": jnp.asarray(rng.normal(size=(*stack, 4, d_out))),
            "scale": jnp.asarray(rng.uniform(1, 2, stack)),
        }
        for name, (*stack, d_in, d_out) in shapes.items()
    }  # fmt: skip
    for site in adapter.values():  # each layer's B is as large as the others', as it is taken to be
        site["b"] *= np.sqrt(4 * site["b"].shape[-1]) / jnp.linalg.norm(site["b"], axis=(-2, -1), keepdims=True)
    sigma = 0.3
    b_norm = float(np.sqrt(sum(np.sum(np.square(site["b"])) for site in adapter.values())))
    squares = []
    for _ in range(400):
        found = np.zeros(3)
        for _, (a, b, scale) in lora.sites_of(adapter):
            in_a, in_b = (sigma * rng.normal(size=factor.shape) for factor in (a, b))
            terms = (a @ in_b, in_a @ b, in_a @ in_b)
            found += [np.sum(np.square(np.asarray(scale)[..., None, None] * term)) for term in terms]
        squares.append(found)
    wanted = np.sqrt(np.mean(squares, axis=0))
    got = dataclasses.astuple(expect_products(adapter, sigma, b_norm))
    np.testing.assert_allclose(got, wanted, rtol=0.03)


@pytest.fixture(scope="module")
def explained():
    return explain(Run(method="plora", privacy=EVERYBODY), population=16)


def test_the_shipped_model_has_the_noise_that_was_measured_once(explained):
    """DP noise in a finished nano run, C = 1.4 and z = 1, as a prototype found it: ‖s A B‖ = 2.32, ‖B‖ = 0.67.

    In B 18.6, 1.16, 0.29 for 16, 256, 1,024 clients a round; relative to s A B 26, 1.64, 0.41 where B is shared; 0.67,
    0.042, 0.011 where A is; 32, 1.63, 0.41 where both are.
    """
    at = {round(noise.expected): noise for noise in explained.noise.at}
    assert explained.noise.entries == 45_056
    for clients, message, b, a, both in (
        (16, 18.6, 26, 0.67, 32), (256, 1.16, 1.64, 0.042, 1.63), (1024, 0.29, 0.41, 0.011, 0.41),
    ):  # fmt: skip
        noise = at[clients]
        assert noise.message == pytest.approx(message, rel=0.01)
        assert noise.b / 2.32 == pytest.approx(b, rel=0.05)
        assert noise.a * (0.67 / 1.4) / 2.32 == pytest.approx(a, rel=0.09), "0.011 has two digits"
        assert noise.both / 2.32 == pytest.approx(both, rel=0.05)
        assert noise.method == pytest.approx(noise.b, rel=0.02), "plora shares B"


@pytest.mark.slow
def test_what_is_said_to_reduce_the_noise_does():
    def at_once(method, **changes):
        noise = explain(Run(method=method, privacy=EVERYBODY, **changes), population=16).noise
        return noise.at[0]

    plora, sb = (at_once(method) for method in ("plora", "fed-sb"))
    fewer = at_once("plora", lora=dataclasses.replace(Run().lora, rank=2))
    assert sb.message < plora.message / 3
    assert sb.method < plora.method / 3
    assert fewer.message == pytest.approx(plora.message / 2, rel=1e-3)


def test_the_table_tells_it_and_what_lowers_it(explained):
    table = tabulate_noise("plora", explained.noise)
    assert table.rows[0] == ("16", "18.6", "13.3", *table.rows[0][3:])
    for word in (
        "fed-sb",
        "fedsvd",
        "lower rank",
        "fewer sites",
        "More clients",
        "45,056",
        "16 a round on average",
        "Noise: its",
        "Over the clip: ",
    ):
        assert word in table.note


def test_of_a_soft_prompt_alone_the_noise_in_the_message_is_told():
    run = Run(method="promptfl", model="clip-nano", privacy=EVERYBODY)
    noise = explain(run, population=16).noise
    assert noise.at[0].message == pytest.approx(1.4 * np.sqrt(4 * 128) / 16, rel=1e-3)
    table = tabulate_noise("promptfl", noise)
    assert table.columns == ("clients", "noise", "over the clip")
    assert table.rows[0] == ("16", "1.98", "1.41")
    assert "A·B" not in table.note


@pytest.mark.slow
def test_correlated_noise_is_larger_in_a_round_and_smaller_in_the_sum():
    options = dataclasses.replace(EVERYBODY, sampling="poisson", clip=1.0)
    banded = dataclasses.replace(options, mechanism="banded")
    run = Run(method="fed-sb", cohort=4, privacy=options, train=dataclasses.replace(Run().train, rounds=64))
    new, correlated = (
        explain(dataclasses.replace(run, privacy=each), population=64).noise for each in (options, banded)
    )
    assert new.whole == pytest.approx(8 * new.at[0].message)
    assert correlated.at[0].message > 1.2 * new.at[0].message
    assert correlated.whole < 0.7 * new.whole


def test_without_privacy_there_is_none():
    assert explain(Run(method="fed-sb"), population=4).noise is None
    with pytest.raises(UserError, match="flora"):
        validate(Run(method="flora", privacy=EVERYBODY))
