"""Rewards of answers by their tokens, between 0 and 1, inside compiled programs.

An answer, drawn or gold, is a row of token ids up to its end, then -100. Tokens that frame every answer, its beginning
and its end, are counted by no reward. Axes: U tokens of a drawn answer, V of a gold one.

None of them is PFIT's (arXiv 2404.13238v1), whose two rewards are models. `exact_match`, `token_f1` and `cider` are
metrics with a source of their own, on tokens; `brevity` and `file` are this project's.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.objectives.config import REWARDS
from fedvlm_jax.objectives.reward_tables import ORDERS, Known, find_rows

Reward = Callable[[Int[Array, "*batch U"], Int[Array, "*batch V"], Known], Float[Array, "*batch"]]
"""(drawn answers, gold ones, both without their frames; what else is known) -> a number each."""

SIGMA = 6.0  # of CIDEr-D's penalty on the difference in length, in tokens


def exact_match(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"], known: Known) -> Float[Array, "*batch"]:
    """Score 1 where an answer has the gold one's tokens in their order, else 0.

    >>> exact_match(jnp.asarray([[5, 7, -100], [7, 5, -100]]), jnp.asarray([[5, 7], [5, 7]]), {}).tolist()
    [1.0, 0.0]
    """
    del known
    width = max(drawn.shape[-1], gold.shape[-1])
    drawn, gold = (_pack(part, width) for part in (drawn, gold))
    return (drawn == gold).all(axis=-1).astype(jnp.float32)


def token_f1(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"], known: Known) -> Float[Array, "*batch"]:
    """Compute F1 of the tokens that both have, in any order, each as often as both have it (arXiv 1606.05250).

    SQuAD compares words of a normalised text, and this a model's tokens. Two answers without a token are equal.

    >>> token_f1(jnp.asarray([[5, 5, 7]]), jnp.asarray([[5, -100]]), {}).tolist()
    [0.5]
    """
    del known
    same = drawn[..., :, None] == drawn[..., None, :]
    before = jnp.tril(same, -1).sum(axis=-1)  # how often the token was said already
    times = (drawn[..., :, None] == gold[..., None, :]).sum(axis=-1)
    common = ((drawn != IGNORED) & (before < times)).sum(axis=-1)
    both = _count(drawn) + _count(gold)
    return jnp.where(both > 0, 2 * common / jnp.maximum(both, 1), 1.0).astype(jnp.float32)


def brevity(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"], known: Known) -> Float[Array, "*batch"]:
    """Score an answer of n tokens 1 / n, and 0 where nothing is said.

    >>> brevity(jnp.asarray([[5, 7], [5, -100], [-100, -100]]), jnp.asarray([[5], [5], [5]]), {}).tolist()
    [0.5, 1.0, 0.0]
    """
    del gold, known
    tokens = _count(drawn)
    return jnp.where(tokens > 0, 1 / jnp.maximum(tokens, 1), 0.0).astype(jnp.float32)


@jax.jit
def cider(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"], known: Known) -> Float[Array, "*batch"]:
    """Compute CIDEr-D / 10 (arXiv 1411.5726), with the document frequencies in `known`.

    It is the formula of the metric `cider`, and differs from it in three things: an answer is a row of the model's
    tokens, not of words; there is one gold answer, the one that is trained on; and the documents are the training
    answers of all clients that train, counted once before training, held-out answers never. `known` has the arrays of
    `tabulate_rarity`.

    >>> from fedvlm_jax.objectives.reward_tables import tabulate_rarity
    >>> known = tabulate_rarity({(5,): 0.5}, most=1.5)  # 5 is in several documents, all else in one
    >>> [f"{score:.3f}" for score in cider(jnp.asarray([[5, 7, 8], [5, 6, -100]]), jnp.asarray([[5, 7, 8]] * 2), known)]
    ['0.750', '0.018']
    """
    drawn, gold = (_pack(part, part.shape[-1]) for part in (drawn, gold))
    mine, other = _weigh_grams(drawn, known), _weigh_grams(gold, known)
    own, both, theirs = _match_grams(drawn, drawn), _match_grams(drawn, gold), _match_grams(gold, gold)
    times, met, said = (found.sum(axis=-1) for found in (own, both, theirs))  # how often a gram is in the other
    # Every gram is met as often as it is said: a sum over grams is one over places, divided by that.
    norms = jnp.sqrt((mine**2 * times).sum(axis=-1) * (other**2 * said).sum(axis=-1))
    shared = (mine**2 * jnp.minimum(times, met) * met / jnp.maximum(times, 1)).sum(axis=-1)
    cosines = jnp.where(norms > 0, shared / jnp.where(norms > 0, norms, 1.0), 0.0)
    longer = _count(drawn) - _count(gold)
    return cosines.mean(axis=-1) * jnp.exp(-(longer**2) / (2 * SIGMA**2))


@jax.jit
def file(drawn: Int[Array, "*batch U"], gold: Int[Array, "*batch V"], known: Known) -> Float[Array, "*batch"]:
    """Look an answer's reward up in a table: that of the row with its tokens, the default where there is none.

    A row for the question and the client comes before one for the question, this before one for the client, and this
    before one for all. Another spelling of the same text, by other tokens, is another answer. `known` has the arrays of
    `tabulate_answers`, and of every answer `client`, its client's number, and `reward_question`, its question's.

    >>> from fedvlm_jax.objectives.reward_tables import tabulate_answers
    >>> known = tabulate_answers({(0, 0, (5, 7)): 0.5, (0, 2, (5, 7)): 0.75}, default=0.25)
    >>> known |= {"client": jnp.asarray([0, 1, 1]), "reward_question": jnp.asarray([0, 0, 0])}
    >>> file(jnp.asarray([[5, 7, -100], [5, 7, -100], [5, -100, -100]]), jnp.full((3, 1), -100), known).tolist()
    [0.5, 0.75, 0.25]
    """
    del gold
    table, rewards = known["listed"], known["listed_rewards"]
    width = max(table.shape[-1] - 2, drawn.shape[-1])
    table = jnp.pad(table, [(0, 0), (0, width + 2 - table.shape[-1])], constant_values=IGNORED)
    tokens, everybody = _pack(drawn, width), jnp.zeros(drawn.shape[:-1], jnp.int32)
    question, client = known["reward_question"], known["client"] + 1
    found = jnp.full(drawn.shape[:-1], known["listed_default"])
    for who in ((everybody, everybody), (everybody, client), (question, everybody), (question, client)):
        at = find_rows(table, jnp.concatenate([jnp.stack(who, axis=-1), tokens], axis=-1))
        found = jnp.where(at < 0, found, rewards[at])
    return found


SCORES: Mapping[str, Reward] = {name: globals()[name.replace("-", "_")] for name in REWARDS}
"""By the names that the options have for them."""


def score_answers(
    names: Sequence[str],
    mix: Float[Array, "*batch"],
    drawn: Int[Array, "*batch U"],
    gold: Int[Array, "*batch V"],
    frame: Sequence[int],
    known: Known,
) -> tuple[Float[Array, "*batch"], list[Float[Array, "*batch"]]]:
    """Mix two rewards, `mix` of the first and the rest of the second, for answers with their frames.

    `known` is what the rewards read beside; where it has a number for every answer, arrays [*batch].

    Returns:
        The mixture, and the two that are in it.

    >>> drawn, gold = jnp.asarray([[0, 5, 7, 2]]), jnp.asarray([[0, 5, 2, -100]])
    >>> score_answers(("exact-match", "brevity"), jnp.asarray([0.5]), drawn, gold, (0, 2), {})[0].tolist()
    [0.25]
    """
    framing = jnp.asarray(tuple(frame), jnp.int32)
    drawn, gold = (jnp.where(jnp.isin(part, framing), IGNORED, part) for part in (drawn, gold))
    first, second = (SCORES[name](drawn, gold, known) for name in names)
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


def _list_grams(tokens: Int[Array, "*batch U"]) -> Int[Array, "*batch U orders"]:
    """List the longest n-gram that begins at every place, -100 beyond the answer's end."""
    padded = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, ORDERS)], constant_values=IGNORED)
    return jnp.stack([padded[..., start : start + tokens.shape[-1]] for start in range(ORDERS)], axis=-1)


def _weigh_grams(tokens: Int[Array, "*batch U"], known: Known) -> Float[Array, "*batch orders U"]:
    """Find the weight of the n-gram at every place, by order; 0 where the answer is too short for it."""
    longest, upto = _list_grams(tokens), jnp.tri(ORDERS, dtype=bool)[:, None]
    grams = jnp.where(upto, longest[..., None, :, :], IGNORED)
    at = find_rows(known["grams"], grams)
    weights = jnp.where(at < 0, known["gram_most"], known["gram_weights"][at])
    return jnp.where(jnp.moveaxis(longest, -1, -2) == IGNORED, 0.0, weights)


def _match_grams(one: Int[Array, "*batch U"], other: Int[Array, "*batch V"]) -> Bool[Array, "*batch orders U V"]:
    """Tell, by order, where the n-gram at a place of one answer is that at a place of another."""
    ours, theirs = (jnp.moveaxis(_list_grams(part), -1, -2) for part in (one, other))
    same = (ours[..., :, None] == theirs[..., None, :]) & (ours != IGNORED)[..., :, None]
    return jnp.cumprod(same, axis=-3).astype(bool)


def _pack(tokens: Int[Array, "*batch U"], width: int) -> Int[Array, "*batch width"]:
    """Move what counts to the front, in its order, and pad."""
    order = jnp.argsort(tokens == IGNORED, axis=-1, stable=True)
    packed = jnp.take_along_axis(tokens, order, axis=-1)
    return jnp.pad(packed, [(0, 0)] * (tokens.ndim - 1) + [(0, width - tokens.shape[-1])], constant_values=IGNORED)
