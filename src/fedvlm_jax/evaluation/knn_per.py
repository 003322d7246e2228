"""kNN-Per (arXiv 2111.09360) on a VLM: a client's model mixed with what it remembers of its own training answers.

At every token of every training answer, the decoder's last state φ and the token y that followed are kept. A new state
finds its k nearest, and p_kNN(y) ∝ Σ_{i among them} 1[y = y_i] exp(−‖φ − φ_i‖ / τ), in the paper with τ = 1. The
authors' code has exp(−‖φ − φ_i‖² / (D τ)) instead, under which the nearest weighs less; both are here, and unless one
is asked for, all clients take the one that is likelier on all validation answers. The model then says p = λ p_kNN +
(1 − λ) p_h, with a λ for each client, the likeliest on its validation answers. Nothing is trained and nothing leaves
the client.

Deviation: the paper classifies images; here it is every token of a generated answer, as in kNN-LM (arXiv 1911.00172).
λ is chosen by the likelihood of the validation answers, which one pass knows for every λ; the paper takes accuracy.

Axes: N remembered tokens, D width, V vocabulary, k neighbours, C clients.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax.data.config import Split
from fedvlm_jax.data.tokenization import IGNORED
from fedvlm_jax.evaluation.evaluator import Adapters, Evaluator
from fedvlm_jax.models import Batch, Params, Vlm

AnyArray = Any  # a jax.Array on the device, a numpy array before it

SHARES = tuple(tenth / 10 for tenth in range(11))
"""The λ that are tried."""

Kernel = Literal["distance", "squared"]

KERNELS: tuple[Kernel, ...] = ("distance", "squared")
"""exp(−d / τ), as the paper writes it, and exp(−d² / (D τ)), as its authors' code has it."""

NOTHING = -1
"""The token of a place in the memory where nothing is kept."""

FLOOR = 1e-20
"""Of a probability, before its logarithm: what no neighbour says may still be scored."""


class Memory(NamedTuple):
    """What a client remembers.

    Attributes:
        states: [N, D] float32.
        tokens: [N] int32, what followed; `NOTHING` where nothing is kept.
        share: λ, how much the neighbours count.
        squared: is the kernel that of the squared distance?
    """

    states: Float[AnyArray, "N D"]
    tokens: Int[AnyArray, " N"]
    share: Float[AnyArray, ""]
    squared: Bool[AnyArray, ""]


class Recall(NamedTuple):
    """What stands in an adapter's place where a client also remembers."""

    adapter: PyTree
    memory: Memory


class Neighbours(NamedTuple):
    """What asking k neighbours at temperature τ takes, compiled once for all runs.

    Attributes:
        vlm: the model as `with_memory` makes it.
        keep: (params, adapters, batch [V, B, …]) -> `states` [V, B, U, D] and `tokens` [V, B, U] of the answers.
        weigh: (params, recalls, batch [V, B, …]) -> `likelihood` [V, B, kernel, λ] of the answers, whatever their own.
    """

    vlm: Vlm
    keep: Callable[..., dict[str, Array]]
    weigh: Callable[..., dict[str, Array]]


def make_neighbours(vlm: Vlm, neighbours: int, temperature: float) -> Neighbours:
    """The programs of k = `neighbours` at τ = `temperature`, for the bare model `vlm`."""

    def program(one: Callable[..., dict[str, Array]]) -> Callable[..., dict[str, Array]]:
        return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))

    return Neighbours(
        with_memory(vlm, neighbours, temperature),
        program(partial(_keep, vlm)),
        program(partial(_weigh, vlm, neighbours=neighbours, temperature=temperature)),
    )


def with_memory(vlm: Vlm, neighbours: int, temperature: float) -> Vlm:
    """The same model, which takes a `Recall` wherever it takes an adapter.

    Args:
        vlm: the model's record.
        neighbours: k.
        temperature: τ, in the units of the states' distance.
    """

    def amend(memory: Memory, states: Array, logits: Array) -> Array:
        remembered = _ask_neighbours(memory, states, logits.shape[-1], neighbours, temperature)
        mixed = memory.share * remembered + (1 - memory.share) * jax.nn.softmax(logits, axis=-1)
        # Where nothing is mixed in the logits stay as they are, bit for bit.
        return jnp.where(memory.share > 0, jnp.log(jnp.maximum(mixed, FLOOR)), logits)

    def encode(params: Params, own: PyTree, batch: Batch) -> PyTree:
        return vlm.encode(params, own.adapter if isinstance(own, Recall) else own, batch)

    def states(params: Params, own: PyTree, batch: Batch) -> tuple[Array, Array]:
        if not isinstance(own, Recall):
            return vlm.states(params, own, batch)
        found, logits = vlm.states(params, own.adapter, batch)
        return found, amend(own.memory, found, logits)

    def generate(params: Params, own: PyTree, batch: Batch, max_tokens: int, **options: Any) -> Array:
        if not isinstance(own, Recall):
            return vlm.generate(params, own, batch, max_tokens, **options)
        return vlm.generate(params, own.adapter, batch, max_tokens, amend=amend, recalled=own.memory, **options)

    return dataclasses.replace(vlm, encode=encode, states=states, generate=generate)


def _find(memory: Memory, states: Array, neighbours: int, temperature: float) -> tuple[Array, Array]:
    """The tokens [..., k] of the nearest states, and the weights [..., k] that sum to 1; all 0 without a memory."""
    # ‖x − m‖² = ‖x‖² + ‖m‖² − 2x·m: one matmul, and no [..., N, D].
    states = states.astype(jnp.float32)
    squares = jnp.sum(states**2, -1)[..., None] + jnp.sum(memory.states**2, -1) - 2 * states @ memory.states.T
    distances = jnp.where(memory.tokens == NOTHING, jnp.inf, jnp.sqrt(jnp.maximum(squares, 0.0)))
    nearest, places = jax.lax.top_k(-distances, min(neighbours, memory.tokens.shape[0]))
    far = jnp.where(memory.squared, nearest**2 / states.shape[-1], -nearest)
    weights = jnp.where(jnp.isfinite(nearest), jnp.exp((far[..., :1] - far) / temperature), 0.0)
    return memory.tokens[places], weights / jnp.maximum(weights.sum(-1, keepdims=True), FLOOR)


def _ask_neighbours(memory: Memory, states: Array, vocabulary: int, neighbours: int, temperature: float) -> Array:
    """p_kNN [..., V]."""
    tokens, weights = _find(memory, states, neighbours, temperature)
    flat, weights = tokens.reshape(-1, tokens.shape[-1]), weights.reshape(-1, tokens.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    said = jnp.zeros((flat.shape[0], vocabulary)).at[rows, jnp.maximum(flat, 0)].add(weights)
    return said.reshape(*states.shape[:-1], vocabulary)


def recall(
    evaluator: Evaluator,
    neighbours: Neighbours,
    params: PyTree,
    adapters: Adapters,
    numbers: Sequence[int],
    capacity: int,
    kernels: Sequence[Kernel] = KERNELS,
) -> tuple[Adapters, dict[str, float], Kernel]:
    """Let clients remember their training answers and choose how much these count, and by which kernel.

    Args:
        evaluator: of the population.
        neighbours: the programs.
        params: the base.
        adapters: every client's own.
        numbers: the clients that remember; the others, and those without a validation answer, have λ = 0.
        capacity: most tokens that a client keeps, evenly spaced over those that it has.
        kernels: to choose from; the first where there is no validation answer.

    Returns:
        Every client's recall, as its adapter was given; λ by client's name; and the kernel of all of them.
    """
    places = {number: place for place, number in enumerate(numbers)}
    stranger = len(numbers)  # the place of all who do not remember

    def rows(split: Split) -> dict[int, np.ndarray]:
        return {number: evaluator.examples.clients[number].rows_of(split) for number in numbers}

    kept = {
        client: _thin(parts, capacity)
        for client, parts in evaluator.visit(neighbours.keep, params, adapters, rows("train")).items()
    }
    size = max([1, *(len(tokens) for _, tokens in kept.values())])
    width = next((states.shape[-1] for states, _ in kept.values()), 1)
    memory = Memory(
        states=np.zeros((stranger + 1, size, width), np.float32),
        tokens=np.full((stranger + 1, size), NOTHING, np.int32),
        share=np.zeros(stranger + 1, np.float32),
        squared=np.zeros(stranger + 1, bool),
    )
    for client, (states, tokens) in kept.items():
        place = places[client]
        memory.states[place, : len(tokens)], memory.tokens[place, : len(tokens)] = states, tokens

    def remembering(asked: np.ndarray) -> PyTree:
        own = np.asarray([places.get(number, stranger) for number in asked.tolist()])
        return Recall(adapters(asked), jax.tree.map(lambda leaf: leaf[own], memory))

    tried = [KERNELS.index(kernel) for kernel in kernels]
    likelihood = {
        client: np.sum([part["likelihood"].sum(axis=0) for part in parts], axis=0)[tried]  # [kernel, λ]
        for client, parts in evaluator.visit(neighbours.weigh, params, remembering, rows("validation")).items()
    }
    # `argmax` would choose what is not a number.
    likelihood = {client: np.where(np.isfinite(one), one, -np.inf) for client, one in likelihood.items()}
    best = np.sum([one.max(axis=1) for one in likelihood.values()], axis=0) if likelihood else np.zeros(len(tried))
    kernel = int(np.argmax(best))
    memory.squared[:] = kernels[kernel] == "squared"
    shares: dict[str, float] = {}
    for client, one in likelihood.items():
        share = SHARES[int(np.argmax(one[kernel]))] if client in kept else 0.0
        memory.share[places[client]] = shares[evaluator.examples.clients[client].name] = share
    return remembering, shares, kernels[kernel]


def _keep(vlm: Vlm, params: PyTree, adapter: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
    return {"states": vlm.states(params, adapter, batch)[0].astype(jnp.float32), "tokens": batch["labels"]}


def _weigh(
    vlm: Vlm, params: PyTree, own: Recall, batch: Mapping[str, Array], neighbours: int, temperature: float
) -> dict[str, Array]:
    """The log-likelihood of every answer [B, kernel, λ], for all that are tried."""
    states, logits = vlm.states(params, own.adapter, batch)
    labels = batch["labels"]

    def remember(kernel: Kernel) -> Array:
        memory = own.memory._replace(squared=jnp.asarray(kernel == "squared"))
        tokens, weights = _find(memory, states, neighbours, temperature)
        return jnp.sum(weights * (tokens == labels[..., None]), -1)

    remembered = jnp.stack([remember(kernel) for kernel in KERNELS], axis=-1)  # [B, U, kernel]
    log_probs = jax.nn.log_softmax(logits, -1)
    says = jnp.exp(jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], -1)[..., 0])
    shares = jnp.asarray(SHARES)
    mixed = jnp.log(jnp.maximum(shares * remembered[..., None] + (1 - shares) * says[..., None, None], FLOOR))
    return {"likelihood": jnp.sum(mixed * (labels != IGNORED)[..., None, None], axis=-3)}


def _thin(parts: Sequence[Mapping[str, np.ndarray]], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([part["tokens"].ravel() for part in parts])
    states = np.concatenate([part["states"].reshape(-1, part["states"].shape[-1]) for part in parts])
    counted = np.flatnonzero(tokens != IGNORED)
    if len(counted) > capacity:
        counted = counted[np.linspace(0, len(counted) - 1, capacity).round().astype(int)]
    return states[counted], tokens[counted]
