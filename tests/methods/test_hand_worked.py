"""One round of local, fedavg-lora and plora on 2×2 matrices, every number worked out on paper.

The model is y = x (W + s·A·B) in our layout (x a row, A = `a`, B = `b`), the loss ½‖y − t‖², its mean over the rows of
the batch. With the residual r = y − t the gradients are

    ∂A = s·xᵀ (r Bᵀ)        ∂B = s·(x A)ᵀ r

s = alpha / rank = ½, rates 1 for A and ½ for B. Both clients start from A = [[1, 0], [1, 1]] and B = 0. Targets are
given as t = x W + e, so that W drops out of y − t = s·x A B − e.

Client 1 has one example, x = (1, 0), e = (4, 0), and weight ¼. Two steps on it:
    x A = (1, 0). Step 1: r = −e, ∂B = ½ (1, 0)ᵀ (−4, 0) = [[−2, 0], [0, 0]], ∂A = 0; B = [[1, 0], [0, 0]].
    Step 2: r = ½ (1, 0) B − e = (−7/2, 0); ∂B = [[−7/4, 0], [0, 0]]; r Bᵀ = (−7/2, 0), ∂A = [[−7/4, 0], [0, 0]].
    Ends with A = [[11/4, 0], [1, 1]], B = [[15/8, 0], [0, 0]].

Client 2 has three, x = (0, 1) and e = (0, 2), (0, 4), (0, 6), and weight ¾. Every step reads all;
with one x, only the mean of e counts, (0, 4):
    x A = (1, 1). Step 1: r = (0, −4), ∂B = ½ (1, 1)ᵀ (0, −4) = [[0, −2], [0, −2]]; B = [[0, 1], [0, 1]].
    Step 2: r = ½ (1, 1) B − e = (0, −3); ∂B = [[0, −3/2], [0, −3/2]]; r Bᵀ = (−3, −3), ∂A = [[0, 0], [−3/2, −3/2]].
    Ends with A = [[1, 0], [5/2, 5/2]], B = [[0, 7/4], [0, 7/4]].
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from toy import start_states

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.federation.local_training import IGNORED, make_local_trainer
from fedvlm_jax.federation.round import from_waves, make_round, to_waves
from fedvlm_jax.methods import Client, Setup, load_method
from fedvlm_jax.objectives import Objective

METHODS = ("local", "fedavg-lora", "plora")
START = np.asarray([[1, 0], [1, 1]], np.float32)
BASE = np.asarray([[1, 2], [3, 4]], np.float32)

A_1 = np.asarray([[11 / 4, 0], [1, 1]])
B_1 = np.asarray([[15 / 8, 0], [0, 0]])
A_2 = np.asarray([[1, 0], [5 / 2, 5 / 2]])
B_2 = np.asarray([[0, 7 / 4], [0, 7 / 4]])

# ¼ A_1 + ¾ A_2 = [[11/16 + 12/16, 0], [4/16 + 30/16, 4/16 + 30/16]]
MEAN_A = np.asarray([[23 / 16, 0], [17 / 8, 17 / 8]])
# ¼ B_1 + ¾ B_2
MEAN_B = np.asarray([[15 / 32, 21 / 16], [0, 21 / 16]])


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="fc")(x)


def squared_error(vlm, params, adapter, batch):
    """½‖y − t‖², the mean over the rows that count; a row counts unless its one label is ignored."""
    counts = (batch["labels"][:, 0] != IGNORED).astype(jnp.float32)
    rows = 0.5 * jnp.sum(jnp.square(vlm.logits(params, adapter, batch) - batch["targets"]), axis=-1)
    loss = jnp.sum(rows * counts) / jnp.maximum(counts.sum(), 1)
    return loss, {"loss": loss}


class World:
    """The model, a method on it and its compiled round."""

    def __init__(self, name, clip_norm=None):
        forward = lora.inject(Linear().apply)
        self.params = {"fc": {"kernel": jnp.asarray(BASE)}}
        self.sites = lora.find_sites(Linear().apply, self.params, jnp.zeros((1, 2)))
        vlm = SimpleNamespace(logits=lambda params, adapter, batch: forward(params, adapter, batch["inputs"]))
        objective = Objective("squared", "this file", squared_error)
        trainer = make_local_trainer(vlm, objective, optimizer="sgd", clip_norm=clip_norm)
        spec = lora.LoRA(rank=2, alpha=1.0)
        setup = Setup(sites=self.sites, spec=spec, start_optimizer=trainer.start)
        self.method = load_method(name, setup)
        self.round = make_round(self.method, trainer, make_mesh(1))
        adapter = lora.init(jax.random.key(0), self.sites, spec)
        adapter["fc"]["a"] = jnp.asarray(START)
        self.server = self.method.init(adapter=adapter)

    def run(self, numbers, weights, *, steps=2, server=None, states=None):
        """-> the server, each client's state, the adapter that each client uses, the one that it trained."""
        cohort = make_clients(numbers, steps, new=states is None)
        server = self.server if server is None else server
        states = start_states(self.method, self.server, len(numbers)) if states is None else states
        out = self.round(
            self.params,
            replicate(make_mesh(1), server),
            to_waves(states, 1),
            to_waves(cohort, 1),
            jnp.asarray(weights, jnp.float32),
            {"a": jnp.float32(1), "b": jnp.float32(1 / 2)},
            jnp.int32(1),
            jax.random.key(0),
        )
        states = jax.tree.map(np.asarray, from_waves(out.personal))
        one = lambda tree, k: jax.tree.map(lambda x: x[k], tree)  # noqa: E731
        places = range(len(numbers))
        used = [self.method.personalise(server=out.server, personal=one(states, k))["fc"] for k in places]
        trained = [
            self.method.trained(server=server, personal=one(states, k), message=one(out.messages, k))["fc"]
            for k in places
        ]
        return out.server, states, used, trained


def make_clients(numbers, steps, new):
    """Clients 1 and 2 of the docstring; batches of three, of which client 1's has one row that counts."""
    inputs = np.asarray([[[1, 0]] * 3, [[0, 1]] * 3], np.float32)
    errors = np.asarray([[[4, 0], [9, 9], [9, 9]], [[0, 2], [0, 4], [0, 6]]], np.float32)
    mask = np.zeros((2, 2, 3), bool)
    mask[0, :steps, 0] = mask[1, :steps] = True
    both = Client(
        examples={"inputs": inputs, "targets": inputs @ BASE + errors, "labels": np.ones((2, 3, 1), np.int32)},
        indices=np.tile(np.arange(3, dtype=np.int32), (2, 2, 1)),
        mask=mask,
        weight=np.asarray([1 / 4, 3 / 4], np.float32),
        number=np.arange(2, dtype=np.int32),
        new=np.full(2, new),
        share=np.asarray([1 / 4, 3 / 4], np.float32),
    )
    return jax.tree.map(lambda x: x[[number - 1 for number in numbers]], both)


@pytest.fixture(scope="module", params=METHODS)
def world(request):
    world = World(request.param)
    world.name = request.param
    world.after = world.run([1, 2], [1 / 4, 3 / 4])
    return world


def assert_factors(adapter, a, b):
    np.testing.assert_allclose(adapter["a"], a, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(adapter["b"], b, rtol=1e-6, atol=1e-6)
    assert adapter["scale"] == 0.5


def test_clients_train_alike_whatever_is_shared(world):
    _, _, _, trained = world.after
    assert_factors(trained[0], A_1, B_1)
    assert_factors(trained[1], A_2, B_2)


def test_what_clients_have_after_the_round(world):
    _, _, used, _ = world.after
    wanted = {
        "local": ((A_1, B_1), (A_2, B_2)),
        "fedavg-lora": ((MEAN_A, MEAN_B), (MEAN_A, MEAN_B)),
        "plora": ((A_1, MEAN_B), (A_2, MEAN_B)),
    }[world.name]
    for adapter, (a, b) in zip(used, wanted, strict=True):
        assert_factors(adapter, a, b)


def test_the_server_holds_what_is_shared_and_nothing_else(world):
    shared = world.after[0]["shared"]
    wanted = {"local": {}, "fedavg-lora": {"a": MEAN_A, "b": MEAN_B}, "plora": {"b": MEAN_B}}[world.name]
    assert set(shared.get("fc", {})) == set(wanted)
    for factor, value in wanted.items():
        np.testing.assert_allclose(shared["fc"][factor], value, rtol=1e-6)


@pytest.mark.parametrize(("number", "a", "b"), [(1, A_1, B_1), (2, A_2, B_2)])
def test_alone_in_the_cohort_averaging_changes_nothing(world, number, a, b):
    _, _, used, _ = world.run([number], [1.0])
    assert_factors(used[0], a, b)


def test_the_error_of_fedavg_lora_is_the_covariance_of_its_factors():
    """E = Σ p_k A_k B_k − Ā B̄ = Σ p_k (A_k − Ā)(B_k − B̄), here ¼·¾ (A_1 − A_2)(B_1 − B_2).

    A_1 B_1 = [[165/32, 0], [15/8, 0]], A_2 B_2 = [[0, 7/4], [0, 35/4]], so their mean is
    [[165/128, 21/16], [15/32, 105/16]]; Ā B̄ = [[345/512, 483/256], [255/256, 357/64]].
    """
    error = np.asarray([[315 / 512, -147 / 256], [-135 / 256, 63 / 64]])
    world = World("fedavg-lora")
    _, _, used, trained = world.run([1, 2], [1 / 4, 3 / 4])
    means = {factor: used[0][factor] for factor in "ab"}
    products = [np.asarray(one["a"] @ one["b"]) for one in trained]
    np.testing.assert_allclose(products[0] / 4 + 3 * products[1] / 4 - means["a"] @ means["b"], error, atol=1e-6)
    spread = [(one["a"] - means["a"]) @ (one["b"] - means["b"]) for one in trained]
    np.testing.assert_allclose(spread[0] / 4 + 3 * spread[1] / 4, error, atol=1e-6)
    # What the clients compute afterwards is off by s·E.
    fine = lora.merge(world.params, {"fc": used[0]})["fc"]["kernel"]
    exact = BASE + (A_1 @ B_1 / 4 + 3 * A_2 @ B_2 / 4) / 2
    np.testing.assert_allclose(exact - fine, error / 2, atol=1e-6)


def test_a_second_round_of_plora_goes_on_from_the_private_a():
    """Client 1 alone, one step (a second one reads nothing), from A_1 and the mean B.

    x A_1 = (11/4, 0); s·x A_1 B̄ = (165/256, 231/128), r = (−859/256, 462/256).
    ∂B = [[11/8 r], [0, 0]]: first row of B is (15/32 + 11/16·859/256, 21/16 − 11/16·462/256) = (11369, 294) / 4096.
    r B̄ᵀ = (−859/256·15/32 + 462/256·21/16, 462/256·21/16) = (6519/8192, 9702/4096), of which A takes half.
    """
    world = World("plora")
    server, states, _, _ = world.run([1, 2], [1 / 4, 3 / 4])
    first = jax.tree.map(lambda x: x[:1], states)
    server, _, used, _ = world.run([1], [1.0], steps=1, server=server, states=first)
    a = [[11 / 4 - 6519 / 16384, -9702 / 8192], [1, 1]]
    b = [[11369 / 4096, 294 / 4096], [0, 21 / 16]]
    assert_factors(used[0], a, b)
    # Client 2 was away: it has its own A, and the B that is there now.
    away = jax.tree.map(lambda x: x[1], states)
    assert_factors(world.method.personalise(server=server, personal=away)["fc"], A_2, b)


def test_clipping():
    """The first gradients have norms 2 and 2√2; clipped to 1 they are halved, and divided by 2√2."""
    _, _, used, _ = World("local", clip_norm=1.0).run([1, 2], [1 / 4, 3 / 4], steps=1)
    root = np.sqrt(1 / 2)
    assert_factors(used[0], START, [[1 / 2, 0], [0, 0]])
    assert_factors(used[1], START, [[0, root / 2], [0, root / 2]])
