"""This package's round in a world: FedAvg of both factors, as `fedvlm train --method fedavg-lora` compiles it."""

import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedvlm_jax import lora
from fedvlm_jax.analysis.flops import count_flops
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.config.run_options import LoraOptions, Run, TrainOptions
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import place_waves, replicate
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.memory import Footprint, measure
from fedvlm_jax.federation.round import RoundArguments, make_arguments, to_waves
from fedvlm_jax.methods import Client
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.training.round_setup import build_programs
from fedvlm_jax.utils import tree
from harness.world import Settings, Shape, World

Vision = Literal["cached", "computed"]
UNREAD = {"cached": "pixel_values", "computed": "image_features"}

METHOD = "fedavg-lora"


def choose_examples(examples: Any, vision: Vision) -> dict[str, Any]:
    """The rows as who runs a round reads them: with features, or with pixels."""
    return {name: array for name, array in examples.items() if name != UNREAD[vision]}


class Ours:
    """A compiled round that can be run over and over, always from the same start."""

    def __init__(self, vlm: Vlm, params: Any, world: World, vision: Vision, wave: int) -> None:
        """Compile it.

        Args:
            vlm, params: the model.
            world: what is to be done.
            vision: whether pictures come as features or as pixels.
            wave: clients side by side; divides their number.
        """
        settings, shape = world.settings, world.shape
        mesh = make_mesh(1)
        run = Run(
            method=METHOD,
            lora=LoraOptions(settings.rank, settings.alpha, settings.targets),
            train=TrainOptions(rounds=2, clip_norm=settings.clip_norm),
        )
        clients, waves = shape.clients, shape.clients // wave
        layout = Layout(clients, wave, waves, shape.steps * shape.batch, shape.steps, shape.batch)
        programs = build_programs(vlm, mesh, run, clients, layout.cohort, layout.places, layout.steps)
        method = programs.method
        fresh = tree.flatten(lora.init(jax.random.key(0), vlm.sites, make_spec(run, vlm)))
        adapter = tree.unflatten(fresh | {path: jnp.asarray(factor) for path, factor in world.start.items()})
        self._params, self._mesh, self._waves = replicate(mesh, params), mesh, waves
        self._server = replicate(mesh, method.init(adapter=adapter))
        blank = jax.eval_shape(lambda: start_personal(method, jax.random.key(0), self._server, jnp.int32(0)))
        self._personal = jax.tree.map(lambda x: np.zeros((shape.clients, *x.shape), x.dtype), blank)
        self._clients = Client(
            choose_examples(world.examples, vision),
            world.indices,
            np.ones(world.indices.shape, bool),
            world.weights,
            np.arange(shape.clients, dtype=np.int32),
            np.ones(shape.clients, bool),
            world.weights,
        )
        self._weights, self.world, self.wave, self.adapter = world.weights, world, wave, adapter
        self._rates = {"a": settings.rate_a, "b": settings.rate_b}
        self.inside = 0.0
        """Seconds of the last run that passed between calling the compiled round and having its results."""
        began = time.perf_counter()
        self.compiled = programs.compile_round(self._arguments(), 0)
        self.compile_seconds = time.perf_counter() - began

    def __call__(self) -> float:
        """Seconds of one round: the cohort's arrays to the device, training, the mean back on the host."""
        began = time.perf_counter()
        arguments = jax.block_until_ready(self._arguments())
        called = time.perf_counter()
        out = jax.block_until_ready(self.compiled(*arguments))
        self.inside = time.perf_counter() - called
        self._mean = jax.device_get(out.server["shared"])
        return time.perf_counter() - began

    def give_factors(self) -> dict[str, np.ndarray]:
        """The server's factors after the last run, by path."""
        return {path: leaf for path, leaf in tree.flatten(self._mean).items() if not path.endswith("scale")}

    def measure(self) -> Footprint:
        """What the round needs of a device."""
        return measure(self.compiled, self._params, self._mesh, self.wave)

    def measure_without_base(self) -> int:
        """Bytes of a device that the round needs beside the base's weights that it reads."""
        stats, (_, *others) = self.compiled.memory_analysis(), self._arguments()
        given = sum(
            leaf.nbytes
            for leaf in jax.tree.leaves(others)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        )
        made = stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
        return given + made

    def _arguments(self) -> RoundArguments:
        def place(tree_: Any) -> Any:
            return place_waves(self._mesh, to_waves(tree_, self._waves))

        return make_arguments(
            params=self._params, server=self._server, personal=place(self._personal), clients=place(self._clients),
            weights=jnp.asarray(self._weights), key=jax.random.key(1), rates=self._rates,
        )  # fmt: skip


def count_round_flops(vlm: Vlm, shape: Shape, settings: Settings, batch: dict[str, Any]) -> int:
    """The model's arithmetic in a round: of one local step, times steps and clients.

    Args:
        vlm: a model whose layers are not rematerialised.
        shape: of the round.
        settings: of the adapter.
        batch: arrays, or shapes, of one local step [B, …].
    """
    spec = lora.LoRA(settings.rank, settings.alpha, settings.targets or vlm.targets)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), vlm.sites, spec))
    moving, scales = tree.partition(adapter, lambda path: not path.endswith("scale"))
    objective = load_objective("sft")

    def loss(moving: Any, scales: Any, params: Any, batch: Any) -> Any:
        return objective.loss(vlm, params, tree.combine(moving, scales), batch)

    step = jax.value_and_grad(loss, has_aux=True)
    return count_flops(step, moving, scales, vlm.shapes(), batch) * shape.steps * shape.clients
