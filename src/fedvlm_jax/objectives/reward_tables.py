"""What rewards read beside an answer and the gold one: arrays that are made before training, and looked up in a round.

A table is rows of whole numbers in their order, the first column first, filled up with rows that are found by nobody,
so that tables of about one size share a program. Everything is an argument of the compiled round, and the same for all
clients. Axes: T rows of a table, W numbers of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedvlm_jax.data.batches import IGNORED, bucket

Known = Mapping[str, Any]
"""Arrays by name, those of `TABLES` and of every answer those of `OF_ANSWERS`; only what the rewards at hand read."""

TABLES = ("grams", "gram_weights", "gram_most", "listed", "listed_rewards", "listed_default")
OF_ANSWERS = ("client", "reward_question")

ORDERS = 4  # n-grams of CIDEr-D have as many tokens at most
NOBODY = np.iinfo(np.int32).max  # in rows that fill a table up


def tabulate_rarity(weights: Mapping[tuple[Any, ...], float], most: float) -> dict[str, np.ndarray]:
    """Lay out the weights of n-grams of tokens, log(documents / documents that hold one), as the reward `cider` reads.

    Args:
        weights: of those that it knows.
        most: of all others, which one document holds, or none.

    >>> {name: array.shape for name, array in tabulate_rarity({(5,): 0.5, (5, 7): 1.0}, most=1.5).items()}
    {'grams': (8, 4), 'gram_weights': (8,), 'gram_most': ()}
    """
    rows, values = _lay_out([*weights], [*weights.values()], ORDERS)
    return {"grams": rows, "gram_weights": values, "gram_most": np.asarray(most, np.float32)}


def tabulate_answers(
    rewards: Mapping[tuple[int, int, tuple[int, ...]], float], default: float
) -> dict[str, np.ndarray]:
    """Lay out rewards of answers, as the reward `file` reads.

    Args:
        rewards: (question, client, tokens) -> reward; a question's number from 1 and one more than a client's, 0 where
            a row is for all.
        default: reward of every other answer.

    >>> tabulate_answers({(0, 3, (5, 7)): 1.0}, default=0.0)["listed"][0].tolist()
    [0, 3, 5, 7]
    """
    keys = [(question, client, *tokens) for question, client, tokens in rewards]
    rows, values = _lay_out(keys, [*rewards.values()], max(map(len, keys), default=2))
    return {"listed": rows, "listed_rewards": values, "listed_default": np.asarray(default, np.float32)}


def find_rows(table: Int[Array, "T W"], rows: Int[Array, "*batch W"]) -> Int[Array, "*batch"]:
    """Find rows in a table by halving it: their places, -1 where it does not have them.

    >>> find_rows(jnp.asarray([[1, 5], [1, 7], [2, 0]]), jnp.asarray([[2, 0], [1, 6], [1, 5]])).tolist()
    [2, -1, 0]
    """
    at = jnp.zeros(rows.shape[:-1], jnp.int32)  # the last row that is not behind, as far as is known
    for power in reversed(range(len(table).bit_length())):
        later = at + 2**power
        held = table[jnp.minimum(later, len(table) - 1)]
        at = jnp.where((later < len(table)) & ~_is_before(rows, held), later, at)
    return jnp.where((table[at] == rows).all(axis=-1), at, -1)


def _is_before(one: Int[Array, "*batch W"], other: Int[Array, "*batch W"]) -> Array:
    """Tell where a row comes before another: by the first number in which they differ."""
    first = jnp.argmax(one != other, axis=-1, keepdims=True)
    return (jnp.take_along_axis(one, first, axis=-1) < jnp.take_along_axis(other, first, axis=-1))[..., 0]


def _lay_out(
    keys: Sequence[Sequence[int]], values: Sequence[float], width: int
) -> tuple[Int[np.ndarray, "T W"], Float[np.ndarray, " T"]]:
    """Make a table of rows, -100 behind their end, and their values."""
    rows = np.full((bucket(len(keys)), width), NOBODY, np.int32)
    held = np.zeros(len(rows), np.float32)
    for place, number in enumerate(sorted(range(len(keys)), key=lambda number: _fill_up(keys[number], width))):
        rows[place], held[place] = _fill_up(keys[number], width), values[number]
    return rows, held


def _fill_up(key: Sequence[int], width: int) -> tuple[int, ...]:
    return (*key, *[IGNORED] * (width - len(key)))
