"""A method's programs on a mesh: made once for all runs that share it, compiled once for every shape."""

import re
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from fedvlm_jax.federation.diagnostics import examine
from fedvlm_jax.federation.local_training import LocalTrainer
from fedvlm_jax.federation.memory import TooLargeError
from fedvlm_jax.federation.round import RoundArguments, from_waves, make_round, start_personal
from fedvlm_jax.methods import Method
from fedvlm_jax.methods.base import Base
from fedvlm_jax.utils import tree

EXAMINE = jax.jit(examine, static_argnames=("beside", "component"))
"""One program for all methods whose clients train adapters of the same shapes: compiling it takes seconds."""

Around = Callable[[], AbstractContextManager[None]]
"""Make the context that is entered while a program is compiled."""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """A method's compiled functions on a mesh; made once, whatever the seed, the clients or the learning rates.

    Attributes:
        method, mesh: of the run.
        round: see `make_round`.
        start: (key, server, numbers [V]) -> the states [V, …] that clients begin with.
        personalise: (server, states [V, …], known [V], numbers [V], key) -> adapters [V, …]; clients that are not known
            have the states that they would begin with.
        trained: (server before the round, states [V, …], messages [V, …]) -> adapters [V, …] as they were trained.
        health: (server before the round, states [W, V, …], messages [K, …], weights [K]) -> see `diagnostics.examine`.
        base_is_finite: (params, server) -> whether the base is, with what the method adds to it.
        compiled: rounds by phase and shapes.
    """

    method: Method
    mesh: Mesh
    round: Any
    start: Callable[..., PyTree]
    personalise: Callable[..., PyTree]
    trained: Callable[..., PyTree]
    health: Callable[..., dict[str, Any]]
    base_is_finite: Callable[[PyTree, PyTree], Any]
    compiled: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)

    @property
    def base(self) -> Base | None:
        """The method's change of the base; not jitted: a program would return copies of the weights that stay."""
        return self.method.base

    def compile_round(self, arguments: RoundArguments, phase: int, around: Around = nullcontext) -> Any:
        """Compile the round for arguments of these shapes, once; `around` is entered where it has to be.

        Raises:
            TooLargeError: the compiler finds that it does not fit on a device.
        """
        key = (phase, jax.tree.structure(arguments), *((x.shape, x.dtype) for x in jax.tree.leaves(arguments)))
        if key not in self.compiled:
            try:
                with around():
                    self.compiled[key] = self.round.lower(*arguments, phase=phase).compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise TooLargeError(_find_reason(str(error))) from error
        return self.compiled[key]


def make_programs(
    method: Method, trainer: LocalTrainer, mesh: Mesh, component: Callable[[str], str | None] = lambda path: None
) -> Programs:
    """Make a method's programs, not compiled yet; `health` tells parts of the model apart as `component` does."""

    def adapter_of(server: PyTree, state: PyTree, known: Any, number: Any, key: PRNGKeyArray) -> PyTree:
        fresh = start_personal(method, key, server, number)
        state = jax.tree.map(lambda new, old: jnp.where(known, old, new), fresh, state)
        return method.personalise(server=server, personal=state)

    def trained_of(server: PyTree, state: PyTree, message: PyTree) -> PyTree:
        return method.trained(server=server, personal=state, message=message)

    trained = jax.vmap(trained_of, in_axes=(None, 0, 0))
    trained_of_waves = jax.jit(lambda server, waves, messages: trained(server, from_waves(waves), messages))

    def health(server: PyTree, waves: PyTree, messages: PyTree, weights: Any) -> dict[str, Any]:
        return EXAMINE(trained_of_waves(server, waves, messages), weights, beside=method.pairs, component=component)

    def base_is_finite(params: PyTree, server: PyTree) -> Any:
        return tree.is_finite(params if method.base is None else method.base(params=params, server=server))

    return Programs(
        method=method,
        mesh=mesh,
        round=make_round(method, trainer, mesh),
        start=jax.jit(jax.vmap(partial(start_personal, method), in_axes=(None, None, 0))),
        personalise=jax.jit(jax.vmap(adapter_of, in_axes=(None, 0, 0, 0, None))),
        trained=jax.jit(trained),
        health=health,
        base_is_finite=jax.jit(base_is_finite),
    )


def _find_reason(message: str) -> str:
    """Select the line with the sizes of what a compiler says, or the first."""
    lines = message.splitlines()
    return next((line for line in lines if re.search(r"Used \S+ of \S+", line)), lines[0])
