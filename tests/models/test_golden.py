"""Against transformers' numbers in golden files, without PyTorch; see make_golden.py for how they are made."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.cases import CASES, MAX_TOKENS, OPTIONS, make_batch, mean_log_probs, to_labels, to_settings

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.models import Stacking, Vlm, load_vlm
from fedvlm_jax.models.florence2 import build

GOLDEN = Path(__file__).parent / "golden"
FASTEST = "single"
"""The model that compiles fastest: all options of generation are tried on it, two on each of the others."""
SLOW = "odd"
"""Whose tokens are a slow test: its logits are compared every time."""
TOKENS = [
    pytest.param(case, name, marks=pytest.mark.slow if case == SLOW else pytest.mark.broad)
    for case in CASES
    for name in (OPTIONS if case == FASTEST else ("greedy_ends", "beams_early"))
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Vlm, Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    vlm, params = load_vlm(GOLDEN / request.param)
    batch = make_batch(request.param, vlm.image_tokens(*CASES[request.param][2]))
    features = jax.jit(lambda params, pixels: vlm.image_features(params, None, pixels))(params, batch["pixel_values"])
    with np.load(GOLDEN / request.param / "answers.npz") as answers:
        return vlm, params, batch | {"image_features": features}, dict(answers)


def test_features_logits_and_loss_are_those_of_transformers(case: Any) -> None:
    vlm, params, batch, answers = case
    np.testing.assert_allclose(batch["image_features"], answers["features"], atol=2e-5)
    logits = jax.jit(lambda params, batch: vlm.logits(params, None, batch))(params, batch)
    np.testing.assert_allclose(logits, answers["logits"], atol=1e-4)
    counted = batch["labels"] != -100
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.maximum(batch["labels"], 0)[..., None], -1)
    assert -chosen[..., 0][counted].mean() == pytest.approx(answers["loss"].item(), abs=1e-5)


@pytest.mark.parametrize(("case", "name"), TOKENS, indirect=["case"])
def test_tokens_are_those_of_transformers(case: Any, name: str) -> None:
    vlm, params, batch, answers = case
    tokens = vlm.generate(params, None, batch, MAX_TOKENS, **to_settings(OPTIONS[name]))
    np.testing.assert_array_equal(tokens, answers[f"tokens/{name}"])


@pytest.mark.broad
@pytest.mark.parametrize("case", [FASTEST], indirect=True)
def test_scores_of_beams_are_those_of_transformers(case: Any) -> None:
    """Where no token is forced, which costs nothing; tokens are compared above."""
    vlm, params, batch, answers = case
    find = jax.jit(lambda params, batch: vlm.logits(params, None, batch))
    names = [name for name in OPTIONS if f"scores/{name}" in answers and "forced_eos_token_id" not in OPTIONS[name]]
    assert len(names) == 4
    for name in names:
        tokens, options = answers[f"tokens/{name}"], OPTIONS[name]
        labels = to_labels(tokens, options.get("eos_token_id", vlm.settings().eos_token_ids))
        found = mean_log_probs(find(params, {**batch, "labels": labels}), labels)
        lengths = (labels != IGNORED).sum(1) ** (options.get("length_penalty", 1.0) - 1)
        np.testing.assert_allclose(found, answers[f"scores/{name}"] * lengths, rtol=0, atol=1e-5, err_msg=name)


def test_golden_answers_are_not_degenerate() -> None:
    for name in CASES:
        with np.load(GOLDEN / name / "answers.npz") as answers:
            tokens = np.stack([answers[f"tokens/{option}"] for option in OPTIONS])
        assert len(np.unique(tokens)) > 10
        assert (tokens[:, 0] != tokens[:, 2]).any(axis=1).all(), "answers must depend on the picture"


def test_bfloat16_compute_stays_close() -> None:
    vlm, params = load_vlm(GOLDEN / "windows", dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    batch = make_batch("windows", vlm.image_tokens(*CASES["windows"][2]))
    logits = jax.jit(lambda params, batch: vlm.logits(params, None, batch))(params, batch)
    assert logits.dtype == jnp.float32
    with np.load(GOLDEN / "windows" / "answers.npz") as answers:
        correlation = np.corrcoef(np.ravel(logits), answers["logits"].ravel())[0, 1]
    assert correlation > 0.99  # measured: 0.998


@pytest.mark.parametrize(
    "stacking",
    [
        pytest.param(Stacking(True, 1), marks=pytest.mark.broad),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (Stacking(True, 2), Stacking(False, 1))),
    ],
    ids=str,
)
def test_how_layers_are_stacked_changes_the_program_and_no_gradient(stacking: Stacking) -> None:
    vlm, params = load_vlm(GOLDEN / "windows", stacking=Stacking(unroll=2))
    other = build(vlm.config, stacking=stacking)
    config = vlm.config.text_config
    assert (config.encoder_layers, config.decoder_layers) == (2, 2)
    tokens = vlm.image_tokens(*CASES["windows"][2])
    batch = make_batch("windows", tokens) | {"image_features": np.ones((3, tokens, config.d_model), np.float32)}

    def gradient(v: Vlm) -> Any:
        return jax.grad(lambda text: jax.nn.logsumexp(v.logits(params | {"language_model": text}, None, batch)))

    text = params["language_model"]
    plain, again = jax.jit(gradient(vlm))(text), jax.jit(gradient(other))(text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), plain, again)
    kept = build(vlm.config, stacking=stacking._replace(remat=False))
    one, two, without = (str(jax.make_jaxpr(gradient(v))(text)) for v in (vlm, other, kept))
    written_out = [bool(re.search(r"unroll=2\b", program)) for program in (one, two)]
    assert written_out == [True, stacking.unroll >= 2]
    # Attention's products have some of their own in any case.
    those, anyway = (Counter(re.findall(r"prevent_cse=(\w+)", program)) for program in (two, without))
    assert set(those - anyway) == ({str(stacking.unroll >= 2)} if stacking.remat else set())
