"""A method's functions traced on shapes: which tensors a round trains, sends, receives and keeps.

A client's update is traced by `federation.traced_update`. Nothing is computed, and no method is known by name. Axes: K
clients of the cohort.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import PyTree

from fedvlm_jax.federation.communication import count_bytes, find_travelling
from fedvlm_jax.federation.traced_update import TracedUpdate, flatten_state, trace_update
from fedvlm_jax.methods import Method
from fedvlm_jax.models import Vlm

OPTIMIZER = "the optimiser's state"
"""A mark around every optimiser state that a method asks for, so it is found again wherever the method keeps it."""


@dataclass(frozen=True)
class Held:
    """A leaf, or some layers of a stacked one, in what is sent, received or kept."""

    place: str  # where the method has it, `control` say; empty where all that travels is in the same place
    layers: tuple[str, ...] = ()  # which, where a rule splits the stack; empty for all
    times: int = 1  # how many clients' it is


@dataclass(frozen=True)
class Tensor:
    """A leaf at a site, in the rounds of a phase."""

    group: str  # the site's path; empty for a leaf that is at no site
    name: str
    shape: tuple[int, ...]  # stacked axes first
    trained: int  # how many copies of it a client trains; 0: it is frozen
    sent: tuple[Held, ...]
    received: tuple[Held, ...]
    kept: tuple[Held, ...]


@dataclass(frozen=True)
class Stage:
    """The rounds of a phase."""

    rounds: tuple[int, ...]  # which of the run
    tensors: tuple[Tensor, ...]
    trained: int  # numbers that a client trains in such a round
    up: int  # bytes per client, the mean over the clients
    whole: int  # bytes up without compression
    down: int
    by_rank: Mapping[int, tuple[int, int]]  # rank -> bytes up and down of such a client; empty where all are alike


@dataclass(frozen=True)
class Tracer:
    """A method on a model, ready to be traced."""

    method: Method
    plain: Method  # the same without compression
    vlm: Vlm
    steps: int  # of local training
    batch: int
    server: PyTree  # shapes of the states
    personal: PyTree
    cohort: int
    ranks: tuple[int, ...]  # of all clients, or empty
    sites: Mapping[str, int]  # path of every site -> how many stacked axes it has

    def stage(self, phase: int, rounds: tuple[int, ...]) -> Stage:
        """Trace a round of this phase."""
        traced = self._trace(phase)
        message, seen = traced.message, traced.seen
        messages = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.cohort, *leaf.shape), leaf.dtype), message)
        up, down = find_travelling(self.method, self.server, messages)
        whole = up if self.plain is self.method else find_travelling(self.plain, self.server, messages)[0]
        state = {path: leaf for path, leaf in flatten_state(self.personal).items() if path in traced.changed}
        sizes = {path: leaf.size for path, leaf in seen.items()}
        # Of what is sent the message tells the tensors: `up` may be in another form, that of compressed numbers.
        sent, received = (_leave_out_common(self._locate(flatten_state(part), sizes)) for part in (message, down))
        kept = self._locate(state, sizes)
        tensors: list[Tensor] = []
        for path, leaf in seen.items():
            group, name, layer = self._split_path(path)
            copies = traced.copies.get(path, 0)
            if len(leaf.shape) <= self.sites.get(group, 0) and not copies:
                continue  # a scale: data, a number per layer
            places = (_find_held(held, path, layer) for held in (sent, received, kept if copies else {}))
            tensors.append(Tensor(group, name, leaf.shape, copies, *places))
        most = max(self.ranks, default=1)
        share = sum(self.ranks) / len(self.ranks) / most if self.ranks else 1.0
        return Stage(
            rounds=rounds,
            tensors=tuple(tensors),
            trained=traced.trained,
            up=count_bytes(up, share),
            whole=count_bytes(whole, share),
            down=count_bytes(down, share),
            by_rank={
                rank: (count_bytes(up, rank / most), count_bytes(down, rank / most)) for rank in sorted(set(self.ranks))
            },
        )

    def message(self, phase: int) -> PyTree:
        """Return the shapes of a client's message in a round of this phase."""
        return self._trace(phase).message

    def _trace(self, phase: int) -> TracedUpdate:
        return trace_update(
            self.method, self.vlm, self.server, self.personal, phase, steps=self.steps, batch=self.batch
        )

    def _split_path(self, path: str) -> tuple[str, str, str]:
        """Return the group of a tensor that is trained, its name, and the layer where it is one of a stack, or ""."""
        group, _, name = path.rpartition("/")
        parent, _, leaf = group.rpartition("/")
        apart = parent in self.sites and group not in self.sites
        return (parent, f"{leaf}/{name}", name) if apart else (group, name, "")

    def _locate(self, part: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, tuple[Held, ...]]:
        """Return path of a tensor -> where a tree has it."""
        found: dict[str, dict[str, list[tuple[str, int]]]] = {}  # tensor -> place -> layers and their sizes
        longest_first = sorted(self.sites, key=len, reverse=True)
        for path, leaf in part.items():
            if OPTIMIZER in path:
                continue
            site = next((site for site in longest_first if f"/{site}/" in f"/{path}"), None)
            if site is None:  # a leaf that belongs to no site, such as a number that all layers share
                known = (name for name in sorted(sizes, key=len, reverse=True) if f"/{path}".endswith(f"/{name}"))
                tensor, layer = next(known, path.rpartition("/")[2]), ""
                place = path.removesuffix(tensor)
            else:
                place, _, after = f"/{path}".partition(f"/{site}/")
                name, _, layer = after.partition("/")
                tensor = f"{site}/{name}"
            found.setdefault(tensor, {}).setdefault(place.strip("/"), []).append((layer, leaf.size))
        located: dict[str, tuple[Held, ...]] = {}
        for path, places in found.items():
            for place, leaves in places.items():
                layer, size = leaves[0]
                times = 1 if layer else max(1, size // sizes.get(path, size))
                held = Held(place, tuple(layer for layer, _ in leaves if layer), times)
                located[path] = (*located.get(path, ()), held)
        return located


def differs_by_client(method: Method, server: PyTree) -> bool:
    """Tell whether numbers that a client receives depend on which client it is, for a server's state or its shapes."""

    def send(server: PyTree, number: Any) -> list[Any]:
        received = method.broadcast(server=server, number=number, last=None)
        return [leaf for leaf in jax.tree.leaves(received) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    traced = jax.make_jaxpr(send)(server, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr
    own = {traced.invars[-1]}
    for step in traced.eqns:  # in the order in which they are computed
        if any(variable in own for variable in step.invars if not isinstance(variable, Literal)):
            own |= {*step.outvars}
    return any(variable in own for variable in traced.outvars if not isinstance(variable, Literal))


def _find_held(found: Mapping[str, tuple[Held, ...]], path: str, layer: str) -> tuple[Held, ...]:
    """Return where a tensor is; of a stack's layer that is trained apart, where this layer is."""
    if not layer:
        return found.get(path, ())
    held = found.get(path.removesuffix(f"/{layer}"), ())
    return tuple(replace(place, layers=()) for place in held if layer in place.layers)


def _leave_out_common(found: Mapping[str, tuple[Held, ...]]) -> Mapping[str, tuple[Held, ...]]:
    """Leave out the place where all that travels is in the same."""
    if len({held.place for several in found.values() for held in several}) > 1:
        return found
    return {path: tuple(replace(held, place="") for held in several) for path, several in found.items()}
