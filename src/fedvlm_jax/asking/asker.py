"""A finished run's models, opened to be asked: the bare base, the global model, and each client's own.

Questions go through the programs and batches of the evaluation, one client at a time: the base is loaded once, and a
prompt is padded to the length of the run's own, so that questions share a compiled program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.asking.question import Shown, make_table
from fedvlm_jax.data.batches import MULTIPLE
from fedvlm_jax.data.config import TURNS
from fedvlm_jax.data.federated_dataset import ClientRows, Federation
from fedvlm_jax.data.token_arrays import widen
from fedvlm_jax.data.tokenization import Examples, encode_usable, find_question_column
from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.evaluator import Adapters, Evaluator
from fedvlm_jax.evaluation.knn_per import KERNELS, build_datastores
from fedvlm_jax.federation.inputs.batch_reader import make_inputs
from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.run_dir.reader import RunRecord, find_client, read_run
from fedvlm_jax.run_dir.validated_files import EXAMPLE_MODELS, StoredConfig
from fedvlm_jax.training.evaluate import FinishedRun, open_finished
from fedvlm_jax.utils.memoized import memoized
from fedvlm_jax.utils.progress import Progress, SilentProgress, working

FEATURES = 2**28
"""Bytes of image features of asked pictures that are kept, in memory alone: they are nobody else's to find."""

WIDER = 32
"""Prompts longer than the run's own are padded to multiples of so many tokens."""

TOLD = 10
"""Classes whose scores are told, the likeliest first."""


@dataclass(frozen=True)
class Answer:
    """A model's answer; of a model that chooses among classes also the likeliest of them, with their probabilities."""

    text: str
    classes: tuple[tuple[str, float], ...] = ()


Answers = dict[str, Answer]
"""`zero_shot`, `global` where there is a global model, and `personal` -> its answer."""


@dataclass(frozen=True)
class Sample:
    """A test row of a client that can be asked about: its number among the run's examples, question and answer."""

    number: int
    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class Asker:
    """The models of a finished run.

    Attributes:
        finished, record: the run.
        show: told how far long work is.
    """

    finished: FinishedRun
    record: RunRecord
    show: Progress = field(default_factory=SilentProgress)

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients' names, in order."""
        return tuple(client.name for client in self.finished.experiment.examples.clients)

    @property
    def most_pictures(self) -> int:
        """Most pictures of a question."""
        return self.finished.experiment.model.processor.most_pictures

    @property
    def chooses(self) -> bool:
        """Whether the model chooses among classes and reads no question."""
        return bool(self.finished.experiment.model.vlm.classes)

    @property
    def max_pixels(self) -> int:
        """Most pixels of a picture, as the run's options have it."""
        return self.finished.experiment.run.data.max_image_pixels

    def list_notes(self, shown: Shown | None = None) -> list[str]:
        """List what a reader of the answers should know, a sentence each."""
        found = list[str]()
        if self.finished.general is None:
            has_one = (self.record.folder / "adapters" / "shared.safetensors").is_file()
            kept = "the run was made by a version that kept no global model, so that one is not asked"
            found.append(
                kept
                if has_one
                else f"{self.record.method} has no part that all clients share, so there is no global model"
            )
        if self.chooses:
            found.append("the model chooses among the classes of its run, and reads no question")
        found += [f"{name} is left out: {reason}" for name, reason in (shown.broken if shown else ())]
        return found

    def ask(self, client: str, question: str, shown: Shown) -> list[Answers | str]:
        """Ask a question about pictures: what the models answer of each row, or why it cannot be asked.

        Raises:
            UserError: there is no such client, the model does not take so many pictures, or no row can be asked.
        """
        number, experiment = self.find(client), self.finished.experiment
        if (most := max(map(len, shown.rows))) > self.most_pictures:
            takes = format_count(self.most_pictures, "picture")
            raise UserError(
                f"{experiment.run.model} takes {takes} in a question and there are {most}: ask about each alone"
                " (--image FOLDER asks about every picture of a folder)"
            )
        table = make_table(question, shown, self._any_answer, self.max_pixels)
        rows = np.arange(len(table))
        federation = Federation((ClientRows(client, rows[:0], rows[:0], rows),), {})
        options, processor = experiment.data.fitted, experiment.model.processor
        examples = self._widen(encode_usable(table, federation, processor, options))
        faults = {skipped.row: skipped.reason for skipped in examples.skipped}
        if not len(examples):
            raise UserError(f"{experiment.run.model} cannot be asked that: {faults[0]}")
        made = iter(self._answer(number, examples))
        return [faults[row] if row in faults else next(made) for row in range(len(table))]

    def find(self, client: str) -> int:
        """Find a client's number.

        Raises:
            UserError: there is no such client.
        """
        return self.clients.index(find_client(client, self.clients))

    def list_samples(self, client: str, most: int) -> list[Sample]:
        """List a client's first test rows with distinct pictures, of those that ask no more than a question."""
        experiment, found = self.finished.experiment, dict[int, Sample]()
        examples, table = experiment.examples, experiment.data.table
        column = find_question_column(table, experiment.run.data)
        for row in examples.clients[self.find(client)].test.tolist():
            at = examples.rows[[row]]
            picture = int(examples.image[row])
            if len(found) >= most or picture in found or (TURNS in table.columns and table.read_text(TURNS, at)[0]):
                continue
            found[picture] = Sample(row, table.read_stripped(column, at)[0], examples.answers[row])
        return list(found.values())

    def read_sample(self, number: int) -> Shown:
        """Read the pictures of an example.

        Raises:
            UserError: the file of one is gone.
        """
        examples = self.finished.experiment.examples
        pictures = [index for index in examples.pictures[number].tolist() if index >= 0]
        for index in pictures:
            examples.images.decode(index)  # for its errors
        table, row = examples.images.table, int(examples.rows[number])
        contents = tuple(table.read_image(row, place) for place in range(len(pictures)))
        return Shown((tuple(f"picture {place + 1}" for place in range(len(contents))),), contents=contents)

    @cached_property
    def _any_answer(self) -> str:
        return self.finished.experiment.examples.answers[0]

    @cached_property
    def _store(self) -> FeatureStore | None:
        """Return where features of asked pictures are kept; None where the run's adapters make features themselves."""
        experiment = self.finished.experiment
        return None if experiment.store is None else experiment.model.feature_store(FEATURES, False, None)

    def _widen(self, examples: Examples) -> Examples:
        """Pad prompts to the width of the run's own, and views to their number, or to the next step above."""
        own = self.finished.experiment.examples
        tokens, views = examples.input_ids.shape[1], max(own.view.shape[1], examples.view.shape[1])
        width = own.input_ids.shape[1] if tokens <= own.input_ids.shape[1] else -(-tokens // WIDER) * WIDER
        width = min(width, max(tokens, self.finished.experiment.data.fitted.max_prompt_tokens // MULTIPLE * MULTIPLE))
        padded = own.input_ids[own.attention_mask == 0]
        return dataclasses.replace(
            examples,
            input_ids=widen(examples.input_ids, width, int(padded[0]) if len(padded) else 0),
            attention_mask=widen(examples.attention_mask, width, 0),
            view=widen(examples.view, views, -1),
            image_tokens=_widen_features(examples.image_tokens, own.image_tokens),
        )

    def _open(self, examples: Examples, store: FeatureStore | None, batch: int, advance: Any) -> Evaluator:
        """Make what runs programs over examples, one client at a time on each of the mesh's groups of devices."""
        experiment = self.finished.experiment
        model, options = experiment.model, experiment.run.evaluation
        return Evaluator(
            examples=examples,
            inputs=make_inputs(examples, model.processor, store),
            processor=model.processor,
            wave=model.mesh.shape[CLIENTS],
            batch=batch,
            mesh=model.mesh,
            answer=self._program,
            gold=experiment.answering.gold.all,
            metrics=options.metrics,
            beta=experiment.run.preference.beta,
            base={},
            advance=advance,
        )

    def _answer(self, number: int, examples: Examples) -> list[Answers]:
        """Ask the models of a client; answers in the order of the examples."""
        finished, rows = self.finished, np.arange(len(examples))
        batch = min(len(rows), finished.experiment.run.evaluation.batch_size)
        evaluator = self._open(examples, self._store, batch, self.show.advance)
        general = {} if finished.general is None else {"global": finished.general}
        models: Mapping[str, Adapters | None] = {**general, "personal": self._personal(number)}
        asked = {number: rows}
        with working(self.show, f"asking about {len(rows)} picture{'s' * (len(rows) > 1)}, the first compiles"):
            parts = evaluator.visit(self._program, finished.experiment.model.params, {"zero_shot": None}, asked)
            parts |= evaluator.visit(self._program, finished.params, models, asked, shown="answers")
        told = {
            name: [one for part in of_client[number] for one in self._tell(part)] for name, of_client in parts.items()
        }
        return [{name: answers[row] for name, answers in told.items()} for row in rows.tolist()]

    @cached_property
    def _program(self) -> Callable[..., Any]:
        """Return the evaluation's program of answers, or the one of classes' probabilities."""
        experiment = self.finished.experiment
        options, model = experiment.run.evaluation, experiment.model
        asked = (options.neighbours, options.neighbour_temperature) if options.neighbours else (0, 0.0)
        if not self.chooses:
            return model.answer_program(experiment.answering.gold.budget, options.decoding, *asked)
        vlm = model.neighbours(*asked).vlm if options.neighbours else model.vlm

        def weigh(params: PyTree, adapter: PyTree, batch: Mapping[str, Any]) -> Any:
            return jax.nn.softmax(vlm.logits(params, adapter, batch)[:, 0], axis=-1)

        @jax.jit
        def program(params: PyTree, adapters: PyTree, batch: Mapping[str, Any]) -> Any:
            axes = (None, None if adapters is None else 0, 0)
            return jax.vmap(weigh, in_axes=axes, spmd_axis_name=CLIENTS)(params, adapters, batch)

        return program

    def _tell(self, part: Any) -> list[Answer]:
        """Write what the program gave for up to B examples as answers."""
        model = self.finished.experiment.model
        if not self.chooses:
            return [Answer(text) for text in model.processor.decode(part[0])]
        names = model.vlm.classes
        best = [(row, np.argsort(-row, kind="stable")[:TOLD].tolist()) for row in np.asarray(part)]
        return [Answer(names[order[0]], tuple((names[at], float(row[at])) for at in order)) for row, order in best]

    @memoized
    def _personal(self, number: int, /) -> Adapters:
        """Return a client's own model, with its neighbours where the run asks for them."""
        finished, experiment = self.finished, self.finished.experiment
        options = experiment.run.evaluation
        if experiment.neighbours is None:
            return finished.personal
        # By all clients' validation answers, so that the run has decided it.
        kernel = self.record.results.get("neighbours", {}).get("kernel", "distance")
        evaluator = self._open(experiment.examples, experiment.store, options.batch_size, lambda *_: None)
        with working(self.show, f"reading what {self.clients[number]} remembers of its training answers"):
            models, _, _ = build_datastores(
                evaluator,
                experiment.neighbours,
                finished.params,
                finished.personal,
                [number] if number in experiment.scored else [],
                options.neighbour_capacity,
                tuple(known for known in KERNELS if known == kernel) or KERNELS[:1],
            )
        return models


def _widen_features(asked: int | None, own: int | None) -> int | None:
    """Return the image tokens that rows have room for: the run's own, or the next step above.

    >>> _widen_features(40, 100), _widen_features(101, 100)
    (100, 128)
    """
    if asked is None or own is None or asked <= own:
        return own
    return -(-asked // WIDER) * WIDER


def open_asker(folder: Path, stored: StoredConfig, show: Progress) -> Asker:
    """Load a finished run's base, data and adapters, to be asked.

    Raises:
        UserError: as `open_finished`; or a file of the run's numbers is damaged.
    """
    record = read_run(folder)
    return Asker(open_finished(folder, stored, show, scoring=False), record, show)


def list_models(answers: Sequence[Answers | str]) -> dict[str, str]:
    """List the models that answered, by name -> what a reader sees, in the order in which reports show them.

    >>> list_models([{"personal": Answer("a cat"), "zero_shot": Answer("a dog")}, "prompt too long"])
    {'zero_shot': 'zero-shot', 'personal': 'personal model'}
    """
    there = {name for each in answers if not isinstance(each, str) for name in each}
    return {name: shown for name, shown in EXAMPLE_MODELS.items() if name in there}
