"""The server's part of a deployment: the start, what it broadcasts, and the aggregate. No weights, no data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fedvlm_jax.config.method_checks import check_rule
from fedvlm_jax.config.method_setup import make_setup, make_spec
from fedvlm_jax.deployment.plan import Plan
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.client_round import aggregation_key, start_personal
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round_shapes import shape_client
from fedvlm_jax.federation.simulator import start_adapter
from fedvlm_jax.methods import Context, Method, load_method
from fedvlm_jax.models import Vlm, read_vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.training.round_setup import deal_ranks
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
        return self._message(phase)

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

    @cached_property
    def _message(self) -> Callable[[int], PyTree]:
        method, train = self.method, self.plan.run.train
        view = jax.eval_shape(
            lambda start, received: method.view(start=start, received=received), self.start, self.received
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        personal = jax.eval_shape(partial(start_personal, method), self.key, view, number)
        client = shape_client({}, 1, max(1, train.local_steps), train.batch_size)

        def update(server: PyTree, personal: PyTree, client: Any, key: Array, phase: int) -> PyTree:
            ctx = Context({}, jnp.int32(1), phase, {"a": jnp.float32(0), "b": jnp.float32(0)}, _stay, key)
            return method.client_update(ctx, server=server, personal=personal, client=client, key=key)[1]

        return lambda phase: jax.eval_shape(partial(update, phase=phase), view, personal, client, self.key)


def _stay(factors: PyTree, optimizer: PyTree, client: Any, **choices: Any) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Train nothing: messages have the same shapes, and no model is traced."""
    del client, choices
    return factors, optimizer, dict.fromkeys(("loss", "last_loss", "gradient_norm", "steps"), jnp.float32(0))


def _refuse(*args: Any, **choices: Any) -> Any:
    raise AssertionError("a server trains nothing")


def open_server_program(plan: Plan, model: str) -> ServerProgram:
    """Make a plan's server for the model whose configuration is in this folder; raises what `open_method` does."""
    vlm, method = open_method(plan, model)
    key = jax.random.key(plan.run.seed)
    start = method.init(adapter=start_adapter(key, vlm.sites, make_spec(plan.run, vlm)))
    received = jax.eval_shape(lambda server: method.broadcast(server=server, number=jnp.int32(0), last=None), start)
    return ServerProgram(plan, vlm, method, jax.device_get(start), key, received)


def open_method(plan: Plan, model: str) -> tuple[Vlm, Method]:
    """Read the configuration of a plan's model and set its method up; nothing is computed.

    Raises:
        UserError: the model is not there, or does not fit the options; or the plan asks for what the method cannot do.
    """
    run = plan.run
    vlm = read_vlm(model)
    if vlm.bind is not None:
        raise UserError(f"{model} chooses among the answers of its data, which differ between nodes: not deployed")
    check_rule(run, vlm)
    trainer = make_local_trainer(
        vlm, load_objective(run.objective, run.preference), optimizer=run.train.optimizer,
        weight_decay=run.train.weight_decay,
    )  # fmt: skip
    setup = replace(
        make_setup(run, vlm, trainer.start), population=plan.clients, cohort=plan.cohort, places=plan.cohort,
        local_steps=run.train.local_steps, ranks=deal_ranks(run.lora.ranks, plan.clients),
    )  # fmt: skip
    method = load_method(run.method, setup)
    if plan.secure and not method.linear:
        raise UserError(
            f"--secure: the server of {method.name} needs every client's message, and a secure sum gives it the mean "
            "alone; leave it out, or choose a method that averages, such as plora"
        )
    return vlm, method
