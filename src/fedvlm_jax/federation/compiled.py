"""A method's programs on a mesh: built once for all runs that share it, compiled once for every shape."""

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
from fedvlm_jax.federation.round import from_waves, make_round, start_personal
from fedvlm_jax.methods import Method
from fedvlm_jax.utils import tree

__all__ = ["Around", "Programs", "make_programs"]

EXAMINE = jax.jit(examine, static_argnames="beside")
"""One program for all methods whose clients train adapters of the same shapes: compiling it takes seconds."""

Around = Callable[[], AbstractContextManager[None]]
"""Makes what is entered while a program is compiled."""


@dataclass(frozen=True)
class Programs:
    """A method's compiled functions on a mesh; made once, whatever the seed, the clients or the learning rates.

    `health` takes personal states as the round returns them, [W, V, …], and messages [K, …]; `start` makes the states
    that clients begin with.
    """

    method: Method
    mesh: Mesh
    round: Any
    start: Callable[..., PyTree]
    personalise: Callable[..., PyTree]
    trained: Callable[..., PyTree]
    health: Callable[..., dict[str, Any]]
    base: Callable[[PyTree, PyTree], PyTree] | None
    base_is_finite: Callable[[PyTree, PyTree], Any]
    compiled: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)

    def compile_round(self, arguments: tuple[Any, ...], phase: int, around: Around = nullcontext) -> Any:
        """The round for arguments of these shapes, compiled once; `around` is entered where it has to be.

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

    def find_compiled(self, phase: int) -> Any:
        """The round of this phase that was compiled last."""
        return next(self.compiled[key] for key in reversed(self.compiled) if key[0] == phase)


def make_programs(method: Method, trainer: LocalTrainer, mesh: Mesh) -> Programs:
    """Build (not yet compile) a method's programs."""

    def adapter_of(server: PyTree, state: PyTree, known: Any, number: Any, key: PRNGKeyArray) -> PyTree:
        fresh = start_personal(method, key, server, number)
        state = jax.tree.map(lambda new, old: jnp.where(known, old, new), fresh, state)
        return method.personalise(server, state)

    trained = jax.vmap(method.trained, in_axes=(None, 0, 0))
    trained_of_waves = jax.jit(lambda server, waves, messages: trained(server, from_waves(waves), messages))

    def health(server: PyTree, waves: PyTree, messages: PyTree, weights: Any) -> dict[str, Any]:
        return EXAMINE(trained_of_waves(server, waves, messages), weights, beside=method.pairs)

    def base_is_finite(params: PyTree, server: PyTree) -> Any:
        return tree.is_finite(params if method.base is None else method.base(params, server))

    return Programs(
        method,
        mesh,
        make_round(method, trainer, mesh),
        jax.jit(jax.vmap(partial(start_personal, method), in_axes=(None, None, 0))),
        jax.jit(jax.vmap(adapter_of, in_axes=(None, 0, 0, 0, None))),
        jax.jit(trained),
        health,
        method.base,  # not jitted: a compiled program would return copies of the weights that it leaves alone
        jax.jit(base_is_finite),
    )


def _find_reason(told: str) -> str:
    """Of what a compiler says, the line with the sizes, or the first."""
    lines = told.splitlines()
    return next((line for line in lines if re.search(r"Used \S+ of \S+", line)), lines[0])
