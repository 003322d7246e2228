"""Adapters that are stored, opened and evaluated from their files: those of a finished run, or one of PEFT's."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.config.run_options import Run, to_json
from fedvlm_jax.config.start_folder import fit_start
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import place_base
from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.evaluator import Adapters
from fedvlm_jax.run_dir import absolute_paths, fingerprints
from fedvlm_jax.run_dir.artifacts import load_base, open_adapters, open_global
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.reader import RunRecord, read_finished
from fedvlm_jax.run_dir.validated_files import StoredConfig, read_config
from fedvlm_jax.training.experiment import Experiment, open_experiment
from fedvlm_jax.training.final_evaluation import score_base, score_models
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress import Progress, SilentProgress, working
from fedvlm_jax.utils.untrusted_text import clean


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run with the models that it left.

    Attributes:
        experiment: the run, with its data and its base.
        params: the base, with what the method added to it.
        personal: every client's own adapters, without the neighbours that the options may ask for.
        general: the global model, as each client would begin with it; None where there is none, or none was kept.
    """

    experiment: Experiment
    params: PyTree
    personal: Adapters
    general: Adapters | None


def open_finished(folder: Path, stored: StoredConfig, show: Progress, *, scoring: bool = True) -> FinishedRun:
    """Load the base of a finished run, its data and its adapters, and see that they are those of the run.

    Without `scoring` answers are asked for and no rewards, so nothing is computed for these; and a run on more devices
    than there are here is opened on those that there are.

    Raises:
        UserError: a file is missing, or data, clients, model or options are not those of the run.
    """
    run, then = dataclasses.replace(stored.run, out=folder), stored.content["fingerprint"]
    if not scoring and stored.mesh.devices > len(jax.devices()):
        run = dataclasses.replace(run, system=dataclasses.replace(run.system, mesh="", wave=None))
    fingerprints.tell_versions(stored.content["versions"], show.note)
    fingerprints.compare_given(folder, run, then)
    model = load_model(run, show.note, partial(fingerprints.compare_sources, folder, run, then))
    experiment = open_experiment(run, model, show, reference=scoring, budget=stored.budget)
    clients = experiment.data.fingerprint["clients"]
    fingerprints.compare_clients(folder, then["clients"], clients)
    params = place_base(model.mesh, load_base(folder / "adapters", model.params), model.vlm.cuts)
    adapters, names = folder / "adapters", list(clients)
    return FinishedRun(experiment, params, open_adapters(adapters, names), open_global(adapters, names))


def evaluate(folder: Path, show: Progress | None = None) -> dict[str, Any]:
    """Score every client's adapter of a finished run on validation and test again.

    Writes `evaluation.json` beside the results and returns it, in the form of `results.json`; without the global model.

    Raises:
        UserError: the run is not finished, a file is missing, or data, clients, model or options are not those of the
            run.
    """
    show = show or SilentProgress()
    read_config(folder)  # before the folder is claimed, for it may be none
    with Claim(folder):
        finished = open_finished(folder, read_finished(folder), show)
        experiment, count = finished.experiment, len(finished.experiment.examples.clients)
        with working(show, f"evaluating {format_count(count, 'client')} and the bare base, which compiles first"):
            # Of the global model the results have all there is to know: it is no client's.
            _, scores = score_models(experiment, finished.params, finished.personal, None, score_base(experiment))
        if processes.is_first():
            write_json(folder / "evaluation.json", scores)
    return scores


def evaluate_adapter(run: Run, show: Progress | None = None) -> RunRecord:
    """Score the adapter of a PEFT folder, `run.start`, on validation and test of every client; nothing is written.

    Returns:
        What a finished run is read as, with the adapter as every client's own.

    Raises:
        UserError: the folder cannot be read, its base is another, or data or model are missing or do not fit.
    """
    show = show or SilentProgress()
    run = fit_start(absolute_paths.anchor(run))
    assert run.start is not None
    experiment = open_experiment(run, load_model(run, show.note), show)

    def everywhere(numbers: np.ndarray) -> PyTree:
        return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(numbers), *np.shape(leaf))), experiment.adapter)

    with working(
        show, f"evaluating {format_count(len(experiment.scored), 'client')} and the bare base, which compiles first"
    ):
        base = score_base(experiment)
        _, scores = score_models(experiment, experiment.model.params, everywhere, None, base)
    results = {"selected_round": None, "selected_by": experiment.select_by, **scores}
    return RunRecord(run.start, {"run": {**to_json(run), "method": clean(run.start.name)}}, [], results)
