"""Two dense layers, three clients and a method with its compiled round, small enough for another program to follow.

The layers are encoder 5 → 4 and decoder 4 → 3, so no matrix is square; the loss is squared; local training is plain
gradient descent with a rate for A and one for B. Clients have unequal weights and data of their own; one misses a step,
one has a step with a row less.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import paper_world
from flax import linen as nn
from toy import start_states

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.local_training import IGNORED, make_local_trainer
from fedvlm_jax.federation.round import from_waves, make_round, to_waves
from fedvlm_jax.methods import Client, Setup, load_method
from fedvlm_jax.objectives import Objective

SHAPES = {"encoder": (5, 4), "decoder": (4, 3)}
HALVES = {name: f"{name}/" for name in SHAPES}
RANK, SCALE = 2, 1.5
SHARES = np.asarray([0.2, 0.3, 0.5], np.float32)
RATES = {"a": 0.04, "b": 0.1}
ROWS, STEPS, BATCH = 7, 4, 3
KEY = 3


class Half(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, use_bias=False, name="fc")(x)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Half(3, name="decoder")(Half(4, name="encoder")(x))


def squared_error(vlm, params, adapter, batch):
    """½‖y − t‖², the mean over the rows that count; a row counts unless its one label is ignored."""
    counts = (batch["labels"][:, 0] != IGNORED).astype(jnp.float32)
    rows = 0.5 * jnp.sum(jnp.square(vlm.logits(params, adapter, batch)[:, 0] - batch["targets"]), axis=-1)
    loss = jnp.sum(rows * counts) / jnp.maximum(counts.sum(), 1)
    return loss, {"loss": loss}


class World:
    """The model, the data, and a method with its compiled round."""

    def __init__(
        self, name, *, rounds=2, clients=3, ranks=(), groups=1, straggler=True, shares=SHARES, seed=0, part=1.0,
        **choices,
    ):  # fmt: skip
        rng = np.random.default_rng(5)
        self.base = {layer: rng.normal(size=shape).astype(np.float32) / 2 for layer, shape in SHAPES.items()}
        self.params = {layer: {"fc": {"kernel": jnp.asarray(kernel)}} for layer, kernel in self.base.items()}
        forward = lora.inject(Linear().apply)
        self.sites = lora.find_sites(Linear().apply, self.params, jnp.zeros((1, 5)))
        self.vlm = SimpleNamespace(  # y is what an answer of one token has
            logits=lambda params, adapter, batch: forward(params, adapter, batch["inputs"])[:, None]
        )
        trainer = make_local_trainer(
            self.vlm, Objective("squared", "this file", squared_error), optimizer="sgd", clip_norm=None
        )
        spec = lora.LoRA(rank=RANK, alpha=SCALE * RANK)
        choices = {"population": clients, **choices}
        self.setup = Setup(
            sites=self.sites, spec=spec, start_optimizer=trainer.start, cohort=clients, places=clients,
            rounds=rounds, local_steps=STEPS, ranks=ranks, components=HALVES, **choices,
        )  # fmt: skip
        self.method = load_method(name, self.setup)
        self.round = make_round(self.method, trainer, make_mesh(1))
        self.adapter = lora.init(jax.random.key(9), self.sites, spec)
        self.server = self.method.init(adapter=self.adapter)
        self.shares = np.asarray(shares, np.float32)
        self.data = [make_data(clients, groups, straggler, (seed, number)) for number in range(rounds)]
        self.ranks, self.part = ranks, part

    def problem(self, start=None):
        """The same as a paper sees it: transposed matrices in float64, batches of the rows that count."""
        return paper_world.Problem(
            base={layer: kernel.T.astype(float) for layer, kernel in self.base.items()},
            start=as_theta(self.adapter) if start is None else start,
            scale=SCALE,
            rates={"A": RATES["a"], "B": RATES["b"], "C": RATES["b"], "G": RATES["a"], "M": RATES["b"]},
            shares=self.shares.astype(float).tolist(),
            batches=[[as_steps(data, k) for k in range(len(self.shares))] for data in self.data],
            ranks=self.ranks,
            part=self.part,
        )

    def run(self, turns=None):
        """-> after every round the server's state, the base, every client's adapter and state, and what it trained.

        turns: weights of every round; whoever has none is not there. By default all are there in all rounds.
        """
        known = np.zeros(len(self.shares), bool)
        states = start_states(self.method, self.server, len(self.shares))
        server, history = self.server, []
        for number, data in enumerate(self.data, start=1):
            weights = self.shares if turns is None else np.asarray(turns[number - 1], np.float32)
            out = self.round(
                self._base(server),
                replicate(make_mesh(1), server),
                to_waves(states, 1),
                to_waves(data._replace(new=~known, weight=weights, share=self.part * self.shares), 1),
                jnp.asarray(weights),
                {name: jnp.float32(rate) for name, rate in RATES.items()},
                jnp.int32(number),
                jax.random.key(KEY),
                phase=self.method.phase(number),
            )
            before, server = server, out.server
            states = jax.tree.map(
                lambda new, old, there=weights > 0: np.where(there.reshape(-1, *[1] * (old.ndim - 1)), new, old),
                from_waves(out.personal), states,
            )  # fmt: skip
            known |= weights > 0
            fresh = [start_personal(self.method, jax.random.key(KEY), server, k) for k in range(len(self.shares))]
            each = [jax.tree.map(lambda x, k=k: x[k], states) if known[k] else fresh[k] for k in range(len(known))]
            history.append(
                SimpleNamespace(
                    server=server,
                    base=self._base(server),
                    base_before=self._base(before),
                    adapters=[self.method.personalise(server=server, personal=state) for state in each],
                    states=each,
                    trained=[
                        self.method.trained(
                            server=before, personal=state, message=jax.tree.map(lambda x, k=k: x[k], out.messages)
                        )
                        for k, state in enumerate(each)
                    ],
                )
            )
        return history

    def _base(self, server):
        return self.params if self.method.base is None else self.method.base(params=self.params, server=server)


def make_data(clients, groups, straggler, seed):
    """Rows of every client; with groups of g, g steps in a row read one batch."""
    rng = np.random.default_rng((11, *seed))
    indices = rng.integers(0, ROWS, (clients, STEPS // groups, BATCH)).astype(np.int32).repeat(groups, axis=1)
    mask = np.ones((clients, STEPS, BATCH), bool)
    if straggler:
        mask[0, 1, 2] = False
        mask[clients - 1, STEPS - 1] = False
    return Client(
        examples={
            "inputs": rng.normal(size=(clients, ROWS, 5)).astype(np.float32),
            "targets": rng.normal(size=(clients, ROWS, 3)).astype(np.float32),
            "labels": np.ones((clients, ROWS, 1), np.int32),
        },
        indices=indices,
        mask=mask,
        weight=np.zeros(clients, np.float32),
        number=np.arange(clients, dtype=np.int32),
        new=np.ones(clients, bool),
        share=np.zeros(clients, np.float32),
    )


def as_steps(data, k):
    steps = []
    for indices, mask in zip(data.indices[k], data.mask[k], strict=True):
        rows = indices[mask]
        if len(rows):
            steps.append(tuple(data.examples[name][k][rows].astype(float) for name in ("inputs", "targets")))
    return steps


def as_theta(adapter, names="ab"):
    return {
        (layer, name.upper()): np.asarray(adapter[layer]["fc"][name], float).T for layer in SHAPES for name in names
    }


def assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=2e-5, atol=5e-6)
