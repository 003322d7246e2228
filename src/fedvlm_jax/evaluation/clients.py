"""Evaluating every client with its own model: many clients' adapters at once, on one base.

Axes: C clients, N examples of a client (padded), B examples at a time, U labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from fedvlm_jax.data.batches import pad_rows
from fedvlm_jax.data.encode import IGNORED, Examples
from fedvlm_jax.data.options import Split
from fedvlm_jax.evaluation.texts import exact_match
from fedvlm_jax.federation.inputs import Inputs
from fedvlm_jax.objectives.sft import token_losses
from fedvlm_jax.sharding import CLIENTS

__all__ = ["Evaluator", "Scores", "make_answer"]

Scores = dict[str, dict[str, float]]
"""metric -> client -> value; clients without an example in the split are left out."""


class Decoder(Protocol):
    """What evaluation asks of a model's processor."""

    def decode(self, ids: np.ndarray, /) -> list[str]:
        """Token ids [B, U] -> texts, special tokens left out."""
        ...


@dataclass(frozen=True)
class Evaluator:
    """Evaluates clients in waves of a fixed shape, so that there is one program per split.

    Attributes:
        examples: of the population.
        inputs: rows -> batches.
        processor: decodes answers.
        wave: clients at a time.
        batch: examples of a client at a time.
        mesh: where clients are spread.
        answer: the program that `make_answer` made.
    """

    examples: Examples
    inputs: Inputs
    processor: Decoder
    wave: int
    batch: int
    mesh: Mesh
    answer: Callable[..., Any]

    def __call__(
        self, params: PyTree, adapters: Callable[[np.ndarray], PyTree] | None, split: Split, numbers: Sequence[int]
    ) -> Scores:
        """Score clients on a split.

        Args:
            params: the base.
            adapters: (client numbers [V]) -> their adapters [V, …]; None for the bare base (zero-shot).
            split: which rows.
            numbers: which clients.

        Returns:
            `exact_match` of generated answers, `token_accuracy` and `loss` (nats per token) by client's name.
        """
        clients = self.examples.clients
        numbers = [number for number in numbers if len(clients[number].rows_of(split))]
        scores: Scores = {"exact_match": {}, "token_accuracy": {}, "loss": {}}
        if not numbers:
            return scores
        # The shape is the whole population's, so that a cohort is scored by the same program.
        most = max(len(client.rows_of(split)) for client in clients)
        size = -(-most // self.batch) * self.batch
        by_client = NamedSharding(self.mesh, PartitionSpec(CLIENTS))
        for start in range(0, len(numbers), self.wave):
            chunk = numbers[start : start + self.wave]
            padded = np.asarray(chunk + chunk[:1] * (self.wave - len(chunk)))
            rows = np.stack([pad_rows(clients[number].rows_of(split), size) for number in padded])
            batch = self.inputs(rows)
            counts = np.asarray([len(clients[number].rows_of(split)) for number in padded])
            batch["labels"] = np.where((np.arange(size) < counts[:, None])[..., None], batch["labels"], IGNORED)
            batch = {k: v.reshape(self.wave, size // self.batch, self.batch, *v.shape[2:]) for k, v in batch.items()}
            batch = jax.device_put(batch, by_client)
            own = None if adapters is None else jax.device_put(adapters(padded), by_client)  # one program for all kinds
            ids, sums = jax.device_get(self.answer(params, own, batch))
            for place, number in enumerate(chunk):
                count, name = counts[place], clients[number].name
                texts = self.processor.decode(ids[place].reshape(size, -1)[:count])
                gold = [[self.examples.answers[row]] for row in clients[number].rows_of(split)]
                scores["exact_match"][name] = float(exact_match(texts, gold).mean())
                tokens = max(float(sums["tokens"][place]), 1.0)
                scores["token_accuracy"][name] = float(sums["correct"][place]) / tokens
                scores["loss"][name] = float(sums["loss"][place]) / tokens
        return scores


def make_answer(vlm: Any, max_tokens: int) -> Callable[..., tuple[Any, Mapping[str, Any]]]:
    """Compile-once `(params, adapters, batches [V, N/B, B, …]) -> ids [V, N/B, B, max_tokens], sums [V]`."""

    def one_client(params: PyTree, adapter: PyTree, batches: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def one_batch(batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
            prompt = {name: array for name, array in batch.items() if name != "labels"}
            ids = vlm.generate(params, adapter, prompt, max_tokens, num_beams=1)
            return ids, {"loss": losses.sum(), "correct": correct.sum(), "tokens": counts.sum()}

        ids, sums = jax.lax.map(one_batch, batches)
        return ids, jax.tree.map(jnp.sum, sums)

    def answer(params: PyTree, adapters: PyTree, batches: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        across = jax.vmap(one_client, in_axes=(None, None if adapters is None else 0, 0), spmd_axis_name=CLIENTS)
        return across(params, adapters, batches)

    return jax.jit(answer)
