"""Evaluation of every client with its model: many clients' adapters at once, on a single base.

Rows are cut into pieces, up to B examples of a client each, and V pieces at a time go through the same program whatever
the split, so a client with ten thousand examples beside one with ten costs what its examples cost. The next pieces are
read while these are answered, and all models answer a piece while it is in memory. Each process reads the pieces that
its devices answer, and gets all answers.

Axes: C clients, V pieces at a time, B examples of a piece, U labels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from fedvlm_jax.data.batches import pad_rows
from fedvlm_jax.data.config import Split
from fedvlm_jax.data.prefetch import read_ahead
from fedvlm_jax.data.tokenization import IGNORED, LABELS, Examples
from fedvlm_jax.distributed.sharding import CLIENTS, fetch, own_places, place, place_own
from fedvlm_jax.evaluation.metrics.preferences import Pairs, score_preferences
from fedvlm_jax.evaluation.metrics.text_metrics import select_metrics
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.models import Processor, Vlm
from fedvlm_jax.objectives.log_probs import score_pairs, token_losses

Scores = dict[str, dict[str, float]]
"""metric -> client -> value; clients without an example in the split are left out."""

Adapters = Callable[[np.ndarray], PyTree]
"""(client numbers [V], which may repeat) -> their adapters [V, …]."""


Numbers = dict[str, Float[np.ndarray, " examples"]]
"""Per example of a client, sums over the tokens of its answers, by the names of `score_pairs`."""


class Scored(NamedTuple):
    """Scores of a model on a split.

    Attributes:
        scores: every metric.
        values: metrics of generated answers by example, metric -> client -> [N]; `scores` has their means.
        texts: the answers themselves, client -> [N].
    """

    scores: Scores
    values: dict[str, dict[str, Float[np.ndarray, " examples"]]]
    texts: dict[str, list[str]]


def tell_nobody(done: int, total: int, what: str) -> None:
    """Show no progress."""
    del done, total, what


class _Piece(NamedTuple):
    """Up to B examples of one client: `rows` [B], of which the first `real` count."""

    client: int
    rows: Int[np.ndarray, " examples"]
    real: int


class _Answers(NamedTuple):
    """A model's answers to a client's examples, and the log-probabilities of the gold answers."""

    texts: list[str]
    numbers: Numbers


@dataclass(frozen=True)
class Evaluator:
    """Evaluation of clients by a compiled program.

    Attributes:
        examples: of the population.
        inputs: rows -> batches.
        processor: decodes answers.
        wave: pieces at a time.
        batch: examples of a piece.
        mesh: pieces are spread over its devices.
        answer: the program of `make_answer`.
        gold: the answers to each of `examples`, as predictions are compared with them (`gold_answers.py`).
        metrics: of generated answers, by name (`text_metrics.py`).
        beta: of the reward, which is beta times an answer's gain in log-probability over the bare base.
        tell: called with the parts done, the parts in all, and the split.
        base: split and client -> the numbers of the bare base [N]; filled when the base is evaluated, and rewards are
            known from then on.
    """

    examples: Examples
    inputs: Inputs
    processor: Processor
    wave: int
    batch: int
    mesh: Mesh
    answer: Callable[..., Any]
    gold: list[list[str]]
    metrics: tuple[str, ...]
    beta: float
    base: dict[tuple[Split, int], Numbers]
    tell: Callable[[int, int, str], None] = tell_nobody

    def __call__(
        self,
        params: PyTree,
        models: Mapping[str, Adapters | None],
        split: Split,
        numbers: Sequence[int],
        *,
        rejected: bool = True,
    ) -> dict[str, Scored]:
        """Score models on a split, all of them in one pass over the data.

        Args:
            params: the base.
            models: name -> its adapters; None for the bare base (zero-shot).
            split: of the rows.
            numbers: of the clients.
            rejected: score rejected answers too, where the data has them; without them there is no metric of pairs.

        Returns:
            For every model: `metrics` of generated answers; `token_accuracy` and `loss` (nats per token) of the gold
            answers; and those of `score_preferences`; each by client's name.
        """
        rows = {number: self.examples.clients[number].rows_of(split) for number in numbers}
        found = self._answer(params, models, rows, rejected, split)
        # CIDEr's document frequencies are those of all clients, whichever are scored.
        corpus = self._gold(split, range(len(self.examples.clients)))
        metrics = select_metrics(self.metrics, corpus)
        return {name: self._score(split, answers, metrics, models[name]) for name, answers in found.items()}

    def visit(
        self,
        program: Callable[..., dict[str, Array]],
        params: PyTree,
        adapters: Adapters,
        rows: Mapping[int, Int[np.ndarray, " rows"]],
    ) -> dict[int, list[dict[str, np.ndarray]]]:
        """Run another program over rows of clients, each with its model.

        Args:
            program: (params, adapters, batch [V, B, …]) -> arrays by name [V, B, …]; labels that do not count are -100.
            params: the base.
            adapters: of the models.
            rows: client number -> rows.

        Returns:
            client number -> for each piece of its rows, in their order, the arrays [up to B, …]; none without rows.
        """
        found: dict[int, list[dict[str, np.ndarray]]] = {}
        for batch, wave in self._read(rows):
            for client, outputs in self._run(program, params, adapters, batch, wave):
                found.setdefault(client, []).append(outputs)
        return found

    def _answer(
        self,
        params: PyTree,
        models: Mapping[str, Adapters | None],
        rows: Mapping[int, Int[np.ndarray, " rows"]],
        rejected: bool,
        split: Split,
    ) -> dict[str, dict[int, _Answers]]:
        """Collect model -> client -> its answers, each piece read once for all models."""
        found: dict[str, dict[int, list[_Answers]]] = {name: {} for name in models}
        done, total = 0, len(models) * len(self._waves(list(self._cut(rows))))
        self.tell(done, total, split)
        for batch, wave in self._read(rows):
            asked = {name: value for name, value in batch.items() if rejected or not name.startswith("rejected_")}
            for name, adapters in models.items():
                for client, (ids, numbers) in self._run(self.answer, params, adapters, asked, wave):
                    found[name].setdefault(client, []).append(_Answers(self.processor.decode(ids), numbers))
                done += 1
                self.tell(done, total, split)
        return {
            name: {client: _join(parts) for client, parts in by_client.items()} for name, by_client in found.items()
        }

    def _cut(self, rows_of: Mapping[int, Int[np.ndarray, " rows"]]) -> Iterator[_Piece]:
        for number, rows in rows_of.items():
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                yield _Piece(number, pad_rows(part, self.batch), len(part))

    def _waves(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Gather V pieces each; the last wave is filled up with pieces in which nothing counts."""
        waves = [pieces[start : start + self.wave] for start in range(0, len(pieces), self.wave)]
        if waves:  # full, so that all waves are of the shape that was compiled
            waves[-1] += [waves[-1][0]._replace(real=0)] * (self.wave - len(waves[-1]))
        return waves

    def _read(self, rows: Mapping[int, Int[np.ndarray, " rows"]]) -> Iterator[tuple[dict[str, Array], list[_Piece]]]:
        """Yield batches [V, B, …] on the devices with their pieces, the next read while the last is in use."""
        waves = self._waves(list(self._cut(rows)))
        across = NamedSharding(self.mesh, PartitionSpec(CLIENTS))
        local = own_places(self.mesh, self.wave).tolist()

        def make(index: int) -> dict[str, np.ndarray]:
            pieces = [waves[index][at] for at in local]
            batch = self.inputs(np.stack([piece.rows for piece in pieces]))
            counts = np.asarray([piece.real for piece in pieces])[:, None]
            counted = (np.arange(self.batch) < counts)[..., None]
            # Padding repeats real rows: without labels it adds to no sum.
            return batch | {name: np.where(counted, batch[name], IGNORED) for name in LABELS if name in batch}

        for batch, wave in zip(read_ahead(make, 0, len(waves)), waves, strict=True):
            yield place_own(batch, across), wave

    def _run(
        self, program: Callable[..., Any], params: PyTree, adapters: Adapters | None, batch: Any, wave: list[_Piece]
    ) -> Iterator[tuple[int, Any]]:
        """Run a program on a batch and yield each client with its part of the outputs, padding cut off."""
        across = NamedSharding(self.mesh, PartitionSpec(CLIENTS))
        clients = np.asarray([piece.client for piece in wave])
        outputs = fetch(program(params, None if adapters is None else place(adapters(clients), across), batch))
        for at, piece in enumerate(wave):
            if piece.real:
                yield piece.client, jax.tree.map(lambda leaf, at=at, piece=piece: leaf[at, : piece.real], outputs)

    def _gold(self, split: Split, numbers: Sequence[int]) -> list[list[str]]:
        return [self.gold[row] for number in numbers for row in self.examples.clients[number].rows_of(split)]

    def _score(
        self,
        split: Split,
        answers: dict[int, _Answers],
        metrics: Mapping[str, Any],
        adapters: Adapters | None,
    ) -> Scored:
        values: dict[str, dict[str, np.ndarray]] = {name: {} for name in metrics}
        scores: Scores = {name: {} for name in (*metrics, "token_accuracy", "loss")}
        texts_of: dict[str, list[str]] = {}
        for client, (texts, numbers) in answers.items():
            name = self.examples.clients[client].name
            texts_of[name] = texts
            gold = self._gold(split, [client])
            for metric, score in metrics.items():
                values[metric][name] = np.asarray(score(texts, gold))
            of_client = {metric: float(values[metric][name].mean()) for metric in metrics}
            tokens = max(float(numbers["chosen_tokens"].sum()), 1.0)  # all answers may be empty
            of_client["token_accuracy"] = float(numbers["chosen_correct"].sum()) / tokens
            of_client["loss"] = -float(numbers["chosen_log_prob"].sum()) / tokens
            if adapters is None:
                self.base[split, client] = numbers
            of_client |= score_preferences(_pair(numbers, self.base.get((split, client))), self.beta)
            for metric, value in of_client.items():
                scores.setdefault(metric, {})[name] = value
        return Scored(scores, values, texts_of)


def _pair(numbers: Numbers, base: Numbers | None) -> Pairs:
    """Pair the numbers of a model with those of the base; without rejected answers there is no pair."""
    nothing = np.zeros_like(numbers["chosen_tokens"])
    return Pairs(
        chosen=numbers["chosen_log_prob"],
        rejected=numbers.get("rejected_log_prob", nothing),
        chosen_tokens=numbers["chosen_tokens"],
        rejected_tokens=numbers.get("rejected_tokens", nothing),
        base_chosen=None if base is None else base["chosen_log_prob"],
        base_rejected=None if base is None else base.get("rejected_log_prob", nothing),
    )


def _join(parts: list[_Answers]) -> _Answers:
    texts = [text for part in parts for text in part.texts]
    return _Answers(texts, {name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers})


GREEDY: Mapping[str, int] = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}
"""Options of `Vlm.generate` by which an answer is the likeliest token after token, without bans."""


def make_answer(
    vlm: Vlm, max_tokens: int, options: Mapping[str, int] = GREEDY
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Compile-once `(params, adapters, batch [V, B, …]) -> ids [V, B, max_tokens], numbers [V, B]`.

    The numbers are those of `objectives.likelihood.score_pairs`; of the chosen answer alone where the batch has no
    rejected ones.

    Args:
        vlm: the model's record.
        max_tokens: how many are generated at most, BOS and EOS included.
        options: of `Vlm.generate`, in place of what the model's generation configuration says.
    """

    def one(params: PyTree, adapter: PyTree, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        prompt = {"memory": vlm.encode(params, adapter, batch), "attention_mask": batch["attention_mask"]}
        answers = {name: batch[name] for name in LABELS if name in batch}
        ids = vlm.generate(params, adapter, prompt, max_tokens, **options)
        return ids, _score(vlm, params, adapter, prompt | answers)

    def answer(params: PyTree, adapters: PyTree, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        across = jax.vmap(one, in_axes=(None, None if adapters is None else 0, 0), spmd_axis_name=CLIENTS)
        return across(params, adapters, batch)

    return jax.jit(answer)


def _score(vlm: Vlm, params: PyTree, adapter: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
    if "rejected_labels" in batch:
        return score_pairs(vlm, params, adapter, batch)
    losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
    sums = {"chosen_log_prob": -losses, "chosen_correct": correct, "chosen_tokens": counts}
    return {name: values.sum(axis=-1) for name, values in sums.items()}
