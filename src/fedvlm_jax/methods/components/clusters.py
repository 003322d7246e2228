"""Clusters of clients inside a compiled round: distances, average linkage, silhouettes; and means over a cluster.

All shapes are fixed: P places, of which some are nobody's, at most M clusters, and a client's cluster is a number below
M, or M where it has none. Clusters are numbered by their first place.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax.errors import format_count
from fedvlm_jax.methods.base import Number, Weights
from fedvlm_jax.utils import tree

Distances = Float[Array, "P P"]

SEEN = 64  # clients that are clustered at least, where there are so many
Clusters = Annotated[int, Ge(1), Le(SEEN)]
"""An option's number of clusters at most: each is a part of a compiled program, and has adapters at the server."""


def measure_distances(one: PyTree, other: PyTree) -> Float[Array, "P Q"]:
    """Compute 1 − cos between the factors of P and of Q, layer by layer, and the mean over layers.

    Leaves are [P, *stack, rows, columns] and [Q, *stack, rows, columns], of which each place of the stack is a layer.
    What is zero is at distance 1 from everything.

    >>> b = {"fc": {"b": jnp.asarray([[[1.0, 0.0]], [[3.0, 0.0]], [[0.0, 1.0]]])}}
    >>> measure_distances(b, b)[0].tolist()
    [0.0, 0.0, 1.0]
    """

    def as_directions(leaf: Array) -> Float[Array, "P layers numbers"]:
        rows = leaf.astype(jnp.float32).reshape(leaf.shape[0], -1, leaf.shape[-2] * leaf.shape[-1])
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    layers, cosines = 0, jnp.float32(0)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        left, right = as_directions(mine), as_directions(theirs)
        layers += left.shape[1]
        cosines += jnp.einsum("pln,qln->pq", left, right, precision="highest")
    return 1 - cosines / layers


def link_averages(distances: Distances, present: Bool[Array, " P"]) -> Int[Array, "P P"]:
    """Cluster by average linkage: from each by itself, the two nearest clusters are joined, until one is left.

    The distance of two clusters is the mean over their pairs; of equally near ones, those of the first places.

    Returns:
        Row c − 1 is the partition into c clusters: for each place the first place of its cluster. Rows of more clusters
        than there are places present, and places that are not, hold the place itself.

    >>> apart = jnp.asarray([[0.0, 1.0, 9.0], [1.0, 0.0, 8.0], [9.0, 8.0, 0.0]])
    >>> link_averages(apart, jnp.ones(3, bool)).tolist()
    [[0, 0, 0], [0, 0, 2], [0, 1, 2]]
    """
    places = len(present)
    alone = jnp.arange(places, dtype=jnp.int32)

    def join(step: Number, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        apart, sizes, label, table = carry
        heads = sizes > 0
        pairs = heads[:, None] & heads & (alone[:, None] < alone)
        nearest = jnp.argmin(jnp.where(pairs, apart, jnp.inf))
        first, second = jnp.divmod(nearest, places)
        both = sizes[first] + sizes[second]
        row = (sizes[first] * apart[first] + sizes[second] * apart[second]) / jnp.maximum(both, 1)
        joined = apart.at[first].set(row).at[:, first].set(row), sizes.at[first].set(both).at[second].set(0)
        label = jnp.where(pairs.any() & (label == second), first.astype(jnp.int32), label)
        apart, sizes = (jnp.where(pairs.any(), new, old) for new, old in zip(joined, (apart, sizes), strict=True))
        return apart, sizes, label, table.at[jnp.maximum(heads.sum() - 2, 0)].set(label)

    sizes = present.astype(distances.dtype)
    start = distances, sizes, alone, jnp.broadcast_to(alone, (places, places))
    return jax.lax.fori_loop(0, places - 1, join, start)[3]


def score_silhouette(distances: Distances, labels: Int[Array, " P"], present: Bool[Array, " P"]) -> Float[Array, ""]:
    """Compute the mean silhouette (b − a) / max(a, b) over the places present (Rousseeuw 1987).

    a is the mean distance from the others of the own cluster, b that from the nearest other cluster; who is alone in a
    cluster has 0, as in scikit-learn. `labels` are places, as of `link_averages`.

    >>> apart = jnp.asarray([[0.0, 1.0, 4.0], [1.0, 0.0, 4.0], [4.0, 4.0, 0.0]])
    >>> float(score_silhouette(apart, jnp.asarray([0, 0, 2]), jnp.ones(3, bool)))
    0.5
    """
    member = (labels[:, None] == jnp.arange(len(labels))) & present[:, None]  # [P, clusters]
    sizes = member.sum(axis=0)
    sums = jnp.matmul(jnp.where(present, distances, 0), member.astype(distances.dtype), precision="highest")
    own = jnp.take(sizes, labels)
    inside = jnp.take_along_axis(sums, labels[:, None], axis=1)[:, 0] / jnp.maximum(own - 1, 1)
    outside = jnp.min(jnp.where(member | (sizes == 0), jnp.inf, sums / jnp.maximum(sizes, 1)), axis=1)
    silhouettes = (outside - inside) / jnp.maximum(jnp.maximum(inside, outside), 1e-12)
    counts = present & (own > 1) & jnp.isfinite(outside)
    return jnp.sum(jnp.where(counts, silhouettes, 0)) / jnp.maximum(present.sum(), 1)


def choose_clusters(
    distances: Distances, present: Bool[Array, " P"], most: int
) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """Cluster by average linkage into as many clusters, from 2 to `most`, as have the best silhouette.

    Fewer than three places present are one cluster: a silhouette wants more places than clusters. Of equally good
    numbers the smallest.

    Returns:
        The clusters' numbers, `most` where nobody is; and how many there are.
    """
    partitions, many = link_averages(distances, present), present.sum()
    scores = jnp.full(most, -jnp.inf)
    for number in range(2, min(most, len(present)) + 1):
        score = score_silhouette(distances, partitions[number - 1], present)
        scores = scores.at[number - 1].set(jnp.where(number < many, score, -jnp.inf))
    best = jnp.argmax(scores)  # of none that is possible the first: one cluster
    return number_clusters(partitions[best], present, most), jnp.where(many > 0, best + 1, 0).astype(jnp.int32)


def number_clusters(labels: Int[Array, " P"], present: Bool[Array, " P"], none: int) -> Int[Array, " P"]:
    """Number the clusters from 0 in the order of their first places; `none` where nobody is.

    >>> number_clusters(jnp.asarray([0, 0, 2, 3]), jnp.asarray([True, True, True, False]), 9).tolist()
    [0, 0, 1, 9]
    """
    heads = (labels == jnp.arange(len(labels))) & present
    numbers = jnp.cumsum(heads, dtype=jnp.int32) - 1
    return jnp.where(present, jnp.take(numbers, labels), none).astype(jnp.int32)


def mean_by_cluster(stacked: PyTree, clusters: Int[Array, " K"], weights: Weights, most: int) -> PyTree:
    """Average what came of each cluster, [M, …]: Σ w_k x_k / Σ w_k over its members; 0 where none of them counts.

    >>> mean_by_cluster({"b": jnp.asarray([1.0, 3.0, 5.0])}, jnp.asarray([1, 1, 2]), jnp.ones(3), 2)["b"].tolist()
    [0.0, 2.0]
    """

    def average(cluster: Number) -> PyTree:
        mine = jnp.where(clusters == cluster, weights, 0)
        return tree.weighted_sum(stacked, mine / jnp.maximum(mine.sum(), 1e-12))

    return jax.lax.map(average, jnp.arange(most))


def describe_unreached(name: str, shared: str, warmup: int, rounds: int) -> str:
    """Say that no round comes after the warm-up of a method; "" where one does.

    Args:
        name: the method's.
        shared: what a cluster shares, which is trained after the warm-up.
        warmup, rounds: so many there are.

    >>> describe_unreached("fedlease", "expert", warmup=2, rounds=1)
    "in 1 round fedlease trains no cluster's expert: clients train alone up to the end of round 2 (--method.warmup)"
    """
    if warmup < rounds:
        return ""
    return (
        f"in {format_count(rounds, 'round')} {name} trains no cluster's {shared}: clients train alone up to the end of "
        f"round {warmup} (--method.warmup)"
    )


def read_cluster(clusters: Int[Array, " population"], number: Number, none: int) -> Number:
    """Look up the cluster of a client in the server's table; `none` for nobody's number.

    >>> int(read_cluster(jnp.asarray([1, 0]), jnp.int32(2), 4))
    4
    """
    return jnp.take(jnp.asarray(clusters), number, mode="fill", fill_value=none)


def find_part(parts: PyTree, cluster: Number, none: int, otherwise: PyTree) -> PyTree:
    """Select what a cluster has of parts [M, …], and what else there is for a client that is in none.

    >>> parts, other = {"b": jnp.asarray([1.0, 2.0])}, {"b": jnp.asarray(9.0)}
    >>> [find_part(parts, jnp.int32(cluster), 2, other)["b"].tolist() for cluster in (1, 2)]
    [2.0, 9.0]
    """
    mine = jax.tree.map(lambda leaf: jnp.take(leaf, jnp.minimum(cluster, none - 1), axis=0), parts)
    return tree.choose(cluster == none, otherwise, mine)


def replace_table(start: PyTree, received: PyTree) -> PyTree:
    """Put what a client received beside the start, and no table of clusters: the `View` of clustered methods.

    >>> replace_table({"start": 0, "scales": 1, "clusters": 2}, {"cluster": 3})
    {'start': 0, 'scales': 1, 'cluster': 3}
    """
    return {"start": start["start"], "scales": start["scales"], **received}


def write_clusters(
    table: Int[Array, " population"],
    numbers: Int[Array, " K"],
    clusters: Int[Array, " K"],
    counts: Bool[Array, " K"],
) -> Int[Array, " population"]:
    """Write the clusters of those who count into the server's table.

    >>> table, there = jnp.asarray([9, 9]), jnp.asarray([True, False])
    >>> write_clusters(table, jnp.asarray([1, 0]), jnp.asarray([2, 3]), there).tolist()
    [9, 2]
    """
    return jnp.asarray(table).at[jnp.where(counts, numbers, len(table))].set(clusters, mode="drop")
