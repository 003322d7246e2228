"""A method's functions traced on shapes: which tensors a round trains, sends, receives and keeps.

Local training is replaced by a stand-in that notes what it is given to train. Nothing is computed, and no method is
known by name. Axes: K clients of the cohort.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax.federation.communication import count_bytes, find_travelling
from fedvlm_jax.federation.round_shapes import shape_client, shape_key
from fedvlm_jax.methods import Client, Context, Method
from fedvlm_jax.methods.base import is_factor, shape_of_one
from fedvlm_jax.models import Vlm
from fedvlm_jax.utils import tree

OPTIMIZER = "the optimiser's state"
"""A mark around every optimiser state that a method asks for, so it is found again wherever the method keeps it."""


@dataclass(frozen=True)
class Held:
    """A leaf, or some layers of one, in what is sent, received or kept.

    Attributes:
        place: where the method has it, `control` say; left out of what travels where all of that is in one place.
        layers: which, where a rule splits the stack; empty for all.
        times: how many clients' it is.
    """

    place: str
    layers: tuple[str, ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Tensor:
    """One leaf at one site, in the rounds of one phase.

    Attributes:
        group, name: the site's path and the leaf's name; a leaf that is at no site has no group.
        shape: stacked axes first.
        stack: how many of its axes those are.
        trained: how many copies of it a client trains; 0: it is frozen.
        sent, received, kept: in which places.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    stack: int
    trained: int
    sent: tuple[Held, ...]
    received: tuple[Held, ...]
    kept: tuple[Held, ...]


@dataclass(frozen=True)
class Stage:
    """The rounds of one phase.

    Attributes:
        rounds: which of the run.
        tensors: what there is, by path.
        trained: numbers that a client trains in such a round.
        up, down: bytes per client, the mean over the clients.
        by_rank: rank -> bytes up and down of a client of that rank; empty where all have the same.
    """

    rounds: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    trained: int
    up: int
    down: int
    by_rank: Mapping[int, tuple[int, int]]


class _Training:
    """Stands in for local training: what it is given to train comes back changed, and is noted.

    Several calls may go on with the same factors, and then these are trained once, not several times: who passes in
    what an earlier call gave back goes on.
    """

    def __init__(self) -> None:
        self.copies: dict[str, list[Any]] = {}  # path -> the newest value of every copy that is trained
        self.seen: dict[str, Any] = {}  # path -> shape, of everything that local training was given

    def __call__(
        self, factors: PyTree, optimizer: PyTree, client: Client, *, trained: Any = is_factor, **_: Any
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        moving, frozen = tree.partition(factors, trained)
        moved: dict[str, Any] = {}
        for path, leaf in tree.flatten(moving).items():
            moved[path] = leaf + 1
            copies = self.copies.setdefault(path, [])
            at = next((number for number, copy in enumerate(copies) if copy is leaf), len(copies))
            copies[at : at + 1] = [moved[path]]
        self.seen |= tree.flatten(factors)
        zero = jnp.zeros(())
        steps = client.mask.any(axis=-1).sum() * 1.0
        metrics = {"loss": zero, "last_loss": zero, "gradient_norm": zero, "token_accuracy": zero, "steps": steps}
        return tree.combine(tree.unflatten(moved), frozen), optimizer, metrics


@dataclass(frozen=True)
class Tracer:
    """A method on a model, ready to be traced.

    Attributes:
        method, vlm: which.
        steps, batch: of local training.
        server, personal: shapes of the states.
        cohort: K.
        ranks: of all clients, or empty.
        sites: path of every adapted site -> how many stacked axes it has.
    """

    method: Method
    vlm: Vlm
    steps: int
    batch: int
    server: PyTree
    personal: PyTree
    cohort: int
    ranks: tuple[int, ...]
    sites: Mapping[str, int]

    def stage(self, phase: int, rounds: tuple[int, ...]) -> Stage:
        """Trace a round of this phase."""
        training = _Training()
        kept, message = self._trace_client(phase, training)
        messages = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.cohort, *leaf.shape), leaf.dtype), message)
        up, down = find_travelling(self.method, self.server, messages)
        sizes = {path: leaf.size for path, leaf in training.seen.items()}
        state = {path: leaf for path, leaf in flatten_state(self.personal).items() if path in kept}
        moved = [self._locate(flatten_state(part), sizes) for part in (up, down)]
        places = [*(_leave_out_the_common(found) for found in moved), self._locate(state, sizes)]
        tensors: list[Tensor] = []
        for path, leaf in training.seen.items():
            group, _, name = path.rpartition("/")
            stack = self.sites.get(group, 0)
            copies = len(training.copies.get(path, ()))
            if len(leaf.shape) <= stack and not copies:
                continue  # a scale: data, one number a layer
            sent, received, own = (found.get(path, ()) for found in places)
            tensors.append(Tensor(group, name, leaf.shape, stack, copies, sent, received, own if copies else ()))
        share = sum(self.ranks) / len(self.ranks) / max(self.ranks) if self.ranks else 1.0
        return Stage(
            rounds=rounds,
            tensors=tuple(tensors),
            trained=sum(copy.size for copies in training.copies.values() for copy in copies),
            up=count_bytes(up, share),
            down=count_bytes(down, share),
            by_rank={
                rank: (count_bytes(up, rank / max(self.ranks)), count_bytes(down, rank / max(self.ranks)))
                for rank in sorted(set(self.ranks))
            },
        )

    def _trace_client(self, phase: int, training: _Training) -> tuple[set[str], PyTree]:
        """-> paths in the personal state that a round changes, and the message."""

        def update(personal: PyTree, params: PyTree, server: PyTree, client: Client, number: Any, key: Any) -> Any:
            rate = jnp.zeros(())
            rates = {"a": rate, "b": rate}
            ctx = Context(params=params, round=number, phase=phase, rates=rates, train=training, key=key)
            personal, message, _ = self.method.client_update(
                ctx, server=server, personal=personal, client=client, key=key
            )
            return personal, message

        example = shape_of_one(self.vlm.example_batch())
        client = shape_client(example, self.batch, self.steps, self.batch)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        arguments = (self.vlm.shapes(), self.server, client, number, shape_key())
        changed, (_, message) = _trace(update, self.personal, *arguments)
        return changed, message

    def _locate(self, part: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, tuple[Held, ...]]:
        """path of a tensor -> where a tree has it."""
        found: dict[str, dict[str, list[tuple[str, int]]]] = {}
        longest_first = sorted(self.sites, key=len, reverse=True)
        for path, leaf in part.items():
            site = next((site for site in longest_first if f"/{site}/" in f"/{path}"), None)
            if OPTIMIZER in path:
                continue
            if site is None:  # a leaf that belongs to no site, such as one number for all
                before, _, name = path.rpartition("/")
                where, layer = found.setdefault(name, {}).setdefault(before, []), ""
            else:
                before, _, after = f"/{path}".partition(f"/{site}/")
                name, _, layer = after.partition("/")
                where = found.setdefault(f"{site}/{name}", {}).setdefault(before.strip("/"), [])
            where.append((layer, leaf.size))
        return {
            path: tuple(
                Held(
                    place,
                    tuple(layer for layer, _ in leaves if layer),
                    1 if leaves[0][0] else max(1, leaves[0][1] // sizes.get(path, leaves[0][1])),
                )
                for place, leaves in places.items()
            )
            for path, places in found.items()
        }


def _leave_out_the_common(found: Mapping[str, tuple[Held, ...]]) -> Mapping[str, tuple[Held, ...]]:
    """Leave out the place where all that travels is in one."""
    if len({held.place for several in found.values() for held in several}) > 1:
        return found
    return {path: tuple(replace(held, place="") for held in several) for path, several in found.items()}


def _trace(function: Callable[..., tuple[Any, ...]], state: PyTree, *arguments: Any) -> tuple[set[str], Any]:
    """-> paths of the leaves of `state` that do not come back as they are as the first result, and all results."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(state, *arguments)
    before, after = list(flatten_state(state)), list(flatten_state(shapes[0]))
    came = dict(zip(before, traced.jaxpr.invars, strict=False))
    went = dict(zip(after, traced.jaxpr.outvars, strict=False))
    return {path for path in after if went[path] is not came.get(path)}, shapes


def flatten_state(part: PyTree) -> dict[str, Any]:
    """path -> leaf in JAX's own order, of any tree: dictionaries, tuples, records of optimisers."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
    }
