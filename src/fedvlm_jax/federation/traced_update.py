"""A client's update traced on shapes: what local training is given to train, what is kept and what is sent.

Local training is replaced by a stand-in that notes what it is given. Nothing is computed, and no method is known by
name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.round_shapes import shape_client, shape_key
from fedvlm_jax.methods import Client, Context, Method
from fedvlm_jax.methods.base import is_factor, shape_of_one
from fedvlm_jax.models import Vlm
from fedvlm_jax.utils import tree


@dataclass(frozen=True)
class TracedUpdate:
    """A client's update in the rounds of a phase.

    Attributes:
        seen: path -> shape, of everything that local training was given.
        copies: path -> how many copies of it are trained; what is frozen is left out.
        changed: paths in the personal state that the update changes.
        message: shapes of what is sent.
    """

    seen: Mapping[str, jax.ShapeDtypeStruct]
    copies: Mapping[str, int]
    changed: frozenset[str]
    message: PyTree

    @property
    def trained(self) -> int:
        """Return how many numbers the client trains."""
        return sum(count * self.seen[path].size for path, count in self.copies.items())


class _Training:
    """Stand-in for local training: what it is given to train comes back changed, and is noted.

    Several calls may go on with the same factors, and then these are trained once, not several times: a call that is
    given what an earlier call gave back goes on.
    """

    def __init__(self) -> None:
        self.copies: dict[str, list[Any]] = {}  # path -> the newest value of every copy that is trained
        self.seen: dict[str, Any] = {}  # path -> the newest value, of everything that local training was given

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
        metrics: dict[str, Any] = {
            name: jnp.zeros(()) for name in ("loss", "last_loss", "gradient_norm", "token_accuracy")
        }
        metrics["steps"] = client.mask.any(axis=-1).sum() * 1.0
        return tree.combine(tree.unflatten(moved), frozen), optimizer, metrics


def trace_update(
    method: Method, vlm: Vlm, server: PyTree, personal: PyTree, phase: int, *, steps: int, batch: int
) -> TracedUpdate:
    """Trace a client's update in a round of this phase.

    Args:
        method, vlm: the method, made for the model.
        server, personal: shapes of the states.
        phase: see `Method.phase`.
        steps, batch: local steps, and examples in each.
    """
    training = _Training()

    def update(personal: PyTree, params: PyTree, server: PyTree, client: Client, number: Any, key: Any) -> Any:
        rates = {"a": jnp.zeros(()), "b": jnp.zeros(())}
        ctx = Context(params=params, round=number, phase=phase, rates=rates, train=training, key=key)
        return method.client_update(ctx, server=server, personal=personal, client=client, key=key)[:2]

    client = shape_client(shape_of_one(vlm.example_batch()), batch, steps, batch)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    traced, (after, message) = jax.make_jaxpr(update, return_shape=True)(
        personal, vlm.shapes(), server, client, number, shape_key()
    )
    # What comes back as it is, is the same variable of the trace.
    came = dict(zip(flatten_state(personal), traced.jaxpr.invars, strict=False))
    went = dict(zip(flatten_state(after), traced.jaxpr.outvars, strict=False))
    return TracedUpdate(
        seen={path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in training.seen.items()},
        copies={path: len(copies) for path, copies in training.copies.items()},
        changed=frozenset(path for path, variable in went.items() if variable is not came.get(path)),
        message=message,
    )


def count_trained(method: Method, vlm: Vlm, adapter: lora.Adapter, rounds: int, *, steps: int, batch: int = 1) -> int:
    """Count the numbers that a client trains in a round; of rounds that differ, those of the one with most.

    A model that a client trains beside another counts too. Where ranks differ between clients, all have the largest.

    Args:
        method, vlm: the method, made for the model.
        adapter: the one to start from, or its shapes.
        rounds: of the run.
        steps, batch: as `trace_update` has them.
    """
    server = jax.eval_shape(lambda adapter: method.init(adapter=adapter), adapter)
    personal = jax.eval_shape(
        lambda key, server: start_personal(method, key, server, jnp.int32(0)), shape_key(), server
    )
    phases = dict.fromkeys(method.phase(number) for number in range(1, rounds + 1))
    traced = (trace_update(method, vlm, server, personal, phase, steps=steps, batch=batch) for phase in phases)
    return max(update.trained for update in traced)


def flatten_state(part: PyTree) -> dict[str, Any]:
    """Return path -> leaf in JAX's order, of any tree: dictionaries, tuples, records of optimisers.

    >>> flatten_state({"control": (1, {"b": 2})})
    {'control/0': 1, 'control/1/b': 2}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
    }
