"""An attacker's view of a client: base, server's state, message, and the private factor as far as it is known.

Three of them, each with more than the one before: the server alone, which takes for the private factor what the run
starts from (`start`); the server with all other clients of the audit, which takes the mean of theirs (`others`); and
one that has the client's own factor as the run stored it in the end (`own`), which bounds what a better guess could do.
Where a method has no private factor, or everybody knows it, there is the first alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.data.batches import pad_rows
from fedvlm_jax.methods import Method
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives import Objective
from fedvlm_jax.utils import tree

START, OTHERS, OWN = "start", "others", "own"
Known = Mapping[str, PyTree | None]
"""Who knows what of a client's private factor, by name; None for the run's start."""
Inputs = Callable[[np.ndarray], dict[str, np.ndarray]]


class Probed(NamedTuple):
    """Numbers of every row [N] against one message: its loss without and with it, and the two vectors' product.

    Attributes:
        before, after: the loss at the server's state before the round, and with the client's message added.
        aligned: the cosine of minus the row's gradient, by the message, and the message; 0 where either is 0.
    """

    before: Float[np.ndarray, " rows"]
    after: Float[np.ndarray, " rows"]
    aligned: Float[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class Attacker:
    """The attacks on a message, as compiled functions.

    Attributes:
        vlm, objective, params: of the run; the base is public, and here without what a method adds to it.
        method: the run's, with a start that is common to all clients, which is what is known of them.
        inputs: rows -> a batch.
        batch: rows at a time.
    """

    vlm: Vlm
    objective: Objective
    params: PyTree
    method: Method
    inputs: Inputs
    batch: int

    def assemble(self, server: PyTree, message: PyTree, private: PyTree | None) -> lora.Adapter:
        """Make the adapter that an attacker takes for the client's at the end of its training."""
        personal = self.method.init_client(key=jax.random.key(0), server=server, number=jnp.int32(0))
        adapter = self.method.trained(server=server, personal=personal, message=message)
        if private is None:
            return adapter
        assert self.method.split is not None
        return lora.combine(self.method.split(adapter)[0], private)

    @cached_property
    def assemble_quickly(self) -> Callable[[PyTree, PyTree, PyTree | None], lora.Adapter]:
        """Return `assemble`, compiled."""
        return jax.jit(self.assemble)

    def probe(self, rows: np.ndarray, server: PyTree, message: PyTree, private: PyTree | None) -> Probed:
        """Attack a message with candidate rows."""
        found = self._run(partial(self._probe, server, message, private), rows, self.base_at(server))
        return Probed(*found)

    def score_base(self, rows: np.ndarray) -> Float[np.ndarray, " rows"]:
        """Compute the bare base's loss of rows: what tells them apart without any message."""
        return self._run(self._base_loss, rows, self.params)[0]

    def base_at(self, server: PyTree) -> PyTree:
        """Return the base as the method has it with this state of the server."""
        return self.params if self.method.base is None else self.method.base(params=self.params, server=server)

    def _run(self, program: Callable[..., Sequence[Array]], rows: np.ndarray, params: PyTree) -> list[np.ndarray]:
        parts = []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            found = program(params, self.inputs(pad_rows(part, self.batch)))
            parts.append([np.asarray(values, np.float64)[: len(part)] for values in found])
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _loss(self, params: PyTree, adapter: PyTree, row: Mapping[str, Array]) -> Array:
        one = {name: values[None] for name, values in row.items()}
        return self.objective.loss(self.vlm, params, adapter, one)[0]

    @cached_property
    def _base_loss(self) -> Callable[..., Any]:
        def score(params: PyTree, batch: Mapping[str, Array]) -> tuple[Array]:
            return (jax.vmap(lambda row: self._loss(params, None, row))(dict(batch)),)

        return jax.jit(score)

    @cached_property
    def _probe(self) -> Callable[..., Any]:
        def probe(
            server: PyTree, message: PyTree, private: PyTree | None, params: PyTree, batch: Mapping[str, Array]
        ) -> tuple[Array, Array, Array]:
            flat = tree.flatten(message)
            moving = {path: leaf for path, leaf in flat.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}

            def lose(update: dict[str, Array], row: Mapping[str, Array]) -> Array:
                adapter = self.assemble(server, tree.unflatten({**flat, **update}), private)
                return self._loss(params, adapter, row)

            def attack(row: Mapping[str, Array]) -> tuple[Array, Array, Array]:
                nothing = jax.tree.map(jnp.zeros_like, moving)
                before, gradient = jax.value_and_grad(lose)(nothing, row)
                return before, lose(moving, row), _cosine(gradient, moving)

            return jax.vmap(attack)(dict(batch))

        return jax.jit(probe)


def _cosine(gradient: Mapping[str, Array], message: Mapping[str, Array]) -> Array:
    """Compute the cosine of minus a gradient and a message over all their leaves; 0 where one of them is 0."""
    product = -sum(jnp.vdot(gradient[path], message[path]) for path in message)
    norms = [jnp.sqrt(sum(jnp.vdot(part[path], part[path]) for path in message)) for part in (gradient, message)]
    return product / jnp.maximum(norms[0] * norms[1], 1e-30)


def list_known(method: Method, shared: PyTree, adapters: Mapping[int, lora.Adapter], number: int) -> Known:
    """List what the attackers know of a client's private factor.

    Args:
        method: the run's.
        shared: what the server shares, or its shapes.
        adapters: of all clients of the audit, as the run left them.
        number: the client.
    """
    known: dict[str, PyTree | None] = {START: None}
    if method.split is None:
        return known
    # A method that assembles its adapter of other leaves has no place for a factor of the assembled one.
    parts = {other: method.split(adapter) for other, adapter in adapters.items()}
    public, private = parts[number]
    if not tree.flatten(private) or tree.flatten(public).keys() != tree.flatten(shared).keys():
        return known
    others = [part for other, (_, part) in parts.items() if other != number]
    if all(_equal(private, other) for other in others):
        return known  # frozen, and common to all
    if others:
        known[OTHERS] = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *others)
    return {**known, OWN: private}


def _equal(one: PyTree, other: PyTree) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
