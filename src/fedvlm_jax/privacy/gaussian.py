"""The Gaussian mechanism over whole messages: differential privacy of clients (DP-FedAvg, arXiv 1710.06963).

    c_k = Δ_k min(1, C / ‖Δ_k‖)        the message of client k as a whole, 0 where it is not finite
    Δ = (Σ_k c_k + N(0, (z C)² I)) / m

m is a constant, the clients of a round on average: neither who was drawn nor who dropped out is told by it. All count
alike, and in a round in which nobody does the noise is released too.

Adaptive clipping (arXiv 1905.03871) lets C follow a quantile γ of the clients' norms, which is found privately:

    b = ½ + (Σ_k (1[‖Δ_k‖ ≤ C] − ½) + N(0, σ_b²)) / m,    C ← C exp(−η_C (b − γ))

with σ_b = m / 20 and η_C = 0.2 as in the paper. Both releases together cost what one of noise multiplier z does where
the update has z_Δ = (z⁻² − (2 σ_b)⁻²)^(−½), since subtracting ½ halves what a client moves the count by. The paper adds
½ of the clients that came; here it is ½ of m, because how many came is private.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.pool import Pool, Pooled, from_row, no_state
from fedvlm_jax.methods.base import Context, Key, Metrics, Weights
from fedvlm_jax.privacy.clipping import ClippedSum, sum_clipped

COUNT_NOISE = 1 / 20
"""σ_b of the noise on the count of norms below C, over m."""
CLIP_RATE = 0.2
"""η_C, how fast C follows the quantile."""


class Stddev(NamedTuple):
    """Standard deviations of the noises of adaptive clipping: of an update's entry over C, and of the count."""

    update: float
    counting: float


def split_noise(noise: float, expected: float) -> Stddev:
    """Split a noise multiplier into that of the update and that of the count (arXiv 1905.03871, theorem 1).

    Raises:
        UserError: a round has so few clients that the count alone would cost more.

    >>> split_noise(1.0, 100)
    Stddev(update=1.005037815259212, counting=5.0)
    """
    count = COUNT_NOISE * expected
    if noise >= 2 * count:
        raise UserError(
            f"--privacy.quantile with a noise multiplier of {noise:.4g} needs rounds of more than {10 * noise:.4g} "
            f"clients on average, not {expected:g}: leave it out, or raise --cohort"
        )
    return Stddev((noise**-2 - (2 * count) ** -2) ** -0.5 if noise else 0.0, count)


def make_gaussian_pool(noise: float, clip: float, expected: float, quantile: float | None = None) -> Pool:
    """Make the pool of noise that is new in every round.

    Args:
        noise: z, the noise multiplier; that of both releases together where the clipping norm adapts.
        clip: C, or what it is at first.
        expected: m, the fixed denominator.
        quantile: γ, which the clipping norm follows; None: it stays.

    Raises:
        UserError: adaptive clipping with too few clients.
    """
    if quantile is None:

        def run_fixed(ctx: Context, state: PyTree, messages: PyTree, weights: Weights) -> Pooled:
            summed = sum_clipped(messages, weights, clip)
            drawn = noise * clip * draw(ctx.key, summed.total.shape) if noise else jnp.zeros_like(summed.total)
            message = from_row((summed.total + drawn) / expected, messages)
            return Pooled(message, state, tell(summed, drawn, expected, clip))

        return Pool("gaussian", run_fixed, no_state, always=True)
    stddev, wanted = split_noise(noise, expected), quantile

    def run(ctx: Context, state: PyTree, messages: PyTree, weights: Weights) -> Pooled:
        now = state["clip"]
        summed = sum_clipped(messages, weights, now)
        drawn = stddev.update * now * draw(ctx.key, summed.total.shape)
        moved = summed.below - summed.sampled / 2 + stddev.counting * draw_count(ctx.key)
        after = now * jnp.exp(-CLIP_RATE * (0.5 + moved / expected - wanted))
        message = from_row((summed.total + drawn) / expected, messages)
        return Pooled(message, {"clip": after}, tell(summed, drawn, expected, now))

    return Pool("gaussian", run, lambda shared: {"clip": jnp.float32(clip)}, always=True)


def draw(key: Key, shape: tuple[int, ...]) -> Float[Array, " entries"]:
    """Draw a round's standard normal noise; `key` is the context's. The numbers do not depend on the mesh."""
    return jax.random.normal(jax.random.split(key)[0], shape)


def draw_count(key: Key) -> Float[Array, ""]:
    """Draw the standard normal noise of a round's count."""
    return jax.random.normal(jax.random.split(key)[1])


def tell(
    summed: ClippedSum, noise: Float[Array, " entries"], expected: float, clip: Float[Array, ""] | float
) -> Metrics:
    """Tell a round's numbers. None but `clip` is private, so they are for who runs the simulation alone.

    `noise_norm` is that of the noise in the mean; `noise_to_update` its ratio to the mean's norm before the noise.
    """
    size = jnp.linalg.norm(noise)
    return {
        "clip": jnp.float32(clip),
        "clip_fraction": 1 - summed.below / jnp.maximum(summed.sampled, 1),
        "noise_norm": size / expected,
        "noise_to_update": size / jnp.maximum(jnp.linalg.norm(summed.total), 1e-12),
        "sampled": summed.sampled,
    }
