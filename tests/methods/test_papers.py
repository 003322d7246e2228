"""Two federated rounds of every method through the real compiled round, against NumPy transcriptions of the papers.

What each client's layers compute after each round is compared, and the factors that the server holds.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import paper_personal as personal
import paper_rounds as papers
import paper_world
import pytest
from linear_world import KEY, RANK, SHAPES, World, as_theta, assert_close

from fedvlm_jax import lora
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import Run, methods_available
from fedvlm_jax.methods.base import Context, Setup
from fedvlm_jax.methods.components import heterogeneous_ranks, personalized_download
from fedvlm_jax.methods.config import LocalOptions, ServerOptions
from fedvlm_jax.methods.zoo import (
    apfl,
    ce_lora,
    ditto,
    feddat,
    feddpa_f,
    feddpa_t,
    fedmosaic,
    fedrpca,
    fedsvd,
    flexlora,
    lora_fair,
    pfedme,
    pfit,
    pftt,
)
from fedvlm_jax.methods.zoo.fedrpca import split


def assert_rounds(world, wanted, *, shared=True, turns=None, last=None):
    """Every client's layers after every round and when it had trained, and the server's factors.

    `last` is the layer that is trained, where it is one alone.
    """
    start = {layer: kernel.T for layer, kernel in world.base.items()}
    history = world.run(turns)
    assert len(history) == len(wanted)
    for found, want in zip(history, wanted, strict=True):
        moved = []
        for adapter, weights in zip(found.adapters, want.weights, strict=True):
            merged = lora.merge(found.base, adapter)
            for layer in SHAPES:
                assert_close(merged[layer]["fc"]["kernel"].T, weights[layer])
                if last in (None, layer):
                    moved.append(np.abs(weights[layer] - start[layer]).max())
        assert (max if turns else min)(moved) > 1e-2, "nothing was learned, so nothing was compared"
        there = [(one, weights) for one, weights in zip(found.trained, want.trained, strict=True) if weights]
        assert there
        for adapter, weights in there:
            merged = lora.merge(found.base_before, adapter)
            for layer in SHAPES:
                assert_close(merged[layer]["fc"]["kernel"].T, weights[layer])
        if shared:
            for (layer, name), value in want.shared.items():
                assert_close(found.server["shared"][layer]["fc"][name.lower()].T, value)
    return history


SIMPLE = {
    "local": papers.local,
    "fedavg-lora": papers.fedavg_lora,
    "plora": papers.plora,
    "plora-reset-a": papers.plora_reset_a,
    "fedsa-lora": papers.fedsa_lora,
    "ffa-lora": papers.ffa_lora,
    "rolora": papers.rolora,
    "iat": papers.iat,
    "iat-inverted": papers.iat_inverted,
    "hetlora": papers.hetlora,
    "fedex-lora": papers.fedex_lora,
}


@pytest.mark.parametrize("name", SIMPLE)
def test_share_rules(name):
    world = World(name)
    assert_rounds(world, SIMPLE[name](world.problem()))


FILES = ("test_papers.py", "test_papers_of_clusters.py", "test_prompt_papers.py")


def test_every_method_with_a_paper_is_here():
    """A method that names an arXiv number and that no file of papers names was not compared with its paper."""
    text = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in FILES)
    papers = [name for name in methods_available() if "arXiv" in declare(name, Run()).source]
    missing = [name for name in papers if f'"{name}"' not in text]
    assert not missing, f"transcribe the papers of {missing} in paper_rounds.py, and compare here"


def test_rolora_freezes_what_its_round_does_not_train():
    world = World("rolora")
    first, second = world.run()
    for layer in SHAPES:
        one, two = (found.server["shared"][layer]["fc"] for found in (first, second))
        start = world.adapter[layer]["fc"]
        assert [np.array_equal(one[name], start[name]) for name in "ab"] == [True, False]
        assert [np.array_equal(two[name], one[name]) for name in "ab"] == [False, True]


@pytest.mark.parametrize("even", [False, True])
def test_flexlora(even):
    """Factors of an SVD have free signs, so what is compared is what they compute, and the lengths of A's rows."""
    world = World("flexlora", rounds=3, options=flexlora.Options(even=even))
    history = assert_rounds(world, papers.flexlora(world.problem(), even), shared=False)
    for layer in SHAPES:
        site = history[-1].server["shared"][layer]["fc"]
        lengths = np.linalg.norm(site["a"], axis=0), np.linalg.norm(site["b"], axis=1)
        assert_close(lengths[0], lengths[1] if even else 1)


def test_lora_fair():
    world = World("lora-fair", options=lora_fair.Options(lambda_=0.05))
    assert_rounds(world, papers.lora_fair(world.problem(), 0.05))


def test_fedsvd_over_a_renewal():
    world = World("fedsvd", rounds=3, options=fedsvd.Options(every=2))
    history = assert_rounds(world, papers.fedsvd(world.problem(), 2), shared=False)
    for found, renewed in zip(history, (False, True, True), strict=True):
        for layer in SHAPES:
            a = np.asarray(found.server["shared"][layer]["fc"]["a"])
            assert np.allclose(a.T @ a, np.eye(RANK), atol=1e-5) == renewed


def test_fed_sb():
    """A and B are what the server begins with: the paper takes them from gradients, here they are drawn."""
    world = World("fed-sb")
    frozen = {
        layer: {"fc": world.server["start"][layer]["fc"] | world.server["shared"][layer]["fc"]} for layer in SHAPES
    }
    start = as_theta(frozen)
    middle = {(layer, "C"): value for (layer, _), value in as_theta(frozen, "r").items()}
    wanted = papers.fed_sb(world.problem(start | middle))
    history = assert_rounds(world, wanted, shared=False)
    for found, want in zip(history, wanted, strict=True):
        for layer in SHAPES:
            assert_close(found.server["shared"][layer]["fc"]["r"].T, want.shared[layer, "C"])


def drawn_by_flora(world):
    """A client's key is folded from the run's, the round and its number: see `make_round`."""
    key = jax.random.fold_in(jax.random.key(KEY), 2)
    return [
        [
            as_theta(world.setup.draw(jax.random.fold_in(jax.random.fold_in(key, number), k)))
            for k in range(len(world.shares))
        ]
        for number in range(1, len(world.data) + 1)
    ]


@pytest.mark.parametrize("dealt", [(), (2, 1, 2)], ids=["one-rank", "ranks"])
def test_flora(dealt):
    world = World("flora", ranks=dealt)
    assert_rounds(world, papers.flora(world.problem(), drawn_by_flora(world)))


@pytest.mark.parametrize("name", ["local", "fedavg-lora", "plora", "fedsa-lora", "ffa-lora", "flexlora", "hetlora"])
def test_ranks_that_differ(name):
    """The reference has matrices of every client's own rank, and pads them only to average."""
    world = World(name, ranks=(2, 1, 2))
    reference = {**SIMPLE, "flexlora": papers.flexlora}[name]
    assert_rounds(world, reference(world.problem()), shared=name != "flexlora")


LOW, HIGH, ALL = (0.4, 0.0, 0.6), (0.0, 1.0, 0.0), (0.2, 0.3, 0.5)
"""Weights of a round in which the clients of rank 1 are there, the one of rank 2, or all."""


@pytest.mark.parametrize("name", ["fedavg-lora", "hetlora", "flexlora", "fedsa-lora", "rolora", "fedsvd"])
def test_higher_ranks_outlive_rounds_without_them(name):
    """Ranks 1, 2, 1 over ten rounds: what lies beyond rank 1 is kept where nobody has it, and moves where one does."""
    turns = [HIGH, LOW, LOW, LOW, ALL, LOW, LOW, HIGH, LOW, HIGH]
    world = World(name, ranks=(1, 2, 1), rounds=len(turns))
    before = beyond(world.server["shared"])
    moves = []
    for weights, found in zip(turns, world.run(turns), strict=True):
        after = beyond(found.server["shared"])
        if weights == LOW and name not in ("flexlora", "fedsvd"):  # whose server turns the factors
            assert all(np.array_equal(before[key], after[key]) for key in before)
        moves.append(max(np.abs(after[key] - before[key]).max() for key in before))
        before = after
    assert moves[0] > 1e-3
    assert moves[-1] > 1e-3, "the direction is dead"
    for layer in SHAPES if name != "fedsa-lora" else ():
        assert np.linalg.svd(product(found.server["shared"], layer), compute_uv=False)[1] > 1e-3


@pytest.mark.parametrize("even", [False, True])
def test_flexlora_keeps_what_lies_beyond_the_ranks_of_a_round(even):
    """Rounds of low ranks alone change the first direction's part of the product, and nothing of the rest."""
    turns = [HIGH, LOW, LOW, ALL, LOW, HIGH]
    world = World("flexlora", ranks=(1, 2, 1), rounds=len(turns), options=flexlora.Options(even=even))
    wanted = papers.flexlora(world.problem(), even, turns)
    for found, want in zip(assert_rounds(world, wanted, shared=False, turns=turns), wanted, strict=True):
        for layer in SHAPES:
            whole = want.shared[layer, "B"] @ want.shared[layer, "A"]
            assert_close(product(found.server["shared"], layer).T, whole)


def test_flexlora_by_hand():
    """Shared singular values 1 and 0.9; the client of rank 1, alone, halves the first: 0.9 and 0.5 are left."""
    world = World("flexlora", ranks=(1, 2, 1))
    sites = {layer: {"a": jnp.eye(d_in, 2), "b": jnp.diag(jnp.asarray([1, 0.9])) @ jnp.eye(2, d_out)}
             for layer, (d_in, d_out) in SHAPES.items()}  # fmt: skip
    server = {**world.server, "shared": {layer: {"fc": site} for layer, site in sites.items()}}
    halved = {layer: {"fc": {"a": 0 * site["a"], "b": -0.5 * site["b"].at[1].set(0)}} for layer, site in sites.items()}
    messages = {"update": jax.tree.map(lambda x: x[None], halved), "rank": jnp.asarray([1])}
    ctx = Context(params=None, round=jnp.int32(1), phase=0, rates={}, train=None, key=None)
    shared = world.method.aggregate(ctx, server=server, messages=messages, weights=jnp.ones(1))[0]["shared"]
    for layer in SHAPES:
        found = np.linalg.svd(product(shared, layer), compute_uv=False)
        assert_close(found, [0.9, 0.5] + [0] * (len(found) - 2))


def beyond(shared):
    """Of the server's factors what only a client of rank 2 has."""
    factors = {(layer, name): shared[layer]["fc"][name] for layer in SHAPES for name in shared[layer]["fc"]}
    return {key: np.asarray(m)[:, 1] if key[1] == "a" else np.asarray(m)[1] for key, m in factors.items()}


def product(shared, layer):
    return np.asarray(shared[layer]["fc"]["a"]) @ np.asarray(shared[layer]["fc"]["b"])


def test_a_direction_is_averaged_over_who_has_it():
    """By hand: clients of rank 2, 1 and 2 with weights ¼, ½ and ¼; direction 2 is ½ of the first, ½ of the third."""
    updates = {"fc": {"a": jnp.asarray([[[4.0, 8.0]], [[2.0, 0.0]], [[8.0, 2.0]]])}}
    held = jnp.asarray([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    mean = heterogeneous_ranks.mean(updates, jnp.asarray([0.25, 0.5, 0.25]), held)
    np.testing.assert_allclose(mean["fc"]["a"], [[4, 5]])
    low = heterogeneous_ranks.mean(updates, jnp.asarray([0.0, 1.0, 0.0]), held)
    np.testing.assert_allclose(low["fc"]["a"], [[2, 0]])


def test_momentum_moves_no_direction_that_nobody_sent():
    world = World("fedavg-lora", ranks=(1, 2, 1), rounds=3, server=ServerOptions("momentum", 0.5, 0.9))
    first, second, third = world.run([HIGH, LOW, HIGH])
    kept, moved = (beyond(found.server["shared"]) for found in (second, third))
    for key, value in beyond(first.server["shared"]).items():
        np.testing.assert_array_equal(kept[key], value)
        assert np.abs(moved[key] - value).max() > 1e-4


@pytest.mark.parametrize("name", ["fedavg-lora", "plora"])
@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi", "adagrad"])
def test_server_optimisers(name, kind):
    """v has the squared pseudo-gradient, not the squared momentum (known mistake 4)."""
    rate, beta1, beta2, tau = 0.3, 0.8, 0.9, 0.05
    world = World(name, server=ServerOptions(kind, rate, beta1, beta2, tau), rounds=3)
    step = paper_world.make_fedopt(kind, rate, beta1, beta2, tau)
    assert_rounds(world, SIMPLE[name](world.problem(), server_step=step))


@pytest.mark.parametrize("name", ["fedavg-lora", "plora"])
def test_fedprox(name):
    """The proximal term pulls (known mistake 8: on detached tensors it has no gradient)."""
    world = World(name, local=LocalOptions(proximal=0.7))
    assert_rounds(world, SIMPLE[name](world.problem(), mu=0.7))


@pytest.mark.parametrize("name", ["fedavg-lora", "plora"])
def test_scaffold(name):
    """Option II, three clients that have 0.6 of all clients' weight, one of which took a step less."""
    world = World(name, local=LocalOptions(scaffold=True), part=0.6, rounds=3)
    assert_rounds(world, SIMPLE[name](world.problem(), scaffold=True))


def test_ditto():
    world = World("ditto", options=ditto.Options(lambda_=0.6))
    assert_rounds(world, personal.ditto(world.problem(), 0.6))


@pytest.mark.parametrize("adaptive", [False, True])
def test_apfl(adaptive):
    world = World("apfl", options=apfl.Options(alpha=0.4, adaptive=adaptive))
    assert_rounds(world, personal.apfl(world.problem(), 0.4, adaptive))


def test_pfedme():
    """Two inner steps on one batch, twice: exactly the paper's algorithm."""
    world = World(
        "pfedme", groups=2, straggler=False,
        options=pfedme.Options(lambda_=2.0, inner=2, rate=0.3, beta=0.7),
    )  # fmt: skip
    assert_rounds(world, personal.pfedme(world.problem(), 2.0, 2, 0.3, 0.7))


def test_pfedme_as_its_authors_code_has_it():
    """Every round begins with θ at w; that is another model from the second round on."""
    choices = {"lambda_": 2.0, "inner": 2, "rate": 0.3}
    world = World("pfedme", groups=2, straggler=False, rounds=3, options=pfedme.Options(**choices, restart=True))
    wanted = personal.pfedme(world.problem(), 2.0, 2, 0.3, 1.0, restart=True)
    assert_rounds(world, wanted)
    kept = personal.pfedme(world.problem(), 2.0, 2, 0.3, 1.0)
    assert np.abs(kept[1].weights[0]["encoder"] - wanted[1].weights[0]["encoder"]).max() > 1e-2


def test_feddpa_t():
    """Half of a client's own steps are the local pair's; of three steps, one."""
    world = World("feddpa-t", options=feddpa_t.Options(alpha=0.4))
    assert_rounds(world, personal.feddpa(world.problem(), 0.4, lambda number, steps: steps // 2))


def test_feddpa_t_as_its_authors_code_has_it():
    """All steps for the global pair in every round, and from the second one on for the local pair before it."""
    world = World("feddpa-t", rounds=3, options=feddpa_t.Options(alpha=0.4, whole=True))
    wanted = personal.feddpa(world.problem(), 0.4, lambda number, steps: steps if number > 1 else 0, whole=True)
    assert_rounds(world, wanted)


def test_feddpa_f():
    """The first of two rounds is the global pair's, the second the local one's."""
    world = World("feddpa-f", options=feddpa_f.Options(alpha=0.4, local=0.5))
    assert_rounds(world, personal.feddpa(world.problem(), 0.4, lambda number, steps: steps if number == 2 else 0))


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 3.0), (0.3, 0.7)])
def test_feddat(weight, temperature):
    world = World("feddat", options=feddat.Options(weight, temperature))
    assert_rounds(world, personal.feddat(world.problem(), weight, temperature))


COMING = [(0.4, 0.6, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.4, 0.6), (0.4, 0.0, 0.6)]
"""Two together, rounds of one alone, somebody who comes back, and a third who is new in the fourth round."""

ATTENDANCE = pytest.mark.parametrize("turns", [None, COMING], ids=["all", "coming-and-going"])


@ATTENDANCE
def test_fedmosaic(turns):
    world = World("fedmosaic", rounds=len(turns or "12"), options=fedmosaic.Options(weight=0.3, temperature=0.4))
    assert_rounds(world, personal.fedmosaic(world.problem(), 0.3, 0.4, turns), turns=turns)


@ATTENDANCE
def test_ce_lora(turns):
    world = World("ce-lora", rounds=len(turns or "12"), options=ce_lora.Options(temperature=0.4))
    assert_rounds(world, personal.ce_lora(world.problem(), 0.4, turns), turns=turns)


def test_a_pool_keeps_the_newest():
    """Three places: 4 and 7 come in round 1, 5 and 9 in round 2, 7 again and 4, who does not count, in round 3."""
    pool = personalized_download.start_pool(
        {"b": jnp.zeros(1)}, Setup(sites={}, spec=None, start_optimizer=None, population=3)
    )
    for number, (who, weights) in enumerate([((4, 7), (1, 1)), ((5, 9), (1, 1)), ((7, 4), (1, 0))], start=1):
        moved = {"b": jnp.asarray([[10.0 * number + w] if w else [jnp.nan] for w in weights])}
        counts = jnp.asarray(weights, jnp.float32)
        pool = personalized_download.renew(pool, moved, jnp.asarray(who), counts, jnp.int32(number))
        assert pool["number"].tolist() == [[4, 7, -1], [5, 9, 4], [7, 5, 9]][number - 1]
        assert pool["round"].tolist() == [[1, 1, 0], [2, 2, 1], [3, 2, 2]][number - 1]
    assert pool["moved"]["b"].ravel().tolist() == [31, 21, 21]


@ATTENDANCE
def test_fedalt(turns):
    """What is compared are outputs: with a router a layer is no matrix."""
    world = World("fedalt", rounds=len(turns or "12"))
    probe = np.random.default_rng(1).normal(size=(6, 5))
    wanted = personal.fedalt(world.problem(), probe, turns)
    batch = {"inputs": jnp.asarray(probe, jnp.float32)}
    for found, (after, trained) in zip(world.run(turns), wanted, strict=True):
        for adapters, outputs in ((found.adapters, after), (found.trained, trained)):
            for adapter, output in zip(adapters, outputs, strict=True):
                if output is not None:
                    assert_close(world.vlm.logits(found.base, adapter, batch)[:, 0], output)
        for layer in SHAPES:
            assert np.abs(found.states[0]["own"][layer]["fc"]["gate"]).max() > 1e-3


@pytest.mark.parametrize(
    "dealt", [pytest.param((), id="one-rank", marks=pytest.mark.broad), pytest.param((2, 1, 2), id="ranks")]
)
def test_pftt(dealt):
    """The shared bottlenecks, the private pairs at their ranks, and what every client computes with them."""
    world = World("pftt", ranks=dealt, options=pftt.Options(width=3, after="fc$"))
    probe = np.random.default_rng(1).normal(size=(6, 5))
    start = {
        (layer, name): np.asarray(world.server["shared"][layer]["fc"][leaf], float).T
        for layer in SHAPES
        for name, leaf in (("D", "down"), ("U", "up"))
    }
    batch = {"inputs": jnp.asarray(probe, jnp.float32)}
    rounds = zip(world.run(), personal.pftt(world.problem(), start, probe), strict=True)
    for found, (shared, own, outputs) in rounds:
        for (layer, name), value in shared.items():
            assert np.abs(value - start[layer, name]).max() > 1e-3, "nothing was learned, so nothing was compared"
            assert_close(found.server["shared"][layer]["fc"][{"D": "down", "U": "up"}[name]].T, value)
        for k, (mine, output) in enumerate(zip(own, outputs, strict=True)):
            rank = dealt[k] if dealt else RANK
            kept = as_theta(lora.combine(found.server["shared"], found.states[k]["own"]))
            for key, value in mine.items():
                assert_close(kept[key][:rank] if key[1] == "A" else kept[key][:, :rank], value)
            assert_close(world.vlm.logits(found.base, found.adapters[k], batch)[:, 0], output)


def test_pfit():
    """With squared errors in place of the reward, which tests/objectives/test_reward.py holds; here the last layer."""
    world = World("pfit", options=pfit.Options(pull=0.7))
    history = assert_rounds(world, personal.pfit(world.problem(), 0.7, "decoder"), last="decoder")
    assert set(history[-1].server["shared"]) == {"decoder"}


def test_pfit_of_named_layers():
    world = World("pfit", options=pfit.Options(pull=0.7, layers="encoder/"))
    assert_rounds(world, personal.pfit(world.problem(), 0.7, "encoder"), last="encoder")


def test_fedrpca():
    """Of data for which the minimum is sharp: of three columns it is flat now and then, and any point of it right."""
    world = World("fedrpca", seed=2, options=fedrpca.Options(beta=2.0, steps=1000))
    assert_rounds(world, papers.fedrpca(world.problem(), 2.0))


def test_fedrpca_of_beta_one_is_the_plain_mean():
    world = World("fedrpca", options=fedrpca.Options(beta=1.0))
    assert_rounds(world, papers.fedavg_lora(world.problem()))


def test_robust_pca_finds_what_was_planted():
    """Rank 1 plus a few large entries, over 40 × 30."""
    rng = np.random.default_rng(2)
    low = np.outer(rng.normal(size=40), rng.normal(size=30))
    sparse = np.where(rng.random((40, 30)) < 0.05, 5 * rng.choice([-1.0, 1.0], (40, 30)), 0)
    found_low, found_sparse = jax.jit(split, static_argnums=1)(jnp.asarray(low + sparse, jnp.float32), 200)
    np.testing.assert_allclose(found_low + found_sparse, low + sparse, atol=1e-5)
    np.testing.assert_allclose(found_low, low, atol=1e-2)
    np.testing.assert_allclose(found_sparse, sparse, atol=1e-2)


def test_robust_pca_agrees_with_another_algorithm():
    """Douglas–Rachford on the same problem, for the shape that a factor's updates have."""
    matrix = np.random.default_rng(3).normal(size=(10, 3)) + np.arange(10)[:, None] / 4
    low, sparse = papers.low_rank_and_sparse(matrix)
    found_low, found_sparse = jax.jit(split, static_argnums=1)(jnp.asarray(matrix, jnp.float32), 3000)
    np.testing.assert_allclose(found_low, low, atol=1e-4)
    np.testing.assert_allclose(found_sparse, sparse, atol=1e-4)


UNEQUAL = (0.15, 0.25, 0.6)


def test_scaffold_s_fixed_point_is_that_of_the_weighted_objective():
    """∇ Σ q_k F_k, q_k by examples, goes to zero, and the plain mean of the ∇ F_k does not.

    Every client has one batch, read in every step, so that its F_k is the same in all rounds.
    """
    rounds, scaffold = 150, LocalOptions(scaffold=True)
    world = World("ffa-lora", rounds=1, groups=4, straggler=False, shares=UNEQUAL, local=scaffold)
    (data,) = world.data
    halved = {name: x if name == "labels" else x / 2 for name, x in data.examples.items()}  # steep ones overshoot
    world.data = [data._replace(examples=halved)] * rounds
    problem, theta = world.problem(), as_theta(world.run()[-1].adapters[0])
    grads = paper_world.lora_gradients(problem.base, problem.scale)
    slopes = [paper_world.only(grads(theta, *batches[0]), "B") for batches in problem.batches[0]]
    assert largest(paper_world.mean(slopes, UNEQUAL)) < 0.25 * largest(paper_world.mean(slopes, [1 / 3] * 3))


def test_scaffold_s_control_is_the_weighted_mean_of_the_clients():
    """c = Σ q_k c_k whoever is there: of all clients' weight the three have 0.6, and the rest never trained."""
    turns = [(3 / 8, 5 / 8, 0.0), (0.0, 5 / 17, 12 / 17), (0.2, 0.0, 0.8), UNEQUAL]
    world = World("fedavg-lora", rounds=4, shares=UNEQUAL, part=0.6, local=LocalOptions(scaffold=True))
    for found in world.run(turns)[1:]:
        controls = [state["control"] for state in found.states]
        wanted = jax.tree.map(lambda *c: sum(0.6 * q * x for q, x in zip(UNEQUAL, c, strict=True)), *controls)
        jax.tree.map(assert_close, found.server["control"], wanted)
        assert np.abs(found.server["control"]["encoder"]["fc"]["b"]).max() > 1e-3


def largest(theta):
    return max(float(np.abs(m).max()) for m in theta.values())
