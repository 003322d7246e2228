"""Rewards of answers by their tokens, between 0 and 1, inside compiled programs.

An answer, drawn or gold, is a row of token ids up to its end, then -100. Tokens that frame every answer, its beginning
and its end, are counted by no reward. Axes: U tokens of a drawn answer, V of a gold one.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.data.batches import IGNORED

Reward = Callable[[Int[Array, "*batch U"], Int[Array, "*batch V"]], Float[Array, "*batch"]]
"""(drawn answers, gold ones), without their frames -> a number each."""


def exact_match(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Score 1 where an answer has the gold one's tokens in their order, else 0.

    >>> exact_match(jnp.asarray([[5, 7, -100], [7, 5, -100]]), jnp.asarray([[5, 7], [5, 7]])).tolist()
    [1.0, 0.0]
    """
    width = max(drawn.shape[-1], gold.shape[-1])
    drawn, gold = (_pack(part, width) for part in (drawn, gold))
    return (drawn == gold).all(axis=-1).astype(jnp.float32)


def token_f1(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Compute F1 of the tokens that both have, in any order, each as often as both have it (arXiv 1606.05250).

    SQuAD compares words of a normalised text, and this a model's tokens. Two answers without a token are equal.

    >>> token_f1(jnp.asarray([[5, 5, 7]]), jnp.asarray([[5, -100]])).tolist()
    [0.5]
    """
    same = drawn[..., :, None] == drawn[..., None, :]
    before = jnp.tril(same, -1).sum(axis=-1)  # how often the token was said already
    times = (drawn[..., :, None] == gold[..., None, :]).sum(axis=-1)
    common = ((drawn != IGNORED) & (before < times)).sum(axis=-1)
    both = _count(drawn) + _count(gold)
    return jnp.where(both > 0, 2 * common / jnp.maximum(both, 1), 1.0).astype(jnp.float32)


def brevity(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Score an answer of n tokens 1 / n, and 0 where nothing is said.

    >>> brevity(jnp.asarray([[5, 7], [5, -100], [-100, -100]]), jnp.asarray([[5], [5], [5]])).tolist()
    [0.5, 1.0, 0.0]
    """
    del gold
    tokens = _count(drawn)
    return jnp.where(tokens > 0, 1 / jnp.maximum(tokens, 1), 0.0).astype(jnp.float32)


REWARDS: Mapping[str, Reward] = {"exact-match": exact_match, "token-f1": token_f1, "brevity": brevity}
"""By the names that the options have for them."""


def score_answers(
    names: Sequence[str],
    mix: Float[Array, "*batch"],
    drawn: Int[Array, "*batch U"],
    gold: Int[Array, "*batch V"],
    frame: Sequence[int],
) -> tuple[Float[Array, "*batch"], list[Float[Array, "*batch"]]]:
    """Mix two rewards, `mix` of the first and the rest of the second, for answers with their frames.

    Returns:
        The mixture, and the two that are in it.

    >>> drawn, gold = jnp.asarray([[0, 5, 7, 2]]), jnp.asarray([[0, 5, 2, -100]])
    >>> score_answers(("exact-match", "brevity"), jnp.asarray([0.5]), drawn, gold, (0, 2))[0].tolist()
    [0.25]
    """
    framing = jnp.asarray(tuple(frame), jnp.int32)
    bare = [jnp.where(jnp.isin(part, framing), IGNORED, part) for part in (drawn, gold)]
    first, second = (REWARDS[name](*bare) for name in names)
    return mix * first + (1 - mix) * second, [first, second]


def cut_at_end(drawn: Int[Array, "*batch U"], ends: Sequence[int]) -> Int[Array, "*batch U"]:
    """Put -100 behind the first token that ends an answer.

    >>> cut_at_end(jnp.asarray([[5, 2, 1, 1], [5, 7, 8, 9]]), (2,)).tolist()
    [[5, 2, -100, -100], [5, 7, 8, 9]]
    """
    is_end = jnp.isin(drawn, jnp.asarray(tuple(ends), jnp.int32)).astype(jnp.int32)
    return jnp.where(jnp.cumsum(is_end, axis=-1) - is_end > 0, IGNORED, drawn)


def _count(tokens: Int[Array, "*batch U"]) -> Int[Array, "*batch"]:
    return (tokens != IGNORED).sum(axis=-1)


def _pack(tokens: Int[Array, "*batch U"], width: int) -> Int[Array, "*batch width"]:
    """Move what counts to the front, in its order, and pad."""
    order = jnp.argsort(tokens == IGNORED, axis=-1, stable=True)
    packed = jnp.take_along_axis(tokens, order, axis=-1)
    return jnp.pad(packed, [(0, 0)] * (tokens.ndim - 1) + [(0, width - tokens.shape[-1])], constant_values=IGNORED)
