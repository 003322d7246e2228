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
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax.data.batches import IGNORED, LABELS, pad_rows, read_ahead
from fedvlm_jax.data.config import Split
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.distributed.sharding import fetch, local_places, place, place_local
from fedvlm_jax.evaluation.metrics.preferences import Numbers, score_preferences
from fedvlm_jax.evaluation.metrics.text_metrics import Metric, select_metrics
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.models import Processor, Vlm
from fedvlm_jax.objectives.log_probs import score_pairs, token_losses
from fedvlm_jax.utils.memoized import memoized

Scores = dict[str, dict[str, float]]
"""metric -> client -> value; clients without an example in the split are left out."""

Adapters = Callable[[np.ndarray], PyTree]
"""(client numbers [V], which may repeat) -> their adapters [V, …]."""

Reward = Callable[[Int[np.ndarray, "N U"], Int[np.ndarray, " N"], int], Float[np.ndarray, " N"]]
"""(ids of generated answers, the examples' numbers, the client's number) -> their rewards."""


class Scored(NamedTuple):
    """Scores of a model on a split."""

    scores: Scores
    values: dict[str, dict[str, Float[np.ndarray, " examples"]]]  # generated answers': metric -> client -> [N]
    texts: dict[str, list[str]]  # the answers themselves, client -> [N]


class _Piece(NamedTuple):
    """Up to B examples of one client: `rows` [B], of which the first `real` count."""

    client: int
    rows: Int[np.ndarray, " examples"]
    real: int


def _split(outputs: PyTree, wave: Sequence[_Piece]) -> Iterator[tuple[int, PyTree]]:
    """Yield the client of every piece in which something counts, and its part [up to B, …] of the arrays [V, B, …]."""
    for at, piece in enumerate(wave):
        if piece.real:
            yield piece.client, jax.tree.map(lambda leaf, at=at, piece=piece: leaf[at, : piece.real], outputs)


@dataclass(frozen=True)
class Evaluator:
    """Evaluation of clients by a compiled program."""

    examples: Examples
    inputs: Inputs  # rows -> batches
    processor: Processor
    wave: int  # pieces at a time, spread over the mesh's devices
    batch: int  # examples of a piece
    mesh: Mesh
    answer: Callable[..., Any]  # the program of `make_answer`
    gold: list[list[str]]  # the answers to each of `examples`, as predictions are compared with them
    metrics: tuple[str, ...]  # of generated answers, by name
    beta: float  # of the reward, which is beta times an answer's gain in log-probability over the bare base
    base: dict[tuple[Split, int], Numbers]  # split and client -> sums of the bare base, once it was evaluated
    # Of a model that chooses among classes: which of `examples` have one that no training example has.
    novel: Bool[np.ndarray, " examples"] | None = None
    own: Bool[np.ndarray, " examples"] | None = None  # and which have one that their client trains on
    elsewhere: frozenset[str] = frozenset()  # those of the two, of which clients that are not here may have both kinds
    reward: Reward | None = None  # the metric `reward`, of runs that train for one
    advance: Callable[[int, int, str], None] = lambda done, total, split: None  # shows progress

    def __call__(
        self,
        params: PyTree,
        models: Mapping[str, Adapters | None],
        split: Split,
        numbers: Sequence[int],
        *,
        rejected: bool = True,
    ) -> dict[str, Scored]:
        """Score models on a split.

        Args:
            params: the base.
            models: name -> its adapters; None for the bare base (zero-shot), with which rewards become known.
            split, numbers: of the rows and the clients.
            rejected: score rejected answers too, where the data has them; without them there is no metric of pairs.

        Returns:
            For every model: `metrics` of generated answers; `token_accuracy` and `loss` (nats per token) of the gold
            answers; those of `score_preferences`; and of a model that chooses among classes those of `_match_classes`;
            all by client's name.
        """

        def answer(params: PyTree, adapters: PyTree, batch: dict[str, Array]) -> Any:
            kept = {name: value for name, value in batch.items() if rejected or not name.startswith("rejected_")}
            return self.answer(params, adapters, kept)

        rows = {number: self.examples.clients[number].rows_of(split) for number in numbers}
        found = self.visit(answer, params, models, rows, split)
        # CIDEr's document frequencies are those of all clients, whichever are scored.
        metrics = select_metrics(self.metrics, self._gold(split, range(len(self.examples.clients))))
        return {name: self._score(split, by_client, metrics, models[name] is None) for name, by_client in found.items()}

    def visit(
        self,
        program: Callable[..., Any],
        params: PyTree,
        models: Mapping[str, Adapters | None],
        rows: Mapping[int, Int[np.ndarray, " rows"]],
        shown: str = "",
    ) -> dict[str, dict[int, list[Any]]]:
        """Run a program over rows of clients, each with its model, all models in one pass.

        Args:
            program: (params, adapters, batch [V, B, …]) -> arrays [V, B, …]; labels that do not count are -100.
            params, models: as in `__call__`.
            rows: client number -> rows.
            shown: what the progress is called; empty shows none.

        Returns:
            model -> client number, if it has rows -> for each piece, in their order, the arrays [up to B, …].
        """
        waves = self._cut(rows)
        across, local = NamedSharding(self.mesh, PartitionSpec(CLIENTS)), local_places(self.mesh, self.wave).tolist()

        def make(index: int) -> dict[str, np.ndarray]:
            pieces = [waves[index][at] for at in local]
            batch = self.inputs(np.stack([piece.rows for piece in pieces]))
            counts = np.asarray([piece.real for piece in pieces])[:, None]
            counted = (np.arange(self.batch) < counts)[..., None]
            # Padding repeats real rows: without labels it adds to no sum.
            return batch | {name: np.where(counted, batch[name], IGNORED) for name in LABELS if name in batch}

        found: dict[str, dict[int, list[Any]]] = {name: {} for name in models}
        done, total = 0, len(models) * len(waves)
        if shown:
            self.advance(done, total, shown)
        for read, wave in zip(read_ahead(make, 0, len(waves)), waves, strict=True):
            batch, clients = place_local(read, across), np.asarray([piece.client for piece in wave])
            for name, adapters in models.items():
                placed = None if adapters is None else place(adapters(clients), across)
                for client, part in _split(fetch(program(params, placed, batch)), wave):
                    found[name].setdefault(client, []).append(part)
                done += 1
                if shown:
                    self.advance(done, total, shown)
        return found

    def _cut(self, rows: Mapping[int, Int[np.ndarray, " rows"]]) -> list[list[_Piece]]:
        """Cut rows into pieces, V in every wave; the last wave is filled up with pieces in which nothing counts."""
        pieces: list[_Piece] = []
        for number, of_client in rows.items():
            for start in range(0, len(of_client), self.batch):
                part = of_client[start : start + self.batch]
                pieces.append(_Piece(number, pad_rows(part, self.batch), len(part)))
        waves = [pieces[start : start + self.wave] for start in range(0, len(pieces), self.wave)]
        if waves:  # full, so that all waves are of the shape that was compiled
            waves[-1] += [waves[-1][0]._replace(real=0)] * (self.wave - len(waves[-1]))
        return waves

    def _gold(self, split: Split, numbers: Sequence[int]) -> list[list[str]]:
        return [self.gold[row] for number in numbers for row in self.examples.clients[number].rows_of(split)]

    @memoized
    def _has(self, kind: str, value: bool, split: Split, /) -> bool:
        """Tell whether some example of the split is of a kind, `novel` or `own`, or is not, as far as is known here."""
        known: Bool[np.ndarray, " examples"] = getattr(self, kind)
        here = (known[client.rows_of(split)] == value for client in self.examples.clients)
        return kind in self.elsewhere or any(found.any() for found in here)

    def _match_classes(self, split: Split, client: int, matches: Float[np.ndarray, " examples"]) -> dict[str, float]:
        """Compute the exact match of kinds of classes, each where the client has examples of it.

        Of its own classes, where the split has examples of others; and where it has novel ones, of base and of novel
        classes, and the harmonic mean of these two.
        """
        if self.novel is None or self.own is None:
            return {}
        rows, kinds = self.examples.clients[client].rows_of(split), {}
        if self._has("own", False, split):
            kinds |= {"exact_match_own": self.own[rows]}
        if self._has("novel", True, split):
            kinds |= {"exact_match_base": ~self.novel[rows], "exact_match_novel": self.novel[rows]}
        found = {name: float(matches[chosen].mean()) for name, chosen in kinds.items() if chosen.any()}
        if {"exact_match_base", "exact_match_novel"} <= found.keys():
            found["exact_match_harmonic"] = harmonic_mean(found["exact_match_base"], found["exact_match_novel"])
        return found

    def _score(
        self, split: Split, answered: dict[int, list[Any]], metrics: Mapping[str, Metric], is_base: bool
    ) -> Scored:
        named = (*metrics, *(["reward"] if self.reward is not None else []))
        scored = Scored({name: {} for name in (*named, "token_accuracy", "loss")}, {name: {} for name in named}, {})
        for client, parts in answered.items():
            name, gold = self.examples.clients[client].name, self._gold(split, [client])
            texts = scored.texts[name] = [text for ids, _ in parts for text in self.processor.decode(ids)]
            for metric, score in metrics.items():
                scored.values[metric][name] = np.asarray(score(texts, gold))
            if self.reward is not None:
                ids, rows = np.concatenate([ids for ids, _ in parts]), self.examples.clients[client].rows_of(split)
                scored.values["reward"][name] = self.reward(ids, rows, client)
            of_client = {metric: float(values[name].mean()) for metric, values in scored.values.items()}
            numbers = {key: np.concatenate([sums[key] for _, sums in parts]) for key in parts[0][1]}
            tokens = max(float(numbers["chosen_tokens"].sum()), 1.0)  # all answers may be empty
            of_client["token_accuracy"] = float(numbers["chosen_correct"].sum()) / tokens
            of_client["loss"] = -float(numbers["chosen_log_prob"].sum()) / tokens
            if is_base:
                self.base[split, client] = numbers
            if "exact_match" in scored.values:
                of_client |= self._match_classes(split, client, scored.values["exact_match"][name])
            of_client |= score_preferences(numbers, self.base.get((split, client)), self.beta)
            for metric, value in of_client.items():
                scored.scores.setdefault(metric, {})[name] = value
        return scored


def harmonic_mean(one: float, other: float) -> float:
    """Compute the harmonic mean of two shares; 0 where one is.

    >>> harmonic_mean(1.0, 0.5), harmonic_mean(0.0, 0.5)
    (0.6666666666666666, 0.0)
    """
    return 2 * one * other / (one + other) if one and other else 0.0


GREEDY: Mapping[str, int] = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}
"""Options of `Vlm.generate` by which an answer is the likeliest token after token, without bans."""


def make_answer(
    vlm: Vlm, max_tokens: int, options: Mapping[str, int] = GREEDY
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Make the program `(params, adapters, batch [V, B, …]) -> ids [V, B, max_tokens], numbers [V, B]`.

    At most `max_tokens` are generated, BOS and EOS included. The numbers are those of
    `objectives.log_probs.score_pairs`; of the chosen answer alone where the batch has no rejected ones. `options`
    override the model's generation configuration.
    """

    def answer_piece(params: PyTree, adapter: PyTree, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        # Generation and scoring share one pass of the encoder.
        prompt = {"memory": vlm.encode(params, adapter, batch), "attention_mask": batch["attention_mask"]}
        ids = vlm.generate(params, adapter, prompt, max_tokens, **options)
        batch = prompt | {name: batch[name] for name in LABELS if name in batch}
        if "rejected_labels" in batch:
            return ids, score_pairs(vlm, params, adapter, batch)
        losses, correct, counts = token_losses(vlm.logits(params, adapter, batch), batch["labels"])
        sums = {"chosen_log_prob": -losses, "chosen_correct": correct, "chosen_tokens": counts}
        return ids, {name: values.sum(axis=-1) for name, values in sums.items()}

    @jax.jit
    def answer(params: PyTree, adapters: PyTree, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        axes = (None, None if adapters is None else 0, 0)
        return jax.vmap(answer_piece, in_axes=axes, spmd_axis_name=CLIENTS)(params, adapters, batch)

    return answer
