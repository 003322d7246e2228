"""The server's part of a deployment: the start, what it broadcasts, and the aggregate. No weights, no data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.deployment.agreed_classes import check_agreed
from fedvlm_jax.deployment.plan import Plan
from fedvlm_jax.deployment.shapes import shape_message, shape_received
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.client_round import aggregation_key
from fedvlm_jax.federation.simulator import start_adapter
from fedvlm_jax.methods import Context, Method
from fedvlm_jax.models import Vlm, read_vlm
from fedvlm_jax.training.round_setup import build_programs, check_fit, check_grids, choose_program_options
from fedvlm_jax.utils import tree


@dataclass(frozen=True, eq=False)
class ServerProgram:
    """A method's part of a round that is the server's.

    Attributes:
        method: of the plan's run.
        start: the server's state that the run begins with, a function of the seed.
        key: the run's.
        received: shapes of what a client receives.
    """

    plan: Plan
    vlm: Vlm
    method: Method
    start: PyTree
    key: Array
    received: PyTree

    def broadcast(self, server: PyTree, number: int, last: PyTree | None) -> PyTree:
        """Make what client `number` receives; `last` is what it sent last, None before it has sent anything."""
        return jax.device_get(self._broadcast(server, jnp.int32(number), last))

    def aggregate(
        self, server: PyTree, messages: PyTree, weights: np.ndarray, numbers: np.ndarray, round_: int
    ) -> tuple[PyTree, dict[str, float], bool]:
        """Aggregate messages [K, …] of these clients [K]; return the state, the aggregation's metrics, is it finite?"""
        phase = self.method.phase(round_)
        new, health, finite = self._aggregate(
            server, messages, weights, numbers, jnp.int32(round_), self.key, phase=phase
        )
        return jax.device_get(new), {name: float(value) for name, value in health.items()}, bool(finite)

    def message(self, phase: int) -> PyTree:
        """Return the shapes of a client's message in rounds of a phase."""
        return shape_message(self.method, self.vlm.shapes(), self.start, self.plan.run.train, phase)

    @cached_property
    def _broadcast(self) -> Callable[..., PyTree]:
        method = self.method
        return jax.jit(lambda server, number, last: method.broadcast(server=server, number=number, last=last))

    @cached_property
    def _aggregate(self) -> Callable[..., Any]:
        method = self.method

        def aggregate(
            server: PyTree, messages: PyTree, weights: Array, numbers: Array, round_: Array, key: Array, phase: int
        ) -> tuple[PyTree, dict[str, Array], Array]:
            drawn = aggregation_key(key, round_)
            ctx = Context({}, round_, phase, {}, _refuse, drawn, numbers=numbers)
            new, health = method.aggregate(ctx, server=server, messages=messages, weights=weights)
            return new, health, tree.is_finite(new)

        return jax.jit(aggregate, static_argnames="phase")


def _refuse(*args: Any, **choices: Any) -> Any:
    raise AssertionError("a server trains nothing")


def open_server_program(plan: Plan, model: str) -> ServerProgram:
    """Make a plan's server for the model whose configuration is in this folder; raises what `open_method` does."""
    vlm, method = open_method(plan, model)
    key = jax.random.key(plan.run.seed)
    start = method.init(adapter=start_adapter(key, vlm.sites, make_spec(plan.run, vlm)))
    return ServerProgram(plan, vlm, method, jax.device_get(start), key, shape_received(method, start))


def open_method(plan: Plan, model: str) -> tuple[Vlm, Method]:
    """Read the configuration of a plan's model and set its method up; nothing is computed.

    Raises:
        UserError: the model is not there, or does not fit the options; or the plan asks for what the method cannot do.
    """
    run = plan.run
    vlm = read_vlm(model)
    check_agreed(run, vlm)
    check_fit(run, vlm)
    if run.image_pixels is not None:
        check_grids(run, vlm, run.image_pixels, "--image-pixels")
    programs = build_programs(
        vlm, make_mesh(1), choose_program_options(run), plan.clients, plan.cohort, plan.cohort, run.train.local_steps
    )
    method = programs.method
    if plan.secure and not method.linear:
        raise UserError(
            f"--secure: the server of {method.name} needs every client's message, and a secure sum gives it the mean "
            "alone; leave it out, or choose a method that averages, such as plora"
        )
    return vlm, method
