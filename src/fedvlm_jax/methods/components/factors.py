"""Arithmetic on the factors of adapters: their names, norms and mixtures, and products that are never formed.

Updates of many clients stand side by side: Σ_k w_k a_k b_k is one product of [d_in, K·R] and [K·R, d_out], so no matrix
of the model's own size is needed. Everything is batched over stacked layers and works on one site's factors:
`a` [K, *stack, d_in, R], `b` [K, *stack, R, d_out].
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import is_factor
from fedvlm_jax.utils import tree

Site = dict[str, Array]  # the leaves of one site by name


def leaf_name(path: str) -> str:
    """Name the factor that a leaf is, also where a rule split off a layer.

    >>> leaf_name("fc1/b"), leaf_name("fc1/b/3")
    ('b', 'b')
    """
    return next(part for part in reversed(path.split("/")) if not part.replace(".", "").isdigit())


def only(*names: str) -> Callable[[str], bool]:
    """Make (path) -> whether the leaf is one of these factors.

    >>> only("a", "gate")("fc1/gate")
    True
    """
    return lambda path: leaf_name(path) in names


def only_a(part: PyTree) -> PyTree:
    """Select the factors A."""
    return tree.partition(part, only("a"))[0]


def split_scales(adapter: lora.Adapter) -> tuple[PyTree, PyTree]:
    """Split an adapter into factors and scales.

    >>> split_scales({"fc1": {"a": 1, "b": 2, "scale": 3}})
    ({'fc1': {'a': 1, 'b': 2}}, {'fc1': {'scale': 3}})
    """
    return tree.partition(adapter, is_factor)


def by_site(factors: PyTree) -> dict[str, Site]:
    """Group leaves by name under the paths of their sites; for whole adapters, whose layers no rule split.

    >>> by_site({"encoder": {"fc1": {"a": 1, "b": 2}}})
    {'encoder/fc1': {'a': 1, 'b': 2}}
    """
    sites: dict[str, Site] = {}
    for path, leaf in tree.flatten(factors).items():
        head, _, name = path.rpartition("/")
        sites.setdefault(head, {})[name] = leaf
    return sites


def map_sites(rule: Callable[..., Mapping[str, Array]], *factors: PyTree) -> PyTree:
    """Make a tree of what `rule` makes of every site's leaves."""
    first, *others = (by_site(part) for part in factors)
    made = {path: rule(site, *(other[path] for other in others)) for path, site in first.items()}
    return tree.unflatten({f"{path}/{name}": leaf for path, site in made.items() for name, leaf in site.items()})


def merge_middle(adapter: PyTree, middle: PyTree, name: str) -> PyTree:
    """Multiply a middle factor [*stack, R, R] of every site into its B, so that the product is a b again."""
    return map_sites(lambda site, between: {**site, "b": matmul(between[name], site["b"])}, adapter, middle)


def norm_of(part: PyTree) -> Float[Array, ""]:
    """Compute the Frobenius norm over all leaves; 0 where there are none.

    >>> float(norm_of({"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}))
    5.0
    """
    leaves = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(part)]
    return jnp.sqrt(sum(leaves, start=jnp.float32(0)))


def personal_drift(private: PyTree, start: PyTree) -> Float[Array, ""]:
    """Compute ‖A_k − A_0‖ / ‖A_0‖ over the private factors A; 0 where none is private.

    A method whose private part hardly moves is another method under its name. `start` is what this client began with,
    in its own rank; A at least.
    """
    first = only_a(start)
    return norm_of(jax.tree.map(jnp.subtract, only_a(private), first)) / jnp.maximum(norm_of(first), 1e-12)


def matmul(x: Array, y: Array) -> Array:
    """Multiply in float32."""
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")


def side_by_side(
    a: Float[Array, "K *stack d_in R"], b: Float[Array, "K *stack R d_out"], weights: Float[Array, " K"]
) -> tuple[Float[Array, "*stack d_in KR"], Float[Array, "*stack KR d_out"]]:
    """Make factors of Σ_k w_k a_k b_k; clients that do not count are zero, whatever they hold."""
    counts = weights.reshape(-1, *[1] * (a.ndim - 1))
    left, right = jnp.where(counts == 0, 0, counts * a), jnp.where(counts == 0, 0, b)
    left = jnp.moveaxis(left, 0, -2)  # [*stack, d_in, K, R]
    right = jnp.moveaxis(right, 0, -3)  # [*stack, K, R, d_out]
    return left.reshape(*left.shape[:-2], -1), right.reshape(*right.shape[:-3], -1, right.shape[-1])


def deviations(
    a: Float[Array, "K *stack d_in R"], b: Float[Array, "K *stack R d_out"], weights: Float[Array, " K"]
) -> tuple[Float[Array, "*stack d_in KR"], Float[Array, "*stack KR d_out"]]:
    """Make factors of E = Σ p_k a_k b_k − ā b̄ = Σ p_k (a_k − ā)(b_k − b̄): what averaging the factors leaves out."""
    mean_a, mean_b = (tree.weighted_sum(x, weights) for x in (a, b))
    return side_by_side(a - mean_a, b - mean_b, weights)


def mix(first: PyTree, second: PyTree, scales: PyTree, weight: Array | float) -> lora.Adapter:
    """Make the adapter whose term is (1 − weight) times the first one's plus weight times the second one's.

    The weight has no gradient: it goes into the scales.
    """
    parts = [
        tree.combine(factors, jax.tree.map(lambda scale, w=w: w * scale, scales))
        for factors, w in ((first, 1 - weight), (second, weight))
    ]
    return lora.concatenate(*parts)


def cosines(one: PyTree, several: PyTree) -> Float[Array, " P"]:
    """Compute a tree's cosine similarity with each of several [P, …], all leaves side by side; 0 with what is zero.

    >>> cosines({"c": jnp.asarray([1.0, 0.0])}, {"c": jnp.asarray([[2.0, 0.0], [0.0, 3.0]])}).tolist()
    [1.0, 0.0]
    """
    leaves = list(zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True))
    products = sum(jnp.einsum("...,p...->p", x, each, precision="highest") for x, each in leaves)
    squares = sum(jnp.einsum("p...,p...->p", each, each, precision="highest") for _, each in leaves)
    mine = sum(jnp.sum(jnp.square(x)) for x, _ in leaves)
    return products / jnp.maximum(jnp.sqrt(squares * mine), 1e-12)


def softmax_among(scores: Float[Array, " P"], allowed: Bool[Array, " P"]) -> Float[Array, " P"]:
    """Compute the softmax of the scores that are allowed; 0 for the others, and for all where none is.

    >>> softmax_among(jnp.asarray([1.0, 1.0, 9.0]), jnp.asarray([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores)
    # Where nobody is allowed the largest score is -inf, and a difference of two infinities would be no number.
    raised = jnp.where(allowed, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    return raised / jnp.maximum(raised.sum(), 1e-12)
