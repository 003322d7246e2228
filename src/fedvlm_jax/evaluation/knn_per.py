"""kNN-Per (arXiv 2111.09360) on a VLM: a client's model mixed with the nearest tokens of its training answers.

At every token of every training answer, the decoder's last state φ and the token y that followed go to the client's
datastore. A new state finds its k nearest, and p_kNN(y) ∝ Σ_{i among them} 1[y = y_i] exp(−‖φ − φ_i‖ / τ), in the paper
with τ = 1. The authors' code has exp(−‖φ − φ_i‖² / (D τ)) instead, under which the nearest weighs less; unless the
options choose, all clients take the kernel that is likelier on all validation answers. Tokens then come from
p = λ p_kNN + (1 − λ) p_h, with each client's likeliest λ on its validation answers. Nothing is trained, and nothing
leaves the client.

Deviation: the paper classifies images; here it is every token of a generated answer, as in kNN-LM (arXiv 1911.00172).
λ is chosen by the likelihood of the validation answers, which one pass knows for every λ; the paper takes accuracy.

Axes: N stored tokens, D width, V vocabulary, k neighbours, C clients, U labels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.config import Split
from fedvlm_jax.evaluation.evaluator import Adapters, Evaluator
from fedvlm_jax.models import Batch, Params, Vlm

AnyArray = Any  # a jax.Array on the device, a numpy array before it

SHARES = tuple(tenth / 10 for tenth in range(11))
"""The λ that are tried."""

Kernel = Literal["distance", "squared"]
KERNELS: tuple[Kernel, ...] = ("distance", "squared")
"""exp(−d / τ), as the paper writes it, and exp(−d² / (D τ)), as its authors' code has it."""

EMPTY = -1
"""The token of an unused place of a datastore."""

FLOOR = 1e-20
"""Of a probability, before its logarithm: a token that no neighbour has may still be scored."""


class Datastore(NamedTuple):
    """The states of a client's training answers (float32), the tokens that followed, and how both are used."""

    states: Float[AnyArray, "N D"]
    tokens: Int[AnyArray, " N"]  # EMPTY where padding is
    share: Float[AnyArray, ""]  # λ, how much the neighbours count
    squared: Bool[AnyArray, ""]  # whether the kernel is that of the squared distance


class KnnAdapter(NamedTuple):
    """An adapter with a datastore, taken by `Neighbours.vlm` wherever a model takes an adapter."""

    adapter: PyTree
    datastore: Datastore


class Neighbours(NamedTuple):
    """The programs for k neighbours at temperature τ, compiled once for all runs; batches are [V, B, …].

    `keep` (params, adapters, batch) gives the `states` [V, B, U, D] and `tokens` [V, B, U] of the answers; `weigh`
    (params, `KnnAdapter`s, batch) their `likelihood` [V, B, kernel, λ], whatever share and kernel the datastores have.
    """

    vlm: Vlm  # as `with_datastore` makes it
    keep: Callable[..., dict[str, Array]]
    weigh: Callable[..., dict[str, Array]]


def make_neighbours(vlm: Vlm, neighbours: int, temperature: float) -> Neighbours:
    """Make the programs of k = `neighbours` at τ = `temperature` (in units of distance), for the bare model."""

    def keep(params: PyTree, adapter: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {"states": vlm.states(params, adapter, batch)[0].astype(jnp.float32), "tokens": batch["labels"]}

    weigh = partial(_weigh, vlm, neighbours=neighbours, temperature=temperature)
    programs = (jax.jit(jax.vmap(program, in_axes=(None, 0, 0))) for program in (keep, weigh))
    return Neighbours(with_datastore(vlm, neighbours, temperature), *programs)


def with_datastore(vlm: Vlm, neighbours: int, temperature: float) -> Vlm:
    """Return the same model, which takes a `KnnAdapter` wherever it takes an adapter."""

    def mix(datastore: Datastore, states: Array, logits: Array) -> Array:
        tokens, weights = _find_nearest(datastore, states, neighbours, temperature)
        flat, weights = tokens.reshape(-1, tokens.shape[-1]), weights.reshape(-1, tokens.shape[-1])
        rows = jnp.arange(flat.shape[0])[:, None]
        p_knn = jnp.zeros((flat.shape[0], logits.shape[-1])).at[rows, jnp.maximum(flat, 0)].add(weights)
        mixed = datastore.share * p_knn.reshape(logits.shape)
        mixed = mixed + (1 - datastore.share) * jax.nn.softmax(logits, axis=-1)
        # Where nothing is mixed in the logits stay as they are, bit for bit.
        return jnp.where(datastore.share > 0, jnp.log(jnp.maximum(mixed, FLOOR)), logits)

    def encode(params: Params, adapter: PyTree, batch: Batch) -> PyTree:
        return vlm.encode(params, adapter.adapter if isinstance(adapter, KnnAdapter) else adapter, batch)

    def states(params: Params, adapter: PyTree, batch: Batch) -> tuple[Array, Array]:
        if not isinstance(adapter, KnnAdapter):
            return vlm.states(params, adapter, batch)
        found, logits = vlm.states(params, adapter.adapter, batch)
        return found, mix(adapter.datastore, found, logits)

    def generate(params: Params, adapter: PyTree, batch: Batch, max_tokens: int, **options: Any) -> Array:
        if not isinstance(adapter, KnnAdapter):
            return vlm.generate(params, adapter, batch, max_tokens, **options)
        options |= {"amend": mix, "datastore": adapter.datastore}
        return vlm.generate(params, adapter.adapter, batch, max_tokens, **options)

    return dataclasses.replace(vlm, encode=encode, states=states, generate=generate)


def _find_nearest(datastore: Datastore, states: Array, neighbours: int, temperature: float) -> tuple[Array, Array]:
    """Return the tokens [..., k] of the nearest states, and their weights [..., k], of sum 1; 0 if all are empty."""
    # ‖x − m‖² = ‖x‖² + ‖m‖² − 2x·m: one matmul, and no [..., N, D].
    states = states.astype(jnp.float32)
    squares = jnp.sum(states**2, -1)[..., None] + jnp.sum(datastore.states**2, -1) - 2 * states @ datastore.states.T
    distances = jnp.where(datastore.tokens == EMPTY, jnp.inf, jnp.sqrt(jnp.maximum(squares, 0.0)))
    nearest, places = jax.lax.top_k(-distances, min(neighbours, datastore.tokens.shape[0]))
    far = jnp.where(datastore.squared, nearest**2 / states.shape[-1], -nearest)
    # Less the nearest's exponent, so that no weight underflows to a sum of 0.
    weights = jnp.where(jnp.isfinite(nearest), jnp.exp((far[..., :1] - far) / temperature), 0.0)
    return datastore.tokens[places], weights / jnp.maximum(weights.sum(-1, keepdims=True), FLOOR)


def build_datastores(
    evaluator: Evaluator,
    neighbours: Neighbours,
    params: PyTree,
    adapters: Adapters,
    numbers: Sequence[int],
    capacity: int,
    kernels: Sequence[Kernel] = KERNELS,
) -> tuple[Adapters, dict[str, float], Kernel]:
    """Store clients' training answers and choose by validation how much these count, and by which kernel.

    Args:
        evaluator, neighbours, params, adapters: of all clients, the programs, the base, the clients' adapters.
        numbers: the clients with a datastore; the others, and those without a validation answer, have λ = 0.
        capacity: most tokens that a client keeps, evenly spaced over those that it has.
        kernels: to choose from; the first where there is no validation answer.

    Returns:
        (client numbers) -> their `KnnAdapter`s; λ by client's name; and the kernel of all of them.
    """
    places = {number: place for place, number in enumerate(numbers)}

    def visit(program: Callable[..., Any], models: Adapters, split: Split) -> dict[int, list[dict[str, np.ndarray]]]:
        rows = {number: evaluator.examples.clients[number].rows_of(split) for number in numbers}
        return evaluator.visit(program, params, {"clients": models}, rows)["clients"]

    kept = {client: _thin(parts, capacity) for client, parts in visit(neighbours.keep, adapters, "train").items()}
    size = max([1, *(len(tokens) for _, tokens in kept.values())])
    width = next((states.shape[-1] for states, _ in kept.values()), 1)
    count = len(numbers) + 1  # the last place is that of all other clients, and stays empty
    datastores = Datastore(
        states=np.zeros((count, size, width), np.float32),
        tokens=np.full((count, size), EMPTY, np.int32),
        share=np.zeros(count, np.float32),
        squared=np.zeros(count, bool),
    )
    for client, (states, tokens) in kept.items():
        place = places[client]
        datastores.states[place, : len(tokens)], datastores.tokens[place, : len(tokens)] = states, tokens

    def attach(asked: np.ndarray) -> PyTree:
        at = np.asarray([places.get(number, count - 1) for number in asked.tolist()])
        return KnnAdapter(adapters(asked), jax.tree.map(lambda leaf: leaf[at], datastores))

    tried = [KERNELS.index(kernel) for kernel in kernels]
    likelihood: dict[int, np.ndarray] = {}
    for client, parts in visit(neighbours.weigh, attach, "validation").items():
        summed = np.sum([part["likelihood"].sum(axis=0) for part in parts], axis=0)[tried]  # [kernel, λ]
        # `argmax` would choose what is not a number.
        likelihood[client] = np.where(np.isfinite(summed), summed, -np.inf)
    best = np.sum([of_client.max(axis=1) for of_client in likelihood.values()], axis=0)
    kernel = int(np.argmax(best)) if likelihood else 0
    datastores.squared[:] = kernels[kernel] == "squared"
    shares: dict[str, float] = {}
    for client, of_client in likelihood.items():
        share = SHARES[int(np.argmax(of_client[kernel]))] if client in kept else 0.0
        datastores.share[places[client]] = shares[evaluator.examples.clients[client].name] = share
    return attach, shares, kernels[kernel]


def _weigh(
    vlm: Vlm, params: PyTree, model: KnnAdapter, batch: Mapping[str, Array], neighbours: int, temperature: float
) -> dict[str, Array]:
    """Compute the log-likelihood of every answer [B, kernel, λ], for all that are tried."""
    states, logits = vlm.states(params, model.adapter, batch)
    labels = batch["labels"]

    def weigh_kernel(kernel: Kernel) -> Array:
        datastore = model.datastore._replace(squared=jnp.asarray(kernel == "squared"))
        tokens, weights = _find_nearest(datastore, states, neighbours, temperature)
        return jnp.sum(weights * (tokens == labels[..., None]), -1)

    p_knn = jnp.stack([weigh_kernel(kernel) for kernel in KERNELS], axis=-1)  # [B, U, kernel]
    log_probs = jax.nn.log_softmax(logits, -1)
    p_model = jnp.exp(jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], -1)[..., 0])
    shares = jnp.asarray(SHARES)
    mixed = jnp.log(jnp.maximum(shares * p_knn[..., None] + (1 - shares) * p_model[..., None, None], FLOOR))
    return {"likelihood": jnp.sum(mixed * (labels != IGNORED)[..., None, None], axis=-3)}


def _thin(parts: Sequence[Mapping[str, np.ndarray]], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Join the states and tokens of all pieces, and keep at most `capacity` of those that count, evenly spaced."""
    tokens = np.concatenate([part["tokens"].ravel() for part in parts])
    states = np.concatenate([part["states"].reshape(-1, part["states"].shape[-1]) for part in parts])
    counted = np.flatnonzero(tokens != IGNORED)
    if len(counted) > capacity:
        counted = counted[np.linspace(0, len(counted) - 1, capacity).round().astype(int)]
    return states[counted], tokens[counted]
