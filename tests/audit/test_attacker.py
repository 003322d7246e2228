"""Attacks on a toy client's message: members are found where they must be, and not where the message has none."""

import jax
import numpy as np
import pytest
import toy

from fedvlm_jax.audit.attacker import OTHERS, OWN, START, Attacker, list_known
from fedvlm_jax.audit.detection import find_auroc
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils import tree

MEMBERS, ROWS = 8, 160


def make_world(name, **choices):
    """A client that trains on the first rows of many: -> attacker, server, its message, rows of noise."""
    vlm, params, trainer, method, adapter = toy.make_method(name, population=1, cohort=1, places=1, **choices)
    data = jax.tree.map(lambda leaf: leaf[0], toy.make_cohort(1, rows=ROWS, seed=3).examples)
    cohort = toy.make_cohort(1, rows=MEMBERS, steps=6, batch=MEMBERS)._replace(
        examples={key: values[None, :MEMBERS] for key, values in data.items()},
        indices=np.broadcast_to(np.arange(MEMBERS, dtype=np.int32), (1, 6, MEMBERS)),
        weight=np.ones(1, np.float32),
    )
    server = method.init(adapter=adapter)
    run = make_round(method, trainer, make_mesh(1))
    out, _ = toy.run_round(run, params, server, cohort, [1.0], toy.start_states(method, server, 1))
    message = jax.tree.map(lambda leaf: np.asarray(leaf[0]), out.messages)

    def inputs(rows):
        return {key: values[rows] for key, values in data.items()}

    return Attacker(vlm, load_objective("sft"), params, method, inputs, 20), server, message


@pytest.mark.parametrize("name", ["plora", "ffa-lora", "fedavg-lora"])
def test_members_are_found(name):
    attacker, server, message = make_world(name)
    found = attacker.probe(np.arange(ROWS), server, message, None)
    for scores in (found.before - found.after, found.aligned):
        assert find_auroc(scores[:MEMBERS], scores[MEMBERS:]).low > 0.7


@pytest.mark.parametrize("name", ["plora", "fedavg-lora"])
def test_a_message_that_holds_none_tells_nothing(name):
    """Rows that it was not made of, in two halves."""
    attacker, server, message = make_world(name)
    found = attacker.probe(np.arange(MEMBERS, ROWS), server, message, None)
    half = (ROWS - MEMBERS) // 2
    for scores in (found.before - found.after, found.aligned):
        area = find_auroc(scores[:half], scores[half:])
        assert area.low < 0.5 < area.high


def test_a_shared_a_tells_nothing_to_who_takes_b_for_zero():
    attacker, server, message = make_world("fedsa-lora")
    found = attacker.probe(np.arange(ROWS), server, message, None)
    np.testing.assert_array_equal(found.aligned, 0)
    np.testing.assert_array_equal(found.before, found.after)
    assert any(leaf.any() for leaf in jax.tree.leaves(message))


def test_scores_by_hand():
    """Losses with and without the message, and the cosine of two vectors, worked out of the model itself."""
    attacker, server, message = make_world("plora")
    found = attacker.probe(np.asarray([3]), server, message, None)
    loss = load_objective("sft").loss
    one = attacker.inputs(np.asarray([3]))

    def lose(shared):
        adapter = tree.unflatten(tree.flatten(server["start"]) | tree.flatten(shared))
        return loss(attacker.vlm, attacker.params, adapter, one)[0]

    after = jax.tree.map(lambda x, y: x + y, server["shared"], message)
    gradient = np.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(lose)(server["shared"]))])
    sent = np.concatenate([x.ravel() for x in jax.tree.leaves(message)])
    assert found.before == pytest.approx([float(lose(server["shared"]))], rel=1e-5)
    assert found.after == pytest.approx([float(lose(after))], rel=1e-5)
    cosine = -gradient @ sent / np.linalg.norm(gradient) / np.linalg.norm(sent)
    assert found.aligned == pytest.approx([cosine], rel=1e-4)


def test_the_base_is_scored_as_it_is():
    attacker, server, message = make_world("plora")
    zero = attacker.probe(np.arange(5), server, jax.tree.map(np.zeros_like, message), None)
    np.testing.assert_allclose(attacker.score_base(np.arange(5)), zero.before, rtol=1e-5)  # B is 0 in the first round


def adapters_of(name, count=3):
    _, _, _, method, adapter = toy.make_method(name, population=count)
    flat = tree.flatten(adapter)
    server = method.init(adapter=adapter)
    made = {
        number: tree.unflatten({path: np.asarray(leaf) + number for path, leaf in flat.items()})
        for number in range(count)
    }
    return method, method.download(server=server), made


def test_what_is_known_of_a_private_factor():
    method, shared, adapters = adapters_of("plora")
    known = list_known(method, shared, adapters, 0)
    assert list(known) == [START, OTHERS, OWN]
    assert known[START] is None
    a = adapters[0]["encoder"]["fc1"]["a"]
    np.testing.assert_allclose(known[OWN]["encoder"]["fc1"]["a"], a)
    np.testing.assert_allclose(known[OTHERS]["encoder"]["fc1"]["a"], a + 1.5, rtol=1e-6)
    assert "b" not in known[OWN]["encoder"]["fc1"]


def test_where_nothing_is_private_there_is_nothing_to_guess():
    method, shared, adapters = adapters_of("fedavg-lora")
    same = dict.fromkeys(adapters, adapters[0])  # the scale is private, and the same for all
    assert list(list_known(method, shared, same, 0)) == [START]
    method, shared, adapters = adapters_of("ffa-lora")
    assert list(list_known(method, shared, dict.fromkeys(adapters, adapters[0]), 1)) == [START]


def test_with_the_clients_own_factor_members_of_a_shared_a_are_found():
    """What the message alone does not tell, B does."""
    attacker, server, message = make_world("fedsa-lora")
    rng = np.random.default_rng(0)
    private = jax.tree.map(lambda leaf: np.asarray(leaf), server["start"])
    private = tree.unflatten(
        {
            path: rng.normal(size=leaf.shape).astype(np.float32) if path.endswith("/b") else leaf
            for path, leaf in tree.flatten(private).items()
        }
    )
    found = attacker.probe(np.arange(ROWS), server, message, private)
    assert np.abs(found.aligned).max() > 0
    assert not np.array_equal(found.before, found.after)
