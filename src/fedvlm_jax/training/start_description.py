"""The description of a run's start in its `config.json`: options, sizes, devices, versions, digests of what it read."""

import dataclasses
from collections import Counter
from typing import Any

from fedvlm_jax import lora
from fedvlm_jax.config.run_options import TrainOptions, to_json
from fedvlm_jax.data.answer_distances import measure_answer_distances
from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.tokenization import find_question_column
from fedvlm_jax.distributed import processes
from fedvlm_jax.federation.traced_update import count_trained
from fedvlm_jax.methods import Method
from fedvlm_jax.models import Vlm
from fedvlm_jax.privacy.budget import publish_budget
from fedvlm_jax.run_dir import artifacts
from fedvlm_jax.run_dir.fingerprints import describe_given
from fedvlm_jax.training.experiment import Experiment
from fedvlm_jax.training.loaded_model import LoadedModel
from fedvlm_jax.utils import tree


def _describe_classes(model: LoadedModel) -> dict[str, int]:
    """Count the classes of a model that chooses among them, and those that it trains among."""
    if model.learner is None:
        return {}
    return {"classes": len(model.vlm.classes), "trained_classes": len(model.learner.classes)}


def _describe_trust(experiment: Experiment) -> dict[str, Any]:
    """Name the attackers, and say how unlike clients' answers are where a rule may cut those that are."""
    clients, attackers = experiment.examples.clients, experiment.attackers
    named = {"attackers": [clients[number].name for number in attackers]} if attackers else {}
    robust = experiment.run.messages.pool != "mean"
    return {**named, **({"answer_distances": measure_answer_distances(experiment.examples)} if robust else {})}


def describe_adapter(
    adapter: lora.Adapter, method: Method, vlm: Vlm, train: TrainOptions, steps: int
) -> dict[str, Any]:
    """Count the numbers that a client trains in a round of so many steps, and list the sites of the adapter.

    Args:
        adapter: the one that a run starts from.
        method, vlm: the method, made for the model that is trained.
    """
    factors = {path for path in tree.flatten(adapter) if not path.endswith("scale")}
    trained = count_trained(method, vlm, adapter, train.rounds, steps=steps, batch=train.batch_size)
    return {"adapter_parameters": trained, "adapted_sites": sorted({path.rpartition("/")[0] for path in factors})}


def describe_start(experiment: Experiment, method: Method) -> dict[str, Any]:
    """Describe how a run with this method, made for its model, began: for its `config.json`."""
    run, layout, mesh, examples = experiment.run, experiment.layout, experiment.model.mesh, experiment.examples
    clients = examples.clients
    resolved = {
        "wave": layout.wave,
        "waves": layout.waves,
        "cohort": layout.cohort,
        "rows": layout.rows,
        "steps": layout.steps,
        "mesh": dict(mesh.shape),
        "processes": processes.count(),
        "clients": [client.name for client in clients],
        "evaluated": [clients[number].name for number in experiment.scored],
        "train_examples": [len(client.train) for client in clients],
        **describe_adapter(
            experiment.adapter, method, experiment.model.learner or experiment.model.vlm, run.train, layout.steps
        ),
        "targets": experiment.spec.targets or "",
        **({"prompt_vectors": experiment.spec.prompt} if experiment.spec.prompt else {}),
        "skipped": [dataclasses.asdict(row) for row in examples.skipped],
        **_describe_classes(experiment.model),
        **_describe_trust(experiment),
        "question_column": find_question_column(experiment.data.table, run.data),
        **({} if experiment.budget is None else {"privacy": publish_budget(experiment.budget)}),
    }
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    return {
        "run": to_json(experiment.asked or run),
        **artifacts.describe_start(),
        **artifacts.describe_environment(),
        "devices": [f"{count} × {kind}" for kind, count in kinds.items()],
        "examples": {split: sum(len(client.rows_of(split)) for client in clients) for split in SPLITS},
        "resolved": resolved,
        # Not among what was resolved, which reports list.
        **({"secret": budget.secret} if (budget := experiment.budget) and budget.secret else {}),
        "fingerprint": {**experiment.data.fingerprint, **describe_given(run)},
        "federation": experiment.data.federation.description,
    }
