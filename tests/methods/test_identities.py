"""What the methods' arithmetic must satisfy whatever the data, and the mistakes of public code that could be made here.

Here are those that are not elsewhere: with one client averaging changes nothing, a client of weight zero changes
nothing, permutations, waves, and newcomers who inherit nobody's private state are `test_contract`; every mistake of a
formula is `test_papers` too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import paper_personal as personal
import paper_world
import pytest
from linear_world import SCALE, SHAPES, SHARES, World, as_theta, assert_close

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.participation import draw_cohort
from fedvlm_jax.methods.components import server_optimizers
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.methods.config import LocalOptions, ServerOptions
from fedvlm_jax.methods.zoo import ditto, pfedme
from fedvlm_jax.objectives import load_objective

pytestmark = pytest.mark.broad


@pytest.fixture(scope="module")
def averaged():
    """Two rounds of fedavg-lora."""
    world = World("fedavg-lora")
    return world, world.run()


def kernels(base, adapter):
    merged = lora.merge(base, adapter)
    return {layer: np.asarray(merged[layer]["fc"]["kernel"], float) for layer in SHAPES}


def product(adapter, layer):
    """s A B of one layer, in our layout."""
    site = adapter[layer]["fc"]
    return np.asarray(site["a"], float) @ np.asarray(site["b"], float) * float(site["scale"])


def assert_same_use(one, other):
    for found, want in zip(one, other, strict=True):
        for a, b in zip(found.adapters, want.adapters, strict=True):
            for layer, kernel in kernels(found.base, a).items():
                assert_close(kernel, kernels(want.base, b)[layer])


def test_fedprox_without_a_pull_is_fedavg(averaged):
    """μ so small that it is nothing, for μ = 0 is another program; and with a real μ the update is another one."""
    _, plain = averaged
    assert_same_use(World("fedavg-lora", local=LocalOptions(proximal=1e-9)).run(), plain)
    with pytest.raises(AssertionError):
        assert_same_use(World("fedavg-lora", local=LocalOptions(proximal=1.0)).run(), plain)


def test_ditto_without_a_pull_is_local():
    assert_same_use(World("ditto", options=ditto.Options(lambda_=0.0)).run(), World("local").run())


def test_fedavgm_without_momentum_is_fedavg(averaged):
    options = ServerOptions("momentum", learning_rate=1.0, beta1=0.0)
    assert_same_use(World("fedavg-lora", server=options).run(), averaged[1])


def test_flora_adds_the_mean_of_the_products():
    world = World("flora")
    before = world.params
    for found in world.run():
        for layer in SHAPES:
            added = found.base[layer]["fc"]["kernel"] - before[layer]["fc"]["kernel"]
            assert_close(added, sum(p * product(one, layer) for p, one in zip(SHARES, found.trained, strict=True)))
        before = found.base


def test_fedex_adds_the_covariance_and_is_exact():
    """E = Σ p_k (A_k − Ā)(B_k − B̄), not transposed (known mistake 3, silent for square layers; these are not)."""
    world = World("fedex-lora")
    before = world.params
    for found in world.run():
        for layer in SHAPES:
            sites = [one[layer]["fc"] for one in found.trained]
            a, b = (
                sum(p * np.asarray(site[name], float) for p, site in zip(SHARES, sites, strict=True)) for name in "ab"
            )
            spread = sum(p * (site["a"] - a) @ (site["b"] - b) for p, site in zip(SHARES, sites, strict=True))
            assert np.abs(spread).max() > 1e-4
            added = found.base[layer]["fc"]["kernel"] - before[layer]["fc"]["kernel"]
            assert_close(added, SCALE * spread)
            exact = sum(p * product(one, layer) for p, one in zip(SHARES, found.trained, strict=True))
            assert_close(kernels(found.base, found.adapters[0])[layer], before[layer]["fc"]["kernel"] + exact)
        before = found.base


@pytest.mark.parametrize("ranks", [(), (2, 1, 2)], ids=["one-rank", "ranks"])
def test_flexlora_is_the_dense_truncated_svd(ranks):
    world = World("flexlora", ranks=ranks)
    for found in world.run():
        for layer in SHAPES:
            dense = sum(p * product(one, layer) for p, one in zip(SHARES, found.trained, strict=True))
            u, s, vt = np.linalg.svd(dense)
            for k, adapter in enumerate(found.adapters):
                rank = ranks[k] if ranks else 2
                assert_close(product(adapter, layer), (u[:, :rank] * s[:rank]) @ vt[:rank])


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "fed-sb", "fedsvd"])
def test_averages_that_are_exact(name):
    """The mean of the clients' models is the model of the mean; of fedavg-lora it is not."""
    for found in World(name).run():
        for layer in SHAPES:
            mean = sum(p * product(one, layer) for p, one in zip(SHARES, found.trained, strict=True))
            assert_close(product(found.adapters[0], layer), mean)


def test_an_average_that_is_not_exact(averaged):
    found = averaged[1][-1]
    mean = sum(p * product(one, "encoder") for p, one in zip(SHARES, found.trained, strict=True))
    assert np.abs(product(found.adapters[0], "encoder") - mean).max() > 1e-4


def test_nobody_else_to_take_a_mean_of():
    """A mean over an empty set of others: nothing is delivered, and nothing is divided by zero."""
    world = World("fedmosaic", clients=1, shares=[1.0])
    wanted = personal.fedmosaic(world.problem(), 0.5, 0.5)
    for found, want in zip(world.run(), wanted, strict=True):
        for layer, kernel in kernels(found.base, found.adapters[0]).items():
            assert_close(kernel.T, want.weights[0][layer])
    world = World("fedalt", clients=1, shares=[1.0])
    probe = np.random.default_rng(1).normal(size=(6, 5))
    for found, ((want,), _) in zip(world.run(), personal.fedalt(world.problem(), probe), strict=True):
        batch = {"inputs": jnp.asarray(probe, jnp.float32)}
        assert_close(world.vlm.logits(found.base, found.adapters[0], batch)[:, 0], want)


# Known mistakes


def test_every_leaf_is_the_mean_in_every_round(averaged):
    """Mistake 1: a flag cleared after the first key, so that every later key becomes old global + mean.

    In the second round the old global is not zero, and there are four keys.
    """
    for found in averaged[1]:
        clients = [as_theta(one) for one in found.trained]
        want = paper_world.mean(clients, SHARES.tolist())
        got = as_theta(found.adapters[0])
        assert len(got) == 4
        for key, value in want.items():
            assert_close(got[key], value)


def test_every_client_is_in_the_mean():
    """Mistake 2: a typo that keeps only p_0 · client_0. Each client in turn gets all the weight."""
    for k in range(3):
        found = World("fedavg-lora", rounds=1, shares=np.eye(3)[k]).run()[0]
        for key, value in as_theta(found.trained[k]).items():
            assert_close(as_theta(found.adapters[0])[key], value)


def test_adam_takes_the_square_of_the_update():
    """Mistake 4: v fed with m² in place of Δ². Two steps with Δ = 1, then 0, so that m and Δ part.

    β₁ = ½, β₂ = ¾, τ = 0: m = ½, v = ¼, step ½ / ½ = 1; then m = ¼, v = 3/16, step ¼ / (√3 / 4) = 1 / √3.
    """
    options, shared = ServerOptions("adam", 1.0, 0.5, 0.75, 0.0), {"b": jnp.zeros(1)}
    start = server_optimizers.start(options, shared)
    first, state = server_optimizers.step(options, {"b": jnp.ones(1)}, start, jnp.ones(1), None)
    second, _ = server_optimizers.step(options, {"b": jnp.zeros(1)}, state, jnp.ones(1), None)
    np.testing.assert_allclose(first["b"], 1, rtol=1e-6)
    np.testing.assert_allclose(second["b"], 1 / np.sqrt(3), rtol=1e-6)


def test_another_seed_draws_other_cohorts():
    """Mistake 5: client sampling seeded by the round alone, so that every seed draws the same cohorts."""
    drawn = [[tuple(draw_cohort(seed, round_, 50, 5)) for round_ in range(1, 5)] for seed in (0, 1)]
    assert all(one != other for one, other in zip(*drawn, strict=True))
    assert len(set(drawn[0])) == 4


def test_who_never_took_part_has_nobodys_private_weights():
    """Mistake 6: a "global" evaluation that silently uses the last client's private weights."""
    world = World("plora")
    found = world.run()[-1]
    trainer = make_local_trainer(world.vlm, load_objective("sft"), optimizer="sgd")
    programs = Programs(world.method, trainer, make_mesh(1))
    states = jax.tree.map(lambda *rows: np.stack(rows), *found.states)
    numbers = np.arange(3, dtype=np.int32)
    strangers = programs.personalise(found.server, states, np.zeros(3, bool), numbers, jax.random.key(0))
    for layer in SHAPES:
        site = strangers[layer]["fc"]
        for k in range(3):
            assert np.array_equal(site["a"][k], world.adapter[layer]["fc"]["a"])
            assert np.array_equal(site["b"][k], found.server["shared"][layer]["fc"]["b"])
            assert not np.array_equal(site["a"][k], found.states[k]["own"][layer]["fc"]["a"])


def distance(adapters, anchor):
    return sum(float(np.linalg.norm(m - anchor[key])) for one in adapters for key, m in as_theta(one).items())


def test_pulls_pull_towards_and_have_a_gradient():
    """Mistake 8, a proximal term on detached tensors, and loss terms with the wrong sign.

    In a first round everybody starts at the anchor: the stronger the pull, the nearer they stay.
    """
    start = as_theta(World("local").adapter)
    prox = [World("fedavg-lora", rounds=1, local=LocalOptions(proximal=mu)).run()[0].trained for mu in (0.0, 1.0, 4.0)]
    beside = [World("ditto", rounds=1, options=ditto.Options(lambda_=x)).run()[0].adapters for x in (0.0, 1.0, 4.0)]
    moreau = [World("pfedme", rounds=1, options=pfedme.Options(lambda_=x)).run()[0].adapters for x in (0.1, 1.0, 4.0)]
    for adapters in (prox, beside, moreau):
        far, nearer, nearest = (distance(one, start) for one in adapters)
        assert far > 1.05 * nearer > 1.1 * nearest


def test_a_layer_of_two_digits_keeps_its_name():
    """Renaming "layer.10" when replacing "0"."""
    assert [leaf_name(path) for path in ("layers/10/fc/b/1", "layers/1/fc/a", "fc/b/10")] == ["b", "a", "b"]
