"""Spectral clusters of clients by the subspaces that their factors span, inside a compiled round.

Shapes are those of `clusters.py`: P places, of which some are nobody's, and at most M clusters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.components.clusters import Distances, number_clusters

MOVES = 30  # of the centres of k-means; few points are settled long before


def measure_subspace_distances(one: PyTree, other: PyTree) -> Float[Array, "P Q"]:
    """Compute 1 − ‖U_iᵀ U_j‖² / r, layer by layer, and the mean over layers; U are bases of what the rows of b span.

    Leaves are [P, *stack, r, d_out] and [Q, *stack, r, d_out]. It is the mean of the squared sines of the principal
    angles: 0 for the same subspace, 1 for orthogonal ones.

    >>> b = {"fc": {"b": jnp.asarray([[[1.0, 0.0, 0.0]], [[3.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])}}
    >>> measure_subspace_distances(b, b)[0].tolist()
    [0.0, 0.0, 1.0]
    """

    def as_bases(leaf: Array) -> Float[Array, "layers P d_out r"]:
        bases = lora.one_by_one(jnp.linalg.qr, leaf.astype(jnp.float32).mT)[0]
        return jnp.moveaxis(bases.reshape(leaf.shape[0], -1, *bases.shape[-2:]), 1, 0)

    def compare(pair: tuple[Array, Array]) -> Float[Array, "P Q"]:
        left, right = pair

        def leave(basis: Array) -> Float[Array, " Q"]:
            # What of the others lies outside: 1 less what lies inside would lose the digits of small angles.
            inside = jnp.einsum("da,qdb->qab", basis, right, precision="highest")
            outside = right - jnp.einsum("da,qab->qdb", basis, inside, precision="highest")
            return jnp.sum(jnp.square(outside), axis=(1, 2)) / right.shape[-1]

        return jax.lax.map(leave, left)

    apart = [
        jax.lax.map(compare, (as_bases(mine), as_bases(theirs)))
        for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    ]
    return jnp.concatenate(apart).mean(axis=0)


def cluster_spectrally(
    distances: Distances, present: Bool[Array, " P"], most: int
) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """Cluster by the eigenvectors of the normalised Laplacian of exp(−d² / 2σ²), σ the median of d (Ng et al. 2001).

    As many clusters, from 2 to `most` and less than places present, as come before the largest gap between eigenvalues;
    else one. The rows of so many eigenvectors have length 1, and are grouped by k-means.

    Returns:
        The clusters' numbers, `most` where nobody is; and how many there are, at least one.
    """
    places = len(present)
    pairs = present[:, None] & present
    apart = jnp.where(pairs & ~jnp.eye(places, dtype=bool), distances, jnp.nan)
    sigma = jnp.maximum(jnp.nan_to_num(jnp.nanmedian(apart), nan=1.0), 1e-6)
    affinity = jnp.where(pairs, jnp.exp(-jnp.square(distances / sigma) / 2), 0)
    root = jax.lax.rsqrt(jnp.maximum(affinity.sum(axis=1), 1e-12))
    # Eigenvalues are at most 2; who is not there comes after them.
    laplacian = jnp.diag(jnp.where(present, 1.0, 4.0)) - root[:, None] * affinity * root
    values, vectors = jnp.linalg.eigh(laplacian)
    numbers = jnp.arange(1, places)  # of clusters
    possible = (numbers >= 2) & (numbers <= most) & (numbers < present.sum())
    gaps = jnp.where(possible, jnp.diff(values), -jnp.inf)
    many = jnp.where(possible.any(), jnp.argmax(gaps) + 1, 1) if places > 1 else jnp.int32(1)
    rows = jnp.where(jnp.arange(places) < many, vectors, 0)
    rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = group_points(rows, present, many, most)
    heads = jnp.argmax((labels[:, None] == labels) & present, axis=1)  # the first place of the same cluster
    return number_clusters(heads.astype(jnp.int32), present, most), many.astype(jnp.int32)


def group_points(
    points: Float[Array, "P n"], present: Bool[Array, " P"], many: Int[Array, ""], most: int
) -> Int[Array, " P"]:
    """Group points by k-means: centres begin as one point and, each in turn, the farthest from those there are.

    Every point is tried as the first, and the grouping with the smallest squared distances is taken, so that the order
    of the points does not matter.

    >>> points = jnp.asarray([[0.0], [5.0], [0.1], [5.1]])
    >>> group_points(points, jnp.ones(4, bool), jnp.int32(2), 3).tolist()
    [0, 1, 0, 1]
    """

    def measure(centres: Array) -> Float[Array, "P most"]:
        squares = jnp.sum(jnp.square(points[:, None] - centres), axis=-1)
        return jnp.where(jnp.arange(most) < many, squares, jnp.inf)

    def move(_: int, centres: Array) -> Array:
        member = (jnp.argmin(measure(centres), axis=1)[:, None] == jnp.arange(most)) & present[:, None]
        sums = jnp.einsum("pm,pn->mn", member.astype(points.dtype), points, precision="highest")
        size = member.sum(axis=0)[:, None]
        return jnp.where(size > 0, sums / jnp.maximum(size, 1), centres)

    def settle(first: Array) -> tuple[Array, Array]:
        centres = [points[first]]
        for _ in range(most - 1):
            nearest = jnp.min(jnp.sum(jnp.square(points[:, None] - jnp.stack(centres)), axis=-1), axis=1)
            centres.append(points[jnp.argmax(jnp.where(present, nearest, -1))])
        squares = measure(jax.lax.fori_loop(0, MOVES, move, jnp.stack(centres)))
        total = jnp.sum(jnp.where(present, squares.min(axis=1), 0))
        return jnp.where(present[first], total, jnp.inf), jnp.argmin(squares, axis=1)

    totals, labels = jax.vmap(settle)(jnp.arange(len(points)))
    return labels[jnp.argmin(totals)]
