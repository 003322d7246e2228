"""The clients of a seed with their examples, for a loaded model, and what is known of them whatever the method."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.method_setup import count_vectors
from fedvlm_jax.config.run_options import EvaluationOptions, Run
from fedvlm_jax.data.config import DataOptions, Split
from fedvlm_jax.data.federated_dataset import Federation
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import Examples, encode
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import local_base, local_mesh
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.answer_generation import SEARCHES, Answering
from fedvlm_jax.evaluation.evaluator import Numbers, Scored
from fedvlm_jax.evaluation.gold_answers import read_gold
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.federation.inputs.reference_log_probs import Reference, compute_reference
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.run_dir.fingerprints import describe_clients
from fedvlm_jax.training.loaded_model import LoadedModel
from fedvlm_jax.utils.memoized import memoized

IMAGES = 128
"""Images by which a client is known, at most: a mean over more costs their features and hardly moves."""


class BaseScoring(NamedTuple):
    """What decides the bare base's scores, beside the data."""

    evaluation: EvaluationOptions
    preference: PreferenceOptions
    pixels: bool  # are read, not kept features: programs of the two round otherwise


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A loaded model's view of data that a seed has cut into clients.

    Attributes:
        model: tokenises and scores the examples.
        options: name the source and the clients.
        fitted: the same with prompts and answers no longer than the model has positions.
        seed: decides who the clients are.
        pairs: whether rejected answers are read, and rows without them left out.
    """

    model: LoadedModel
    options: DataOptions
    fitted: DataOptions
    seed: int
    pairs: bool

    @property
    def table(self) -> Table:
        """Return the rows."""
        return self.model.table(self.options)

    @property
    def federation(self) -> Federation:
        """Return the clients, before anything is tokenised."""
        return self.model.federation(self.options, self.seed)

    @cached_property
    def examples(self) -> Examples:
        """Tokenise every client's rows."""
        return encode(self.table, self.federation, self.model.processor, self.fitted, pairs=self.pairs)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Digest all that a run reads: the files, and every client's rows."""
        return {**self.model.sources(self.options), "clients": describe_clients(self.examples)}

    @memoized
    def base_numbers(self, scoring: BaseScoring, /) -> dict[tuple[Split, int], Numbers]:
        """Hold the numbers of the bare base, which an `Evaluator` fills in."""
        del scoring
        return {}

    @memoized
    def answering(self, decoding: str, max_tokens: int, splits: tuple[Split, ...], /) -> Answering:
        """Decide how answers to these splits are generated; `decoding` is a key of `SEARCHES`."""
        examples = self.examples
        settings = replace(self.model.vlm.settings(), **SEARCHES[decoding])
        rows = [row for client in examples.clients for split in splits for row in client.rows_of(split)]
        gold = read_gold(examples.answers, rows, self.model.processor, max_tokens, settings, examples.all_answers)
        return Answering(gold, settings)

    @memoized
    def reference(
        self, batch: int, on_disk: bool, cache_dir: Path | None, pixels: bool, /, *,
        inputs: Inputs, note: Callable[[str], None],
    ) -> Reference:  # fmt: skip
        """Compute the base's log-probabilities of all answers, `batch` rows at a time on each device."""
        model, examples = self.model, self.examples
        mesh = local_mesh(model.mesh)
        arrays = (examples.input_ids, examples.labels, examples.rejected)
        # Programs of other shapes round otherwise: what they compute is kept apart, in memory as on disk.
        shapes = (*(array.shape[1] for array in arrays if array is not None), batch, mesh.size, int(pixels))
        if examples.image_tokens is not None:
            shapes += (examples.image_tokens, examples.view.shape[1])
        # Each process scores its share with the copy of the base on its devices.
        store, params = model.reference_store(shapes, on_disk, cache_dir), local_base(model.params)
        score = model.reference_scorer
        return compute_reference(score, params, examples, inputs, store, batch=batch, mesh=mesh, note=note)

    @memoized
    def zero_shot(self, scoring: BaseScoring, /, *, ask: Callable[[], dict[Split, Scored]]) -> dict[Split, Scored]:
        """Return what `ask` finds the bare base to do on these splits, asked once for all runs that score alike."""
        # The wave is no part of the key: it is chosen by the round's memory, and would ask once more for each method.
        del scoring
        return ask()

    @memoized
    def client_means(self, /, *, inputs: Inputs) -> Float[np.ndarray, "clients width"]:
        """Compute the mean frozen feature of every client's images [C, D], of held-out ones' validation images.

        Raises:
            UserError: image features are not kept.
        """
        rows, clients = [], self.examples.clients
        for number in processes.share_out(len(clients)):
            client = clients[number]
            batch = inputs((client.validation if client.held_out else client.train)[:IMAGES])
            if "image_features" not in batch:
                raise UserError(
                    "--evaluation.cold-start nearest needs frozen image features: keep the adapter out of the vision "
                    "tower, and --system.cache on; or choose mean or initial."
                )
            features = batch["image_features"]
            if "image_grids" in batch:  # all tokens of all pictures, without what rows are filled up with
                counts = batch["image_grids"].prod(-1).sum(-1)
                features = features[np.arange(features.shape[1]) < counts[:, None]][:, None]
            if features.ndim > 3:  # of several views to a row, of which those that are filled up are zeros
                features = features.reshape(-1, *features.shape[-2:])
                features = features[features.any((1, 2))]
            rows.append(features.mean(axis=(0, 1)) if len(features) else np.zeros(features.shape[-1], features.dtype))
        return processes.gather(np.stack(rows), len(clients))


_share_data = memoized(FederatedData)  # kept in the model, by all that follows it


def open_data(model: LoadedModel, run: Run) -> FederatedData:
    """Return the data of a run, which all runs on the same clients and lengths share; nothing is read yet.

    Longer prompts than the model has positions will be left out, longer answers cut; both are counted.

    Raises:
        UserError: a decoder-only model has no more positions than an answer takes.
    """
    data, pairs = run.data, load_objective(run.objective, run.preference).pairs
    patches = declare(run.method, run).patches
    model = model.bind(data, run.seed, pairs=pairs, vectors=count_vectors(run), patches=patches)
    fitted = fit_lengths(model.vlm, data, run.evaluation.max_answer_tokens or 0)
    return _share_data(model, data, fitted, run.seed, pairs)


def fit_lengths(vlm: Vlm, data: DataOptions, generated: int = 0) -> DataOptions:
    """Cut the longest prompt and answer down to what the model has positions for, with answers of so many tokens.

    Raises:
        UserError: a decoder-only model has no more positions than an answer takes.
    """
    answer = min(data.max_answer_tokens, vlm.positions)
    longest = max(answer, generated)
    prompt = vlm.most_prompt_tokens(longest)
    if prompt < 1:
        raise UserError(
            f"the model has {format_count(vlm.positions, 'position')}, and answers of up to "
            f"{format_count(longest, 'token')} leave none of them for a "
            "prompt: lower --data.max-answer-tokens and --evaluation.max-answer-tokens"
        )
    return data.replace(max_prompt_tokens=min(data.max_prompt_tokens, prompt), max_answer_tokens=answer)
