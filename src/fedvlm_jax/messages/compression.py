"""Fewer bytes from the clients: messages rounded to 8 bits, or cut to their largest entries.

A client encodes its message, and what the server makes of that takes the message's place; so everything behind it, the
rules of a pool and the method's `aggregate`, is as it was, and `travels` has the shapes of what was encoded.

`int8` rounds to 255 levels between the smallest and the largest value of a matrix, up or down at random so that the
mean is the value (QSGD, arXiv 1610.02132; here with a scale for each matrix instead of norms of buckets). `top-k` sends
the entries of the whole message that are largest, and adds the others to the client's next update (error feedback:
arXiv 1809.07599, 1901.09847), for which a client keeps what it has not sent yet.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import from_row, round_at_random, to_rows
from fedvlm_jax.methods.base import Client, Context, Key, Method, Number, Travelling, Updated, shape_of_one
from fedvlm_jax.methods.components.factors import norm_of
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.random_streams import Stream

LEVELS = 127  # of int8 on either side of zero; -128 is left out, so that both sides are alike
OWED, UNLIKE = "owed", "unlike"
"""Names in a client's state: what it has not sent yet, and its last update less what it sent in place of it."""

MORE_THAN_UPDATE = "a message is not the update of what is shared, and alone, so the next one cannot make up for it"


class Codec(NamedTuple):
    """A way to write a message with fewer bytes.

    Attributes:
        encode: (message, key) -> a tree of arrays, which is what travels.
        decode: (what was encoded, the message's form: arrays or shapes) -> the message as its receiver has it.
    """

    encode: Callable[[PyTree, Key], PyTree]
    decode: Callable[[PyTree, PyTree], PyTree]


def with_compression(method: Method, options: MessageOptions) -> Method:
    """Have a method's clients send less, as `options.compress` says; where nothing is left out it stays as it is.

    Raises:
        ValueError: what a message leaves out could not be made up for, see `refuse_top_k`.
    """
    if options.compress == "int8":
        return _with_rounding(method)
    if options.compress == "none" or options.keep == 1:
        return method
    if reason := refuse_top_k(method):
        raise ValueError(f"top-k does not go with {method.name}, because {reason}")
    return _with_feedback(method, options.keep)


def make_codec(options: MessageOptions) -> Codec:
    """Make the codec that `options.compress` names, which may not be "none".

    >>> codec = make_codec(MessageOptions(compress="top-k", keep=0.5))
    >>> update = {"b": jnp.asarray([0.1, -4.0, 3.0, 0.2])}
    >>> codec.decode(codec.encode(update, jax.random.key(0)), update)["b"].tolist()
    [0.0, -4.0, 3.0, 0.0]
    """
    if options.compress == "int8":
        return Codec(encode_int8, decode_int8)
    return Codec(lambda message, key: encode_top_k(message, options.keep), decode_top_k)


def refuse_top_k(method: Method) -> str | None:
    """Return why a method's messages cannot be sent in part, to be read after "because"; None if they can."""
    if why := method.refuses.get("top-k") or method.refuses.get("messages"):
        return why
    if method.split is None:
        return MORE_THAN_UPDATE
    return None


def encode_int8(message: PyTree, key: Key) -> PyTree:
    """Round each matrix of a message to int8, at random to the level above or below so that the mean is the value.

    Returns:
        `rounded`, the leaves as int8; `scales`, float32, the size of a level for each matrix in the order of the paths,
        where a stack of layers is as many matrices; `plain`, leaves as they were: integers, and what would not become
        smaller. A matrix that is not finite has a scale that is not either.

    >>> encoded = encode_int8({"b": jnp.asarray([[0.0, -63.5], [31.5, 63.5]])}, jax.random.key(0))
    >>> encoded["rounded"]["b"].tolist(), encoded["scales"].tolist()
    ([[0, -127], [63, 127]], [0.5])
    """
    rounded: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    scales: list[Array] = []
    for number, (path, leaf) in enumerate(tree.flatten(message).items()):
        if not _shrinks(leaf):
            plain[path] = leaf
            continue
        values = leaf.astype(jnp.float32)
        largest = jnp.max(jnp.abs(values), axis=tuple(range(len(_stack(leaf)), leaf.ndim)), keepdims=True)
        # The smallest normal number: below it a division would not be by the scale, and of zeros it would be 0 / 0.
        scale = jnp.maximum(largest / LEVELS, jnp.finfo(jnp.float32).tiny)
        levels = round_at_random(values / scale, jax.random.fold_in(key, number))
        rounded[path] = jnp.clip(levels, -LEVELS, LEVELS).astype(jnp.int8)
        scales.append(scale.ravel())
    return {
        "rounded": tree.unflatten(rounded),
        "scales": jnp.concatenate([jnp.zeros(0, jnp.float32), *scales]),
        "plain": tree.unflatten(plain),
    }


def decode_int8(encoded: PyTree, form: PyTree) -> PyTree:
    """Undo `encode_int8`, up to a level of each entry.

    >>> encoded = {"rounded": {"b": jnp.asarray([[3, -1]], jnp.int8)}, "scales": jnp.asarray([0.5]), "plain": {}}
    >>> decode_int8(encoded, {"b": jnp.zeros((1, 2))})["b"].tolist()
    [[1.5, -0.5]]
    """
    rounded, message = tree.flatten(encoded["rounded"]), tree.flatten(encoded["plain"])
    first = 0
    for path, leaf in tree.flatten(form).items():
        if path in message:
            continue
        stack = _stack(leaf)
        scale = encoded["scales"][first : first + prod(stack)].reshape(*stack, *[1] * (len(leaf.shape) - len(stack)))
        message[path], first = (rounded[path].astype(jnp.float32) * scale).astype(leaf.dtype), first + prod(stack)
    return tree.unflatten(message)


def _stack(leaf: Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Return the axes in front of a leaf's matrix, [*stack, d_in, R] or [*stack, R, d_out]; none of a vector."""
    return leaf.shape[:-2]


def _shrinks(leaf: Array) -> bool:
    sent = leaf.size + 4 * prod(_stack(leaf))
    return jnp.issubdtype(leaf.dtype, jnp.floating) and sent < leaf.size * leaf.dtype.itemsize


def count_kept(entries: int, keep: float) -> int:
    """Count the entries that `top-k` sends of so many: at least one.

    >>> count_kept(45_056, 0.01), count_kept(20, 0.01)
    (451, 1)
    """
    return min(entries, max(1, round(keep * entries)))


def encode_top_k(message: PyTree, keep: float) -> PyTree:
    """Take the entries of a message of floats that are furthest from zero, `count_kept` of them.

    Returns:
        `values`, float32, and `places`, where each stands in the message as one row: the smallest unsigned integers
        that can say so, and none where everything is kept, in its order.

    >>> encoded = encode_top_k({"b": jnp.asarray([1.0, -3.0, 2.0])}, 0.4)
    >>> encoded["values"].tolist(), encoded["places"].tolist(), encoded["places"].dtype.name
    ([-3.0], [1], 'uint8')
    """
    row = _as_row(message)
    kept = count_kept(row.size, keep)
    if kept == row.size:
        return {"values": row}
    # Sorted, because `lax.top_k` would gather the rows of clients that lie on several devices.
    places = jnp.argsort(jnp.abs(row), descending=True)[:kept]
    width = next(kind for kind in (jnp.uint8, jnp.uint16, jnp.uint32) if row.size - 1 <= jnp.iinfo(kind).max)
    return {"values": row[places], "places": places.astype(width)}


def decode_top_k(encoded: PyTree, form: PyTree) -> PyTree:
    """Undo `encode_top_k`: what was not sent is zero.

    >>> decode_top_k({"values": jnp.asarray([7.0]), "places": jnp.asarray([2], jnp.uint8)}, {"b": jnp.ones((2, 2))})
    {'b': Array([[0., 0.],
           [7., 0.]], dtype=float32)}
    """
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), form)
    row = encoded["values"]
    if "places" in encoded:
        entries = sum(leaf.size for leaf in jax.tree.leaves(stacked))
        row = jnp.zeros(entries, jnp.float32).at[encoded["places"].astype(jnp.int32)].set(row)
    return from_row(row, stacked)


def _as_row(message: PyTree) -> Float[Array, " entries"]:
    return to_rows(jax.tree.map(lambda leaf: leaf[None], message))[0].astype(jnp.float32)


def _with_rounding(method: Method) -> Method:
    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        state, message, metrics = method.client_update(ctx, server=server, personal=personal, client=client, key=key)
        sent = decode_int8(encode_int8(message, jax.random.fold_in(key, Stream.ROUNDING)), message)
        return state, sent, metrics | {"compression_error": _compare(message, sent)}

    return replace(method, client_update=client_update, travels=_travel_encoded(method, encode_int8))


def _with_feedback(method: Method, keep: float) -> Method:
    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        state = method.init_client(key=key, server=server, number=number)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), method.download(server=server))
        return {**state, OWED: nothing, UNLIKE: nothing}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        inner = {name: part for name, part in personal.items() if name not in (OWED, UNLIKE)}
        state, message, metrics = method.client_update(ctx, server=server, personal=inner, client=client, key=key)
        owed, unlike, update = (tree.flatten(part) for part in (personal[OWED], personal[UNLIKE], message))
        # What this round does not train is in no message: it is owed as before.
        whole = {path: leaf + owed[path] for path, leaf in update.items()}
        sent = tree.flatten(decode_top_k(encode_top_k(tree.unflatten(whole), keep), tree.unflatten(update)))
        left = {path: leaf - sent[path] for path, leaf in whole.items()}
        missed = {path: leaf - sent[path] for path, leaf in update.items()}
        error = _compare(tree.unflatten(whole), tree.unflatten(sent))
        took = client.mask.any()  # who took no step sends nothing, of what is owed neither
        renewed = {OWED: {**owed, **left}, UNLIKE: {**unlike, **missed}}
        kept = {
            name: jax.tree.map(lambda new, old: jnp.where(took, new, old), tree.unflatten(part), personal[name])
            for name, part in renewed.items()
        }
        sent = {path: jnp.where(took, leaf, update[path]) for path, leaf in sent.items()}
        return {**state, **kept}, tree.unflatten(sent), metrics | {"compression_error": error}

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        unlike = tree.flatten(personal[UNLIKE])
        update = {path: (leaf + unlike[path]).astype(leaf.dtype) for path, leaf in tree.flatten(message).items()}
        return method.trained(server=server, personal=personal, message=tree.unflatten(update))

    travels = _travel_encoded(method, lambda message, key: encode_top_k(message, keep))
    return replace(method, init_client=init_client, client_update=client_update, trained=trained, travels=travels)


def _travel_encoded(method: Method, encode: Callable[[PyTree, Key], PyTree]) -> Callable[..., Travelling]:
    """Have clients send what `encode` makes of a message, and receive what they do anyway."""

    def travels(server: PyTree, messages: PyTree) -> Travelling:
        one = shape_of_one(messages)
        if method.travels is not None:
            one, down = method.travels(server=server, messages=messages)
        else:
            down = jax.eval_shape(lambda server: method.download(server=server), server)
        return jax.eval_shape(encode, one, jax.eval_shape(lambda: jax.random.key(0))), down

    return travels


def _compare(message: PyTree, sent: PyTree) -> Float[Array, ""]:
    """Compute ‖sent − message‖ / ‖message‖; 0 of nothing."""
    apart = norm_of(jax.tree.map(lambda one, other: one.astype(jnp.float32) - other, sent, message))
    return apart / jnp.maximum(norm_of(message), jnp.finfo(jnp.float32).tiny)
