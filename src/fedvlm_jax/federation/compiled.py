"""A method's programs on a mesh: made once for all runs that share it, compiled once for every shape."""

import re
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from fedvlm_jax.federation.client_round import make_client_round, start_personal
from fedvlm_jax.federation.diagnostics import Component, examine
from fedvlm_jax.federation.local_training import LocalTrainer
from fedvlm_jax.federation.memory import TooLargeError
from fedvlm_jax.federation.round import RoundArguments, from_waves, make_round
from fedvlm_jax.methods import Method
from fedvlm_jax.utils import tree

# One program for all methods whose clients train adapters of the same shapes: compiling it takes seconds.
EXAMINE = jax.jit(examine, static_argnames=("beside", "component"))

Around = Callable[[], AbstractContextManager[None]]  # makes the context in which a program is compiled


class Programs:
    """A method's compiled functions on a mesh; made once, whatever the seed, the clients or the learning rates.

    Attributes:
        method, mesh, round: of the run, and see `make_round`.
        client_round: see `make_client_round`, for a client that is alone on its machine.
        start: (key, server, numbers [V]) -> the states [V, …] that clients begin with.
        personalise: (server, states [V, …], known [V], numbers [V], key) -> adapters [V, …]; clients that are not known
            have the states that they would begin with.
        trained: (server before the round, states [V, …], messages [V, …]) -> adapters [V, …] as they were trained.
        base_is_finite: (params, server) -> whether the base is, with what the method adds to it.
        base: the method's change of the base; not jitted: a program would return copies of the weights that stay.
        compiled: rounds by phase and shapes.
    """

    def __init__(
        self, method: Method, trainer: LocalTrainer, mesh: Mesh, component: Component = lambda path: None
    ) -> None:
        """Make a method's programs, not compiled yet; `component` tells parts of the model apart in `health`."""

        def personalise(server: PyTree, state: PyTree, known: Any, number: Any, key: PRNGKeyArray) -> PyTree:
            fresh = start_personal(method, key, server, number)
            state = jax.tree.map(lambda new, old: jnp.where(known, old, new), fresh, state)
            return method.personalise(server=server, personal=state)

        def trained(server: PyTree, state: PyTree, message: PyTree) -> PyTree:
            return method.trained(server=server, personal=state, message=message)

        def base_is_finite(params: PyTree, server: PyTree) -> Any:
            return tree.is_finite(params if method.base is None else method.base(params=params, server=server))

        trained_of_all = jax.vmap(trained, in_axes=(None, 0, 0))
        self.method, self.mesh, self.base = method, mesh, method.base
        self.round = make_round(method, trainer, mesh)
        self.client_round = jax.jit(make_client_round(method, trainer), static_argnames="phase")
        self.start = jax.jit(jax.vmap(partial(start_personal, method), in_axes=(None, None, 0)))
        self.personalise = jax.jit(jax.vmap(personalise, in_axes=(None, 0, 0, 0, None)))
        self.trained = jax.jit(trained_of_all)
        self.base_is_finite = jax.jit(base_is_finite)
        self.compiled: dict[tuple[Hashable, ...], Any] = {}
        self._trained_of_waves = jax.jit(lambda server, waves, sent: trained_of_all(server, from_waves(waves), sent))
        self._component = component

    def health(self, server: PyTree, states: PyTree, messages: PyTree, weights: Any) -> dict[str, Any]:
        """Examine a round (see `diagnostics`): the server before it, states [W, V, …], messages [K, …], weights [K]."""
        adapters = self._trained_of_waves(server, states, messages)
        return EXAMINE(adapters, weights, beside=self.method.pairs, component=self._component)

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
                lines = str(error).splitlines()
                sizes = (line for line in lines if re.search(r"Used \S+ of \S+", line))
                raise TooLargeError(next(sizes, lines[0])) from error
        return self.compiled[key]
