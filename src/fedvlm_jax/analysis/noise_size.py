"""The noise of differential privacy beside an update, before anything is run: in the message, and in the products A·B.

A message of D numbers has noise of norm z·C·√D / m, and its clients' mean at most the norm C. What the model feels of
it is s·A·B, at a site with A [d_in, r] and B [r, d_out]. With deviation σ = z·C / m of an entry (correlated noise has
more in a round, and less in the sum of all) the expected norms are

    noise in B, through A    s σ √d_out ‖A‖
    noise in A, through B    s σ √d_in ‖B‖      nothing at the start, where B is zero; here for a B of norm C
    product of both noises   s σ² √(d_in r d_out)

A is as the run begins; of an arbitrary method one noisy round is computed instead, from the adapter to start from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods import Method
from fedvlm_jax.methods.base import Context
from fedvlm_jax.methods.components.factors import matmul
from fedvlm_jax.privacy.banded import Deviations, find_deviations
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.privacy.sampling import Sampling

LARGER = (1, 4, 16, 64)
"""So many times as large rounds are looked at too: noise falls as clients rise."""


@dataclass(frozen=True)
class Products:
    """Expected norms in s·A·B, over all sites.

    Attributes:
        through_a: of noise in B.
        through_b: of noise in A, for a B of the norm that is asked for.
        both: of the noises' product.
    """

    through_a: float
    through_b: float
    both: float


@dataclass(frozen=True)
class RoundNoise:
    """The noise of a round of so many clients on average.

    Attributes:
        expected: m.
        message: norm in the mean of the messages.
        method: norm in s·A·B, of the method that is explained.
        b, a, both: norms in s·A·B where B alone is shared, A alone, or both of them; 0 where no adapter has A and B.
    """

    expected: float
    message: float
    method: float
    b: float
    a: float
    both: float


@dataclass(frozen=True)
class NoiseSize:
    """The noise of a run's rounds.

    Attributes:
        noise, clip: z and C.
        sampling: of the rounds.
        rounds: T.
        entries: D, numbers of a message.
        whole: norm of the noise in the sum of all rounds' means.
        at: rounds as they are, and larger ones.
    """

    noise: float
    clip: float
    sampling: Sampling
    rounds: int
    entries: int
    whole: float
    at: tuple[RoundNoise, ...]


def measure_noise(
    method: Method, adapter: lora.Adapter, message: PyTree, options: PrivacyOptions, sampling: Sampling, rounds: int
) -> NoiseSize:
    """Measure the noise of a method's rounds.

    Args:
        method: without a pool and a server's optimiser.
        adapter: that the run starts from.
        message: shapes of a client's.
        options: with the noise settled.
        sampling, rounds: of the run.
    """
    noise, clip, try_noise = options.noise, options.clip, _make_trial(method, adapter, message)
    entries = sum(leaf.size for leaf in jax.tree.leaves(message))
    banded = options.mechanism == "banded"
    deviations = find_deviations(options.bands, rounds) if banded else Deviations(1.0, math.sqrt(rounds))
    at = []
    for times in LARGER:
        expected = sampling.expected * times
        sigma = deviations.round * noise * clip / expected
        products = expect_products(adapter, sigma, clip)
        at.append(
            RoundNoise(
                expected=expected,
                message=sigma * math.sqrt(entries),
                method=try_noise(sigma),
                b=products.through_a,
                a=products.through_b,
                both=math.hypot(products.through_a, products.through_b, products.both),
            )
        )
    whole = deviations.sum * noise * clip / sampling.expected * math.sqrt(entries)
    return NoiseSize(noise, clip, sampling, rounds, entries, whole, tuple(at))


def expect_products(adapter: lora.Adapter, sigma: float, b_norm: float) -> Products:
    """Compute the expected norms of noise in s·A·B, for noise of this deviation in every entry of A, of B or of both.

    `b_norm` is the norm of all B together, taken to be spread evenly over their entries.

    >>> site = {"a": jnp.ones((8, 2)), "b": jnp.zeros((2, 4)), "scale": jnp.asarray(2.0)}
    >>> expect_products({"fc": site}, sigma=0.5, b_norm=1.0)
    Products(through_a=8.0, through_b=2.8284271247461903, both=4.0)
    """
    sites = [(np.asarray(a), b.shape, np.asarray(scale)) for _, (a, b, scale) in lora.sites_of(lora.low_rank(adapter))]
    total = sum(math.prod(shape) for _, shape, _ in sites)
    through_a = through_b = both = 0.0
    for a, shape, scale in sites:
        d_in, (rank, d_out) = a.shape[-2], shape[-2:]
        squared = float(np.sum(np.square(scale)))  # over layers
        through_a += d_out * float(np.sum(np.square(scale) * np.square(a).sum(axis=(-2, -1))))
        through_b += squared * d_in * rank * d_out / total * b_norm**2
        both += squared * d_in * rank * d_out
    return Products(sigma * math.sqrt(through_a), sigma * math.sqrt(through_b), sigma**2 * math.sqrt(both))


def _make_trial(method: Method, adapter: lora.Adapter, message: PyTree) -> Callable[[float], float]:
    """Make (σ) -> how far a round of noise alone moves s·A·B of a client that has just begun."""

    @jax.jit
    def run(key: Array, adapter: PyTree, sigma: Array) -> Array:
        server = method.init(adapter=adapter)
        personal = method.init_client(key=key, server=server, number=jnp.int32(0))
        leaves, structure = jax.tree.flatten(message)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            sigma * jax.random.normal(at, (1, *leaf.shape), leaf.dtype) for at, leaf in zip(keys, leaves, strict=True)
        ]
        ctx = Context({}, jnp.int32(1), method.phase(1), {}, _train_nothing, key)
        after, _ = method.aggregate(
            ctx, server=server, messages=jax.tree.unflatten(structure, drawn), weights=jnp.ones(1)
        )
        before, moved = (method.personalise(server=state, personal=personal) for state in (server, after))
        return _distance(before, moved)

    return lambda sigma: float(run(jax.random.key(0), adapter, jnp.float32(sigma)))


def _train_nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("an aggregation trains nothing")


def _distance(one: lora.Adapter, other: lora.Adapter) -> Array:
    """Compute the norm of the difference of s·A·B over all sites, without forming a product."""
    squared = jnp.zeros(())
    for (_, (a, b, scale)), (_, (c, d, _)) in zip(
        lora.sites_of(lora.low_rank(one)), lora.sites_of(lora.low_rank(other)), strict=True
    ):
        left = jnp.concatenate([a, c], axis=-1)
        right = jnp.concatenate([-b, d], axis=-2) * scale[..., None, None]
        squared += jnp.sum(matmul(left.mT, left) * matmul(right, right.mT))
    return jnp.sqrt(jnp.maximum(squared, 0))
