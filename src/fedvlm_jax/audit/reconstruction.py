"""Layer inputs in the span of what a client sent: linear algebra, and no optimisation.

A layer adds s (x A) B to its output. With δ the loss's gradient by that output, ∇A = s Σ xᵀ (δ Bᵀ): its columns are
sums of inputs, whatever B is. ∇B = s Σ (x A)ᵀ δ holds inputs through A alone, so the directions of the input space that
it tells of are those of A ∇B, within the R columns of A; who does not know A takes a guess of it. Where there are as
many tokens as ranks, A ∇B spans all columns of A, and tells nothing of the rows that A did not.

That inputs lie in the span of a gradient is what exact gradient inversion rests on (DAGER, arXiv 2405.15586). Axes:
B rows, T tokens, D width of a layer's input, R rank.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.adapter import COLLECTION
from fedvlm_jax.models import Params, Vlm
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.digests import digest_parts

TOLERANCE = 1e-4
"""Singular values below this share of the largest count as none: float32 leaves about 1e-6 of them."""

Layer = tuple[str, int]
"""A site and which of its stacked layers."""
Inputs = dict[Layer, Float[np.ndarray, "rows tokens width"]]
"""The inputs of every row at each layer; zeros where it is padded."""


class Captured(NamedTuple):
    """Shares of layer inputs' energy in a span, means over layers and rows.

    Attributes:
        batch: of the rows that were trained on.
        unrelated: of other rows of the same client.
        random: of anything in a random span of the same dimension, D' / D.
        dimension: of the span.
    """

    batch: float
    unrelated: float
    random: float
    dimension: float


def find_span(matrix: Float[np.ndarray, "width columns"]) -> Float[np.ndarray, "width dimension"]:
    """Find an orthonormal basis of a matrix's columns; no column for what is zero.

    >>> find_span(np.asarray([[2.0, 4.0], [0.0, 0.0]])).shape
    (2, 1)
    """
    left, values, _ = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return left[:, values > TOLERANCE * max(values[0] if len(values) else 0.0, np.finfo(np.float64).tiny)]


def share_in(basis: Float[np.ndarray, "width dimension"], inputs: Float[np.ndarray, "tokens width"]) -> float:
    """Compute the share of inputs' energy that lies in a span, ‖P X‖² / ‖X‖²; 1 − it is the squared relative residual.

    >>> share_in(np.asarray([[1.0], [0.0]]), np.asarray([[3.0, 4.0]]))
    0.36
    """
    exact = inputs.astype(np.float64)
    inside, total = exact @ basis, float(np.vdot(exact, exact))
    return float(np.vdot(inside, inside)) / total if total else 0.0


def list_matrices(message: Mapping[str, Any], adapter: lora.Adapter) -> dict[Layer, Float[np.ndarray, "width columns"]]:
    """Lay out what a message tells of each layer's input space: ∆A, and of A ∆B as many columns as it has ranks.

    A ∆B = (A Rᵀ) Qᵀ, where ∆Bᵀ = Q R: so A Rᵀ has its left singular vectors and its singular values.

    Args:
        message: a client's, a tree of updates; leaves that are no factors at whole sites are left out.
        adapter: what is known of the client's factors; of it A is read.

    >>> a, b = np.ones((4, 2)), np.ones((2, 3))
    >>> list_matrices({"fc": {"a": a}}, {"fc": {"a": a, "b": b}})[("fc", 0)].shape
    (4, 2)
    """
    known, found = tree.flatten(adapter), dict[Layer, list[np.ndarray]]()
    for path, leaf in tree.flatten(message).items():
        site, _, name = path.rpartition("/")
        factor = known.get(f"{site}/a")
        if name not in ("a", "b") or factor is None or np.shape(leaf) != np.shape(known[path]):
            continue
        updates, factors = (np.asarray(x, np.float64).reshape(-1, *np.shape(x)[-2:]) for x in (leaf, factor))
        for layer, (update, a) in enumerate(zip(updates, factors, strict=True)):
            columns = update if name == "a" else a @ np.asarray(np.linalg.qr(update.T, mode="r")).T
            found.setdefault((site, layer), []).append(columns)
    return {layer: np.concatenate(parts, axis=1) for layer, parts in found.items()}


def capture_inputs(vlm: Vlm, params: Params, adapter: lora.Adapter, batch: Mapping[str, np.ndarray]) -> Inputs:
    """Run a model on rows and keep what enters each dense layer with an adapter.

    Operation by operation, so that what is inside of a scan over layers can be read. Layers that a row enters more than
    once, as those of a tower that sees several pictures, are left out.
    """
    seen: dict[str, list[np.ndarray]] = {}

    def keep(next_fun: Any, args: Any, kw: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        here = context.method_name == "__call__" and type(module) is nn.Dense and module.scope is not None
        if here and module.has_variable(COLLECTION, "a"):
            seen.setdefault("/".join(module.path), []).append(np.asarray(args[0], np.float32))
        return next_fun(*args, **kw)

    with jax.disable_jit(), nn.intercept_methods(keep):
        vlm.logits(params, adapter, batch)
    rows, stacks = len(batch["labels"]), {path: site.stack for path, site in vlm.sites.items()}
    whole = {
        path: layers
        for path, layers in seen.items()
        if len(layers) == math.prod(stacks[path]) and all(x.ndim == 3 and len(x) == rows for x in layers)
    }
    return {
        # What has overflowed tells nothing.
        (path, layer): np.where(np.isfinite(x), x, 0) * _mark_real(batch, x.shape[1])[..., None]
        for path, layers in whole.items()
        for layer, x in enumerate(layers)
    }


def _mark_real(batch: Mapping[str, np.ndarray], tokens: int) -> np.ndarray:
    """Mark the tokens that are no padding: of the prompt, of the answer, or of both after each other."""
    prompt, answer = batch["attention_mask"] > 0, batch["labels"] >= 0
    for real in (prompt, answer, np.concatenate([prompt, answer], axis=1)):
        if real.shape[1] == tokens:
            return real
    return np.ones((len(prompt), tokens), bool)


def find_bases(inputs: Inputs) -> Inputs:
    """Find an orthonormal basis of each row's inputs at every layer, as rows of a matrix; zeros after the last.

    >>> np.abs(find_bases({("fc", 0): np.asarray([[[0.0, 2.0], [0.0, 4.0]]])})[("fc", 0)]).round(3).tolist()
    [[[0.0, 1.0], [0.0, 0.0]]]
    """
    found, known = Inputs(), dict[bytes, np.ndarray]()
    for layer, x in inputs.items():
        digest = digest_parts([np.ascontiguousarray(x)], *x.shape)  # projections of one layer often share their input
        if digest not in known:
            # From the tokens' products, which are fewer numbers than the inputs: X Xᵀ = U Λ Uᵀ, basis Λ^(-1/2) Uᵀ X.
            exact = x.astype(np.float64)
            squares, vectors = (part[..., ::-1] for part in np.linalg.eigh(exact @ exact.swapaxes(1, 2)))
            values = np.sqrt(np.maximum(squares, 0))
            real = values > TOLERANCE * np.maximum(values[:, :1], np.finfo(np.float32).tiny)
            scales = np.divide(1, values, out=np.zeros_like(values), where=real)
            known[digest] = (scales[..., None] * (vectors.swapaxes(1, 2) @ exact)).astype(x.dtype)
        found[layer] = known[digest]
    return found


def measure_spans(spans: Mapping[Layer, np.ndarray], batch: Inputs, unrelated: Inputs) -> Captured | None:
    """Compare what a span holds of the rows that were trained on and of others; None where it holds nothing."""
    layers = _list_layers(spans, batch)
    if not layers:
        return None

    def mean(inputs: Inputs) -> float:
        return float(np.mean([share_in(spans[at], inputs[at].reshape(-1, inputs[at].shape[-1])) for at in layers]))

    shape = np.asarray([spans[layer].shape for layer in layers], np.float64)
    return Captured(mean(batch), mean(unrelated), float((shape[:, 1] / shape[:, 0]).mean()), float(shape[:, 1].mean()))


def rank_rows(spans: Mapping[Layer, np.ndarray], bases: Inputs) -> Float[np.ndarray, " rows"]:
    """Score every row by the share of the spans that its inputs explain (see `find_bases`), the mean over layers."""
    layers = _list_layers(spans, bases)
    count = len(next(iter(bases.values()), ()))
    if not layers:
        return np.zeros(count)
    shares = [((bases[at] @ spans[at]) ** 2).sum((1, 2)) / spans[at].shape[1] for at in layers]
    return np.mean(shares, axis=0)


def _list_layers(spans: Mapping[Layer, np.ndarray], inputs: Inputs) -> list[Layer]:
    return [layer for layer, basis in spans.items() if basis.shape[1] and layer in inputs]


def find_spans(message: PyTree, adapter: lora.Adapter) -> dict[Layer, np.ndarray]:
    """Find at every layer the span of what a message tells of its inputs; see `list_matrices`."""
    return {layer: find_span(matrix) for layer, matrix in list_matrices(message, adapter).items()}
