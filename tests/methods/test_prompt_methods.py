"""What prompt methods do beside their papers' rounds: whose experts a client gets, and mistakes of public code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompted_toy import VECTORS, make_pixels
from toy import make_cohort, make_method

from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.method_setup import make_setup
from fedvlm_jax.config.run_options import PromptOptions, Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods import load_method
from fedvlm_jax.methods.base import Context
from fedvlm_jax.methods.components.personalized_download import NOBODY
from fedvlm_jax.methods.zoo import pfedmma, pfedmoap
from fedvlm_jax.utils import tree

PATH = "text_model/token_embedding/prompt"
CLIENTS = 12


def make_pool(known, seed=0, round_=3):
    """A pool in which these clients have random prompts."""
    prompts = np.zeros((CLIENTS, VECTORS, 8), np.float32)
    prompts[: len(known)] = np.random.default_rng(seed).normal(size=(len(known), VECTORS, 8))
    number = np.full(CLIENTS, NOBODY, np.int32)
    number[: len(known)] = known
    came = np.where(number == NOBODY, 0, round_).astype(np.int32)
    return prompts, {"moved": tree.unflatten({PATH: prompts}), "number": number, "round": came}


def make_moap(**numbers):
    options = pfedmoap.Options(experts=4, **numbers)
    _, _, _, method, adapter = make_method("pfedmoap", population=CLIENTS, cohort=2, places=2, options=options)
    return method, method.init(adapter=adapter)


def receive(method, server, number):
    received = method.broadcast(server=server, number=jnp.int32(number), last=None)
    return tree.flatten(received["experts"])[PATH], np.asarray(received["present"])


@pytest.mark.parametrize("known", [range(12), (3, 5, 9), (5, 9), (5,), ()])
def test_experts_are_the_nearest_of_the_others(known):
    """More trained clients than experts too, where the authors' code fails; and fewer, whose places stay empty."""
    method, server = make_moap()
    prompts, server["pool"] = make_pool(list(known))
    experts, present = receive(method, server, 5)
    own = prompts[list(known).index(5)] if 5 in known else None
    others = [prompts[place] for place, number in enumerate(known) if number != 5]
    if own is not None:
        others.sort(key=lambda prompt: np.linalg.norm(prompt - own))
        np.testing.assert_array_equal(experts[present], np.reshape(others[:3], (-1, VECTORS, 8)))
    assert present.sum() == min(3, len(others))
    assert not np.any(experts[~present])


def test_random_experts_are_others_and_change_from_round_to_round():
    method, server = make_moap(random=True)
    found = []
    for round_ in (3, 4):
        prompts, server["pool"] = make_pool(list(range(CLIENTS)), round_=round_)
        experts, present = receive(method, server, 5)
        assert present.all()
        places = [int(np.flatnonzero((prompts == expert).all((1, 2)))[0]) for expert in experts]
        assert len({*places}) == 3
        assert 5 not in places
        found.append(sorted(places))
    assert found[0] != found[1]
    assert found[0] != sorted(np.argsort(((prompts - prompts[5]) ** 2).sum((1, 2)))[1:4].tolist())


def test_each_client_begins_with_a_gate_of_its_own():
    """The authors' code hands the gate of the client before to who has none yet."""
    method, server = make_moap()
    gates = [
        method.init_client(key=jax.random.key(k), server=server, number=jnp.int32(k))["own"]["head"]["moap"]["gate"]
        for k in (0, 1)
    ]
    assert not np.array_equal(gates[0]["query"], gates[1]["query"])
    assert pfedmoap.choose_width(pfedmoap.Options(), 512) == 128
    widest = pfedmoap.Options(gate_width=2**31 - 1)
    assert [pfedmoap.choose_width(widest, embedding) for embedding in (512, 0)] == [512, 2**31 - 1], "at once"
    drawn = pfedmoap.draw_gate(jax.random.key(0), 128, 8)
    assert sum(leaf.size for leaf in drawn.values()) == 4 * (128 * 128 + 128)
    bound = max(float(jnp.abs(leaf).max()) for leaf in drawn.values())
    assert 0.99 / 128**0.5 < bound <= 1 / 128**0.5


def test_a_first_round_trains_the_prompt_alone_and_a_second_the_gate_too():
    method, server = make_moap()
    server["pool"] = make_pool([0, 1, 2])[1]
    state = method.init_client(key=jax.random.key(1), server=server, number=jnp.int32(1))
    client = jax.tree.map(lambda x: x[1], make_cohort(2))
    used = []

    def train(factors, optimizer, client, *, trained, assemble):
        used.append(assemble(factors)["head"]["moap"]["present"].tolist())
        flat = tree.flatten(factors)
        moved = {path: leaf + 1 if trained(path) else leaf for path, leaf in flat.items()}
        return tree.unflatten(moved), optimizer, {"loss": jnp.float32(1)}

    for round_ in (1, 2):
        before = state
        ctx = Context(make_method("pfedmoap")[1], jnp.int32(round_), 0, {}, train, jax.random.key(0))
        state, message, _ = method.client_update(
            ctx, server=server, personal=state, client=client, key=jax.random.key(0)
        )
        np.testing.assert_allclose(tree.flatten(message)[PATH], 1, rtol=1e-6)
        kept = np.array_equal(*(part["own"]["head"]["moap"]["gate"]["key"] for part in (before, state)))
        assert kept == (round_ == 1)
        present = method.personalise(server=server, personal=state)["head"]["moap"]["present"]
        assert present.tolist() == ([1, 0, 0, 0] if round_ == 1 else [1, 1, 1, 0])
    assert used == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_heads_that_no_width_divides_by_are_refused():
    with pytest.raises(UserError, match=r"--method.gate-heads 7 .*: no multiple of the heads up to that width divides"):
        make_method("pfedmoap", options=pfedmoap.Options(gate_heads=7, gate_width=12))
    assert declare("pfedmoap", Run(method="pfedmoap", method_options=pfedmoap.Options(gate_heads=7))).name == "pfedmoap"


@pytest.mark.broad
def test_each_client_is_asked_with_its_own_text_tower():
    """The authors' code of pFedMMA keeps the text features of its first test for everybody."""
    vlm, params, _, method, adapter = make_method("pfedmma", options=pfedmma.Options(scale=1.0))
    server = method.init(adapter=adapter)
    states = [method.init_client(key=jax.random.key(k), server=server, number=jnp.int32(k)) for k in (0, 1)]
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf + jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)
            if "text_model" in str(path) and path[-1].key == "back"
            else leaf
        ),
        states[1]["own"],
    )
    states[1] = {**states[1], "own": moved}
    say = jax.jit(vlm.logits)
    batch = {"image_features": np.ones((2, 6), np.float32), "labels": np.zeros((2, 3), np.int32)}
    said = [say(params, method.personalise(server=server, personal=state), batch) for state in (*states, states[0])]
    assert not np.allclose(said[0], said[1], atol=1e-3)
    np.testing.assert_array_equal(said[0], said[2])
    assert make_pixels(batch["image_features"]).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(("rule", "shared", "private"), [(r"prompt$", "", None), (r"prompt/0$", "/0", "/1")])
def test_a_rule_shares_a_prompt_or_some_of_its_vectors(rule, shared, private):
    from prompted_toy import make_bound

    from fedvlm_jax.methods.rule_based import Options

    vlm, _, _ = make_bound()
    run = Run(method="share", method_options=Options(rule), soft_prompt=PromptOptions(vectors=VECTORS))
    setup = dataclasses.replace(make_setup(run, vlm, lambda *_: {}), population=2)
    method = load_method("share", setup)
    server = method.init(adapter=setup.draw(jax.random.key(0)))
    assert list(tree.flatten(server["shared"])) == [PATH + shared]
    assert list(tree.flatten(server["start"])) == ([PATH + private] if private else [])
