"""A finished run's stored adapters, evaluated once more from their files."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import place_base
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir import absolute_paths, fingerprints
from fedvlm_jax.run_dir.artifacts import load_base, open_adapters
from fedvlm_jax.run_dir.config_seal import check_seal
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.final_evaluation import score_base, score_models
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress import Progress, SilentProgress, working


def evaluate(folder: Path, show: Progress | None = None) -> dict[str, Any]:
    """Score every client's adapter of a finished run on validation and test again.

    Writes `evaluation.json` beside the results and returns it, in the form of `results.json`; without the global model,
    which is not stored.

    Raises:
        UserError: the run is not finished, a file is missing, or data, clients, model or options are not those of the
            run.
    """
    show = show or SilentProgress()
    read_config(folder)  # before the folder is claimed, for it may be none
    with Claim(folder):
        if not (folder / "results.json").is_file():
            raise UserError(f"{folder}: this run is not finished; go on with: fedvlm train --resume {folder}")
        stored = read_config(folder)
        run, then = dataclasses.replace(stored.run, out=folder), stored.content["fingerprint"]
        check_seal(folder / "config.json", stored.content)
        fingerprints.tell_versions(stored.content["versions"], show.note)
        absolute_paths.find_places(folder, run)
        model = load_model(run, show.note, partial(fingerprints.compare_sources, folder, run, then))
        experiment = open_experiment(run, model, show)
        clients = experiment.data.fingerprint["clients"]
        fingerprints.compare_clients(folder, then["clients"], clients)
        params = place_base(model.mesh, load_base(folder / "adapters", model.params), model.vlm.cuts)
        with working(show, f"evaluating {len(clients)} clients and the bare base, which compiles first"):
            adapters = open_adapters(folder / "adapters", list(clients))
            # The global model is not stored.
            _, scores = score_models(experiment, params, adapters, None, score_base(experiment))
        if processes.is_first():
            write_json(folder / "evaluation.json", scores)
    return scores
