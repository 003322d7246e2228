"""Clusters of clients that differ from layer to layer, along one tree, and means over them.

Shapes are those of `clusters.py`: P places, of which some are nobody's, and numbers of clusters below `most`. Layers
are numbered with depth; a site's stack has a layer in each place.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Number, Setup
from fedvlm_jax.methods.components.clusters import link_averages, number_clusters, score_silhouette
from fedvlm_jax.methods.components.factors import by_site
from fedvlm_jax.utils import tree


def number_layers(factors: PyTree, setup: Setup) -> tuple[dict[str, Int[np.ndarray, "*stack"]], int]:
    """Number the layers from the shallowest: for each site, the layer of each place of its stack; and how many.

    A layer is what shares a path up to its last number, `decoder/layers/3`, or else the path without the site's name.

    >>> setup = Setup(sites={}, spec=lora.LoRA(), start_optimizer=dict, components={"enc": "e/", "dec": "d/"})
    >>> site = {"a": np.zeros((2, 1)), "b": np.zeros((1, 2))}
    >>> number_layers({"d": {"0": {"fc1": site}, "10": {"q": site}}, "e": {"9": {"q": site, "fc1": site}}}, setup)
    ({'d/0/fc1': array(1), 'd/10/q': array(2), 'e/9/fc1': array(0), 'e/9/q': array(0)}, 3)
    """
    names: dict[str, list[str]] = {}
    for path in by_site(factors):
        sites = setup.sites if path in setup.sites else None
        paths = lora.virtual_paths(factors, f"{path}/a", sites)
        names[path] = [name_layer(each.rpartition("/")[0]) for each in paths]

    def find_depth(name: str) -> tuple[int, list[tuple[int, str]]]:
        parts = list(setup.components.values())
        component = next((i for i, part in enumerate(parts) if re.match(part, f"{name}/")), len(parts))
        pieces = re.split(r"(\d+)", name)
        return component, [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]

    order = sorted({name for layers in names.values() for name in layers}, key=find_depth)
    stacks = {path: site["a"].shape[:-2] for path, site in by_site(factors).items()}
    places = {path: np.asarray([order.index(name) for name in layers]) for path, layers in names.items()}
    return {path: np.reshape(at, stacks[path]) for path, at in places.items()}, len(order)


def name_layer(path: str) -> str:
    """Name the layer that a site is in.

    >>> name_layer("decoder/layers/3/fc1"), name_layer("tower/blocks_0/conv1/fc2"), name_layer("projector/linear")
    ('decoder/layers/3', 'tower/blocks_0', 'projector')
    """
    numbered = re.match(r"(.*/)?([^/]*_)?\d+(?=/)", path)
    return numbered[0] if numbered else path.rpartition("/")[0]


def measure_layer_distances(
    one: PyTree, other: PyTree, depths: dict[str, Int[np.ndarray, "*stack"]], layers: int
) -> Float[Array, "layers P Q"]:
    """Compute ‖B_i − B_j‖ of P and of Q in every layer, the mean over its sites; leaves [P, *stack, r, d_out]."""
    sums, sizes = jnp.float32(0), np.zeros(layers)
    theirs = by_site(other)
    for path, site in by_site(one).items():
        rows = [part["b"].astype(jnp.float32) for part in (site, theirs[path])]
        left, right = (x.reshape(len(x), -1, x.shape[-2] * x.shape[-1]) for x in rows)
        # One client at a time: all pairs at once are P times as much memory.
        apart = jax.lax.map(lambda mine, right=right: jnp.linalg.norm(mine - right, axis=-1), left)  # [P, Q, places]
        into = np.eye(layers)[depths[path].reshape(-1)]  # [places, layers]
        sums += jnp.einsum("pqs,sl->lpq", apart, into, precision="highest")
        sizes += into.sum(axis=0)
    return sums / sizes[:, None, None]


def cut_tree(
    distances: Float[Array, "layers P P"], present: Bool[Array, " P"], most: int, window: int, threshold: float
) -> Int[Array, "layers P"]:
    """Cluster places in every layer, `most` where nobody is: one tree of the mean distances, cut ever more finely.

    A layer has from as many clusters c as the layer before up to c + `window` − 1, at most `most` and less than places
    present: of these the number with the best silhouette under its own distances, one cluster counting as `threshold`.

    >>> apart = jnp.asarray([[0.0, 1.0, 9.0, 9.0], [1.0, 0.0, 9.0, 9.0], [9.0, 9.0, 0.0, 1.0], [9.0, 9.0, 1.0, 0.0]])
    >>> cut_tree(jnp.stack([jnp.ones((4, 4)), apart]), jnp.ones(4, bool), 3, 2, 0.1).tolist()
    [[0, 0, 0, 0], [0, 0, 1, 1]]
    """
    finest, many = min(most, len(present)), present.sum()
    window = min(window, most)  # beyond which it would leave the integers
    partitions = link_averages(distances.mean(axis=0), present)
    scores = jnp.stack(
        [jnp.full(len(distances), threshold)]
        + [
            jax.vmap(lambda layer, cut=cut: score_silhouette(layer, partitions[cut], present))(distances)
            for cut in range(1, finest)
        ],
        axis=1,
    )  # [layers, numbers of clusters]
    numbers = jnp.arange(1, finest + 1)

    def choose_cut(before: Number, scores: Float[Array, " numbers"]) -> tuple[Number, Number]:
        allowed = (numbers >= before) & (numbers < before + window) & (numbers < many)
        cut = numbers[jnp.argmax(jnp.where(allowed | (numbers == before), scores, -jnp.inf))]
        return cut, cut

    cuts = jax.lax.scan(choose_cut, jnp.int32(1), scores)[1]
    return jax.vmap(lambda cut: number_clusters(partitions[cut - 1], present, most))(cuts)


def mean_by_layer(
    stacked: PyTree,
    clusters: Int[Array, "K layers"],
    counts: Bool[Array, " K"],
    most: int,
    depths: dict[str, Int[np.ndarray, "*stack"]],
) -> PyTree:
    """Average what came of each cluster in each layer, [most, *stack, …], plainly; 0 where nobody of it counts."""

    def average(path: str, leaf: Array) -> Array:
        mine = clusters[:, depths[path]]  # [K, *stack]
        member = (mine[..., None] == jnp.arange(most)) & counts.reshape(-1, *[1] * mine.ndim)
        shares = member / jnp.maximum(member.sum(axis=0), 1)
        leaf = jnp.where(counts.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)
        return jnp.einsum("k...m,k...ij->m...ij", shares, leaf, precision="highest").astype(leaf.dtype)

    flat = tree.flatten(stacked)
    return tree.unflatten({path: average(path.rpartition("/")[0], leaf) for path, leaf in flat.items()})
