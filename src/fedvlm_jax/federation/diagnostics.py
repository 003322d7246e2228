"""Numbers for every round's line: what an aggregation left out, and how far apart the clients are.

They are computed from the adapters that the clients trained, whatever the method, in a program of their own, so that
the round itself keeps its one all-reduce. Clients that do not count are left out.

    aggregation_error     ‖Σ p_k A_k B_k − Ā B̄‖_F / ‖Σ p_k A_k B_k‖_F, in all and per part of the model: what averaging
                          both factors would lose (it is what fedavg-lora does lose)
    angle_a               between the column spaces of two clients' A, in degrees: the angle whose cosine is the root
                          mean square of the principal angles' cosines, mean over pairs of clients and sites; where two
                          adapters stand side by side, like with like, mean over both. Of unlike ranks the smaller
                          one's angles count, and an adapter that is zero as yet is compared with nothing
    update_dissimilarity  1 − cosine of two clients' low-rank terms s·A B, mean over pairs of clients

Pairs are those of all clients that count, or of PAIRED of them, drawn alike in each round: they grow with the square.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.adapter import BOTTLENECK, GATE
from fedvlm_jax.methods.components.factors import deviations, matmul, side_by_side
from fedvlm_jax.utils import tree

OF_PAIRS = ("angle_a", "update_dissimilarity")  # they mean something only where at least two clients count
OF_CLIENTS = ("clip_fraction", "noise_to_update")  # of a private round, where at least one does
PAIRED = 64  # clients among whom pairs are compared, where more train
WIDEST_GRAM = 1024  # columns side by side; with more the product itself takes less memory

Component = Callable[[str], str | None]  # (path) -> the part of the model that it lies in


def examine(
    adapters: PyTree, weights: Float[Array, " K"], beside: int = 1, component: Component = lambda path: None
) -> dict[str, Float[Array, ""]]:
    """Compute the numbers for adapters [K, …] as they were trained; none where a gate or a bottleneck is no matrix.

    They are of the low-rank factors alone: of a soft prompt without any there is none.

    `beside` is how many adapters of one rank stand side by side in each, see `Method.pairs`; `component` tells parts of
    the model apart, see `Vlm.component`, and "rest" stands for None.
    """
    if any(path.rpartition("/")[2] in (GATE, *BOTTLENECK) for path in tree.flatten(adapters)):
        return {}
    adapters = lora.low_rank(adapters)
    if not adapters:
        return {}
    counts = (weights > 0).astype(jnp.float32)
    few = _draw_few(counts)
    counts = counts[few]
    pairs = jnp.maximum(counts.sum() ** 2 - counts.sum(), 1)
    lost: dict[str, Array] = {}
    whole: dict[str, Array] = {}
    clients = len(counts)
    grams = jnp.zeros((clients, clients))
    cosines, zero = [], jnp.float32(0)
    for path, (a, b, scale) in lora.sites_of(adapters):
        b = b * scale[..., None, None]
        group = component(f"{path}/") or "rest"
        lost[group] = lost.get(group, 0) + _squared_norm(*deviations(a, b, weights))
        whole[group] = whole.get(group, 0) + _squared_norm(*side_by_side(a, b, weights))
        a, b = a[few], b[few]
        # ⟨a_i b_i, a_j b_j⟩ for all pairs of clients, summed over layers, from one Gram matrix [*stack, KR, KR].
        gram, rank = _gram(*side_by_side(a, b, counts)), a.shape[-1]
        grams += gram.reshape(-1, clients, rank, clients, rank).sum(axis=(0, 2, 4))
        parts = zip(jnp.split(a, beside, axis=-1), jnp.split(b, beside, axis=-2), strict=True)
        cosines += [_mean_cosine(*pair, counts) for pair in parts]
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(grams), 1e-24))
    likeness = jnp.sum((grams / (norms[:, None] * norms)) * (1 - jnp.eye(clients))) / pairs
    errors = {f"aggregation_error/{group}": _ratio(lost[group], whole[group]) for group in lost if len(lost) > 1}
    known = sum((known for _, known in cosines), start=zero)
    total = sum((cosine * known for cosine, known in cosines), start=zero)
    cosine = jnp.where(known > 0, total / jnp.maximum(known, 1), 1.0)  # no angle where there is nothing to compare
    return {
        "aggregation_error": _ratio(sum(lost.values(), start=zero), sum(whole.values(), start=zero)),
        **errors,
        "angle_a": jnp.degrees(jnp.arccos(jnp.clip(cosine, 0, 1))),
        "update_dissimilarity": 1 - likeness,
    }


def _draw_few(counts: Float[Array, " K"]) -> Int[Array, " few"] | slice:
    """Draw PAIRED of the clients that count, by their places; all where there are no more places than that.

    >>> sorted(_draw_few(jnp.arange(200) % 3 == 0).tolist())[:4]
    [0, 3, 6, 9]
    >>> _draw_few(jnp.ones(16))
    slice(None, None, None)
    """
    if len(counts) <= PAIRED:
        return slice(None)
    order = np.random.default_rng(0).permutation(len(counts))
    first = jnp.argsort(counts[order] == 0, stable=True)[:PAIRED]
    return jnp.asarray(order)[first]


def _ratio(part: Array, of: Array) -> Array:
    return jnp.sqrt(part / jnp.maximum(of, 1e-24))


def _gram(left: Float[Array, "*stack d_in R"], right: Float[Array, "*stack R d_out"]) -> Float[Array, "*stack R R"]:
    return matmul(left.mT, left) * matmul(right, right.mT)


def _squared_norm(left: Float[Array, "*stack d_in R"], right: Float[Array, "*stack R d_out"]) -> Array:
    """Compute ‖left right‖² = tr(leftᵀ left · right rightᵀ), over all layers.

    >>> float(_squared_norm(jnp.asarray([[3.0], [4.0]]), jnp.asarray([[1.0, 0.0]])))
    25.0
    """
    if left.shape[-1] > WIDEST_GRAM:
        return jnp.sum(jnp.square(matmul(left, right)))
    return jnp.maximum(jnp.sum(_gram(left, right)), 0)


def _mean_cosine(a: Array, b: Array, counts: Array) -> tuple[Array, Array]:
    """Compute the root mean square cosine between column spaces of A, mean over pairs of clients and layers.

    Beside it 1, or 0 where there is no pair. Who adds nothing at a site, its b being zero, is in no pair: such an A is
    as it was drawn.
    """
    basis = _orthonormalise(a.astype(jnp.float32))  # [K, *stack, d_in, R]
    clients, rank = a.shape[0], a.shape[-1]
    wide = jnp.moveaxis(basis, 0, -2).reshape(-1, a.shape[-2], clients * rank)
    squared = jnp.square(matmul(wide.mT, wide)).reshape(-1, clients, rank, clients, rank).sum(axis=(2, 4))
    columns = jnp.round(jnp.square(wide).reshape(-1, a.shape[-2], clients, rank).sum(axis=(1, 3)))  # zero ones are none
    fewer = jnp.minimum(columns[:, :, None], columns[:, None, :])
    adds = jnp.moveaxis(jnp.any(b != 0, axis=(-2, -1)), 0, -1).reshape(-1, clients)
    compared = counts[:, None] * counts * (1 - jnp.eye(clients)) * (fewer > 0) * adds[:, :, None] * adds[:, None, :]
    cosines = jnp.sqrt(squared / jnp.maximum(fewer, 1)) * compared
    number = jnp.sum(compared)
    return jnp.sum(cosines) / jnp.maximum(number, 1), (number > 0).astype(jnp.float32)


def _orthonormalise(a: Float[Array, "*stack d_in R"]) -> Float[Array, "*stack d_in R"]:
    """Orthonormalise columns by Gram-Schmidt, each twice; those that depend on earlier ones become zero."""

    # Plain products, not `jnp.linalg.qr`: on a CPU with few threads several batched ones at once may wait for each
    # other for ever.
    def settle(index: Array, basis: Array) -> Array:
        column = jnp.take(basis, index, axis=-1)[..., None]
        before = jnp.where(jnp.arange(a.shape[-1]) < index, basis, 0)
        start = jnp.linalg.norm(column, axis=-2, keepdims=True)
        for _ in range(2):
            column = column - matmul(before, matmul(before.mT, column))
        length = jnp.linalg.norm(column, axis=-2, keepdims=True)
        column = jnp.where(length > 1e-5 * start, column / jnp.maximum(length, 1e-30), 0)
        return jnp.where(jnp.arange(a.shape[-1]) == index, column, basis)

    return jax.lax.fori_loop(0, a.shape[-1], settle, a)
