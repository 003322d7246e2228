"""The personal states of all clients, on the host: only a round's cohort is ever on the device."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, PyTree

__all__ = ["Population"]


class Population:
    """Personal states as arrays [C, …] in host memory, and who has one already.

    A client's rows change only through `scatter` with its own number: whoever is not in a cohort keeps its state to the
    bit. Rows of clients that are not `known` are zeros and mean nothing.
    """

    states: PyTree
    known: Bool[np.ndarray, " clients"]

    def __init__(self, shapes: PyTree, clients: int) -> None:
        """Make room for `clients` states of the given shapes (a tree of `jax.ShapeDtypeStruct`)."""
        self.states = jax.tree.map(lambda leaf: np.zeros((clients, *leaf.shape), leaf.dtype), shapes)
        self.known = np.zeros(clients, bool)

    def __len__(self) -> int:
        return len(self.known)

    def gather(self, numbers: Sequence[int] | np.ndarray) -> PyTree:
        """The states of these clients, copied: [K, …]."""
        at = np.asarray(numbers)
        return jax.tree.map(lambda leaf: leaf[at], self.states)

    def scatter(self, numbers: Sequence[int] | np.ndarray, states: PyTree) -> None:
        """Write these clients' states [K, …] back; they are known from now on."""
        at = np.asarray(numbers)

        def write(leaf: np.ndarray, new: Any) -> None:
            leaf[at] = np.asarray(new)[: len(at)]

        jax.tree.map(write, self.states, states)
        self.known[at] = True
