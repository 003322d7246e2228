"""The round hands keys out: to each client in each round, to the server in each round, and no two are one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import make_cohort, make_method, run_round, start_states

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.round import make_round


@pytest.fixture(scope="module")
def draw():
    """(round, run's key) -> a number that the server drew, numbers that its two clients drew."""
    _, params, trainer, method, adapter = make_method("plora")

    def client_update(ctx, server, personal, client, key):
        state, message, metrics = method.client_update(ctx, server=server, personal=personal, client=client, key=key)
        return state, message, metrics | {"noise": jax.random.normal(key)}

    def aggregate(ctx, server, messages, weights):
        server, health = method.aggregate(ctx, server=server, messages=messages, weights=weights)
        return server, health | {"noise": jax.random.normal(ctx.key)}

    run = make_round(replace(method, client_update=client_update, aggregate=aggregate), trainer, make_mesh(1))
    server = method.init(adapter=adapter)
    states = start_states(method, server, 2)

    def draw(round_, key):
        out, _ = run_round(run, params, server, make_cohort(2), [0.5, 0.5], states, round_=round_, key=key)
        return [float(out.health["noise"]), *np.asarray(out.metrics["noise"]).tolist()]

    return draw


def test_server_and_clients_draw_apart_in_every_round(draw):
    drawn = [*draw(1, 3), *draw(2, 3), *draw(1, 4)]
    assert len(set(drawn)) == len(drawn)


def test_a_round_that_is_run_again_draws_the_same(draw):
    assert draw(1, 3) == draw(1, 3)


def test_the_server_s_key_is_of_a_stream_of_its_own(draw):
    """The fifth of the enum: what a method draws there is settled by the seed and the round."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 4), jnp.int32(2))
    assert draw(2, 3)[0] == pytest.approx(float(jax.random.normal(key)), rel=1e-6)


def test_aggregate_knows_whose_messages_it_has():
    """Two waves of two, of clients 5, 0 and 3, who drops out, and a padded place that repeats 3: rows by number."""
    _, params, trainer, method, adapter = make_method("fedavg-lora")

    def aggregate(ctx, server, messages, weights):
        server, health = method.aggregate(ctx, server=server, messages=messages, weights=weights)
        rows = jnp.where(weights > 0, ctx.numbers, 6)
        sent = messages["encoder"]["fc1"]["b"].sum(axis=(1, 2))
        return server, health | {"table": jnp.zeros(6).at[rows].set(sent, mode="drop"), "sent": sent}

    run = make_round(replace(method, aggregate=aggregate), trainer, make_mesh(1))
    server = method.init(adapter=adapter)
    cohort = make_cohort(4)._replace(number=np.asarray([5, 0, 3, 3], np.int32))
    out, _ = run_round(run, params, server, cohort, [0.5, 0.5, 0, 0], start_states(method, server, 4), waves=2)
    table, sent = np.asarray(out.health["table"]), np.asarray(out.health["sent"])
    assert sent[0] != sent[1]
    np.testing.assert_array_equal(table, [sent[1], 0, 0, 0, 0, sent[0]])
