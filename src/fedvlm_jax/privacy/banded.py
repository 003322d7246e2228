"""Correlated noise by a banded matrix (DP-FTRL; arXiv 2306.08153): what a round adds, later rounds take back in part.

The noise of all T rounds is C⁻¹ Z, rows of Z [T, D] being those of the Gaussian mechanism and C [T, T] lower triangular
with b bands. A client that takes part at most once in b rounds meets columns of C that share no row; each has norm 1,
so the rounds cost what as many rounds of the Gaussian mechanism do in which the client takes part. What is gained is
the error of the *sum* of the updates, which the shared part is: C is chosen so that the noise in it, the mean over all
rounds, is least.

    C[t, s] = c[t − s] / ‖c[: T − s]‖,    v_t = (z_t − Σ_{0 < i < b} c_i v_{t − i}) / c_0,    noise_t = ‖c[: T − t]‖ v_t

so the last b − 1 of v, each as large as what the server shares, are the pool's state.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.pool import Pool, Pooled, count_entries, from_row
from fedvlm_jax.methods.base import Context, Weights
from fedvlm_jax.privacy.clipping import sum_clipped
from fedvlm_jax.privacy.gaussian import draw, tell
from fedvlm_jax.utils import tree

Coefficients = Float[np.ndarray, " bands"]


def make_banded_pool(noise: float, clip: float, expected: float, bands: int, rounds: int) -> Pool:
    """Make the pool of noise that is correlated over rounds.

    Args:
        noise, clip, expected: z, C and m of the Gaussian mechanism.
        bands: rounds of which a client takes part in one at most; at least 2.
        rounds: of the run.

    Raises:
        UserError: there are fewer than two bands, or more than rounds.
    """
    if not 2 <= bands <= rounds:
        raise UserError(
            f"--privacy.bands {bands}: noise is correlated over 2 rounds or more, and over the run's {rounds} at most"
        )
    coefficients = optimize_bands(bands, rounds)
    norms = _find_norms(coefficients, rounds).astype(np.float32)

    def init(shared: PyTree) -> PyTree:
        return {"noise": jax.tree.map(lambda leaf: jnp.zeros((bands - 1, *leaf.shape), jnp.float32), shared)}

    def run(ctx: Context, state: PyTree, messages: PyTree, weights: Weights) -> Pooled:
        # A method may send another part of what is shared in every round: the noise is that of all of it, and what is
        # not sent is not released.
        summed, before = sum_clipped(messages, weights, clip), state["noise"]
        fresh = from_row(draw(ctx.key, (count_entries(before),)), before)
        now = jax.tree.map(partial(_subtract_earlier, coefficients), fresh, before)
        size = noise * clip * jnp.asarray(norms)[jnp.minimum(ctx.round, rounds) - 1]
        drawn = _select_sent(now, messages) * size
        message = from_row((summed.total + drawn) / expected, messages)
        later = jax.tree.map(lambda new, old: jnp.concatenate([new[None], old[:-1]]), now, before)
        return Pooled(message, {"noise": later}, tell(summed, drawn, expected, clip))

    return Pool("banded", run, init, always=True)


def _subtract_earlier(coefficients: Coefficients, fresh: Array, before: Float[Array, "earlier ..."]) -> Array:
    """Make v_t of z_t and the last v, the newest first."""
    taken = jnp.tensordot(jnp.asarray(coefficients[1:], jnp.float32), before, axes=1, precision="highest")
    return (fresh - taken) / coefficients[0]


def _select_sent(noise: PyTree, messages: PyTree) -> Float[Array, " entries"]:
    """Lay out as a row what the noise has for the leaves of a message."""
    flat = tree.flatten(noise)
    sent = tree.unflatten({path: flat[path] for path in tree.flatten(messages)})
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(sent)])


def optimize_bands(bands: int, rounds: int) -> Coefficients:
    """Find the bands of C of which the sum of updates has least noise; their norm is 1.

    The start is the square root of the matrix of ones, which is optimal up to a constant without a limit on bands
    (arXiv 2202.08312).

    >>> optimize_bands(2, 2).round(3).tolist()
    [0.956, 0.292]
    """
    from scipy.optimize import minimize  # late: it takes a second

    start = np.cumprod([1.0, *((2 * at - 1) / (2 * at) for at in range(1, bands))])
    found = minimize(lambda rest: _loss(np.append(1.0, rest), rounds), start[1:], jac=True, method="L-BFGS-B")
    coefficients = np.append(1.0, found.x)
    return coefficients / np.linalg.norm(coefficients)


class Deviations(NamedTuple):
    """Deviations of noise over z C / m: of a round's, the root mean square over rounds, and of the sum of all."""

    round: float
    sum: float


def find_deviations(bands: int, rounds: int) -> Deviations:
    """Find how large correlated noise is; noise that is new in every round has 1 and √rounds.

    >>> [round(deviation, 2) for deviation in find_deviations(bands=8, rounds=64)]
    [1.74, 3.27]
    """
    from scipy.signal import lfilter

    coefficients = optimize_bands(bands, rounds)
    norms = _find_norms(coefficients, rounds)
    inverse = np.asarray(lfilter([1.0], coefficients, np.eye(1, rounds)[0]))
    each = norms * np.sqrt(np.cumsum(inverse**2))
    # The last row of (matrix of ones) C⁻¹, by solving with C's transpose from the last round back.
    last = np.asarray(lfilter([1.0], coefficients, norms[::-1]))
    return Deviations(float(np.sqrt(np.mean(each**2))), float(np.linalg.norm(last)))


def _find_norms(coefficients: Coefficients, rounds: int) -> Float[np.ndarray, " rounds"]:
    """Return the norm of every column of the matrix of these bands: 1, but for the last few that are cut short."""
    return np.asarray([np.linalg.norm(coefficients[: rounds - at]) for at in range(rounds)])


def _loss(coefficients: Coefficients, rounds: int) -> tuple[float, Float[np.ndarray, " rest"]]:
    """Compute the sum's mean squared noise per round times ‖c‖², and its gradient but for the first coefficient.

    In power series: the sum's noise is that of g = 1 / ((1 − x) c), and dg / dc_i = −xⁱ g / c.
    """
    from scipy.signal import lfilter

    sums = np.asarray(lfilter([1.0], coefficients, np.ones(rounds)))
    weight = np.arange(rounds, 0, -1) / rounds  # the rounds whose sum has the term
    error, squared = float(weight @ sums**2), float(coefficients @ coefficients)
    moved = np.asarray(lfilter([1.0], coefficients, sums))
    slopes = [-2.0 * float((weight * sums)[at:] @ moved[: rounds - at]) for at in range(1, len(coefficients))]
    return error * squared, squared * np.asarray(slopes) + 2 * error * coefficients[1:]
