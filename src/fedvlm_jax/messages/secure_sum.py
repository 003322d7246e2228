"""A sum of integers in place of the mean, as secure aggregation computes it (SecAgg, Bonawitz et al. 2017).

Masks that cancel in a sum need numbers that wrap around, so each entry is cut to a range, multiplied by the client's
weight and rounded to an integer, at random so that the mean is kept; the integers are added modulo 2³². This tells what
the range and the rounding cost a method, and that the round needs one all-reduce, of integers. It hides nothing: in one
process there is nobody to hide from, so no masks are drawn. For real clients there is `fedvlm deploy init --secure`.
"""

from math import ceil, log2

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import Pool, Pooled, from_row, round_at_random, to_rows
from fedvlm_jax.methods.base import Context, Weights

WIDTH = 32  # bits of the integers that are added
SQUARES = 2**20  # levels of a client's mean squared rounding error, in squared levels of the grid; it is at most 1


def make_secure_sum(options: MessageOptions, cohort: int) -> Pool:
    """Make the pool that adds integers; `cohort` is how many clients a round has at most.

    It tells `quantisation_error`, the norm of what the rounding added to the mean, relative to the mean, as expected
    from the clients' own errors; and `clipped_share`, of all entries that counted those beyond the range.

    Raises:
        UserError: the sum of so many clients could wrap around.
    """
    check_width(options, cohort)
    # A millionth below the largest integer, for float32 rounds what comes near it.
    top = 2 ** (options.secure_bits - 1) - max(1, 2 ** (options.secure_bits - 21))
    level = options.secure_range / top

    def run(ctx: Context, *, state: PyTree, messages: PyTree, weights: Weights) -> Pooled:
        assert ctx.numbers is not None
        rows = to_rows(messages).astype(jnp.float32)
        counts = weights > 0
        rows = jnp.where(counts[:, None], rows, 0)  # who does not count may hold anything
        clipped = jnp.clip(rows, -options.secure_range, options.secure_range)
        # Weights add up to 1, so the sum stays within `cohort` times the range whatever they are.
        exact = clipped * (cohort * weights)[:, None] / level
        keys = jax.vmap(lambda number: jax.random.fold_in(ctx.key, number))(ctx.numbers)
        integers = jax.vmap(round_at_random)(exact, keys).astype(jnp.int32)
        squares = jnp.mean(jnp.square(integers.astype(jnp.float32) - exact), axis=1)
        beside = (counts, jnp.sum(rows != clipped, axis=1), jnp.round(SQUARES * jnp.minimum(squares, 1)))
        columns = jnp.stack([column.astype(jnp.int32) for column in beside], axis=1)
        # What is told rides on the one sum.
        total = jnp.sum(jnp.concatenate([integers, columns], axis=1), axis=0, dtype=jnp.int32)
        entries = rows.shape[1]
        mean = total[:entries].astype(jnp.float32) * (level / cohort)
        counted, cut, squared = total[entries:].astype(jnp.float32)
        norm = jnp.linalg.norm(mean)
        rounding = jnp.sqrt(squared / SQUARES * entries) * (level / cohort)
        told = {
            "quantisation_error": rounding / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny),
            "clipped_share": cut / jnp.maximum(counted * entries, 1),
        }
        return Pooled(from_row(mean, messages), state, told, counted > 0)

    return Pool("secure", run)


def check_width(options: MessageOptions, cohort: int) -> None:
    """Refuse entries so wide that the sum of a cohort would wrap around.

    >>> check_width(MessageOptions(secure_bits=24), 256)

    Raises:
        UserError: with the most bits that fit.
    """
    needed = ceil(log2(max(cohort, 1)))
    if options.secure_bits + needed > WIDTH:
        raise UserError(
            f"--messages.secure-bits {options.secure_bits}: a sum of {cohort:,} clients could need "
            f"{options.secure_bits + needed} bits, and {WIDTH} are added; use {WIDTH - needed} bits at most"
        )
