"""Dropout in local training: drawn per client, round, training and step, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import RATES, SPEC, make_cohort, make_toy, run_round, start_states

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.methods import Setup, load_method
from fedvlm_jax.objectives import load_objective

CLIENTS = 3


def start(name, dropout):
    """-> run(cohort, **options) of a method's round on the toy, and the text of what it computes."""
    vlm, params = make_toy()
    trainer = make_local_trainer(vlm, load_objective("sft"), dropout=dropout)
    setup = Setup(
        sites=vlm.sites, spec=SPEC, start_optimizer=trainer.start,
        population=CLIENTS, cohort=CLIENTS, places=CLIENTS, rounds=4, local_steps=3,
    )  # fmt: skip
    method = load_method(name, setup)
    server = method.init(adapter=lora.init(jax.random.key(9), vlm.sites, SPEC))
    round_, states = make_round(method, trainer, make_mesh(1)), start_states(method, server, CLIENTS)

    def run(cohort, **options):
        return run_round(round_, params, server, cohort, np.full(CLIENTS, 1 / CLIENTS), states, **options)

    def text():
        batch = (params, server, jax.tree.map(lambda x: x[None], states), jax.tree.map(lambda x: x[None], cohort()))
        return str(round_.trace(*batch, jnp.ones(CLIENTS), RATES, jnp.int32(1), jax.random.key(0)).jaxpr)

    return run, text


def cohort():
    """Three clients with the same data, who see the same examples in every step."""
    one = make_cohort(1)
    one = one._replace(indices=np.repeat(one.indices[:, :1], 3, axis=1))
    same = jax.tree.map(lambda x: np.repeat(x, CLIENTS, axis=0), one)
    return same._replace(number=np.arange(CLIENTS, dtype=np.int32))


def test_without_dropout_nothing_is_drawn():
    """The program is the one that there is without the option, to the letter."""
    texts = [start("local", dropout)[1]() for dropout in (0.0, 0.5)]
    assert ["random_bits" in text for text in texts] == [False, True]
    assert "dropout" not in texts[0]


@pytest.mark.broad
@pytest.mark.parametrize("name", ["fedavg-lora", "apfl", "pfedme"])
def test_clients_and_rounds_draw_for_themselves(name):
    """The same data train alike without dropout, and each in its own way with it; the seed decides how."""
    plain, dropping = start(name, 0.0)[0], start(name, 0.5)[0]
    losses = np.asarray(plain(cohort())[0].metrics["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    one = np.asarray(dropping(cohort())[0].metrics["loss"])
    assert len(set(one.tolist())) == CLIENTS
    np.testing.assert_array_equal(np.asarray(dropping(cohort())[0].metrics["loss"]), one)
    for other in (dropping(cohort(), round_=2), dropping(cohort(), key=4)):
        assert (np.asarray(other[0].metrics["loss"]) != one).all()


@pytest.mark.broad
def test_a_step_s_mask_depends_on_its_number_alone():
    """Three steps at once and one by one, on one batch and at rates of 0: the same three losses, all different."""
    vlm, params = make_toy()
    trainer = make_local_trainer(vlm, load_objective("sft"), dropout=0.5)
    adapter = lora.init(jax.random.key(9), vlm.sites, SPEC)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * (leaf.ndim == 2), adapter)
    client = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), cohort())
    one = client._replace(indices=client.indices[:1], mask=client.mask[:1])
    still = {"a": jnp.float32(0), "b": jnp.float32(0)}

    def losses(client, **choices):
        options = {"key": jax.random.key(2), **choices}
        return float(trainer.run(params, adapter, trainer.start(adapter), client, still, **options)[2]["loss"])

    singly = [losses(one, first=jnp.int32(number)) for number in range(3)]
    assert len(set(singly)) == 3
    assert losses(client) == pytest.approx(np.mean(singly), rel=1e-6)
    assert losses(one) == singly[0]
    assert losses(one, key=jax.random.key(3)) != singly[0]
