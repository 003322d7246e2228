"""The folder of a deployment's server: that of a run, with what nodes said of themselves in place of data."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from fedvlm_jax.config.run_options import to_json
from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.deployment.plan import Plan
from fedvlm_jax.deployment.roll import Member
from fedvlm_jax.errors import DamagedError, UserError
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.run_dir import artifacts
from fedvlm_jax.run_dir.config_seal import check_seal, seal
from fedvlm_jax.run_dir.validated_files import read_config, read_results
from fedvlm_jax.utils.files import write_json

RESULTS = "results.json"
KEPT = 2
"""The newest checkpoints that are kept."""


class ServerFolder:
    """The files of a deployment at its server, written as its rounds go.

    Attributes:
        path: the folder.
        checkpoints: of the server's state, the best one and who counted when.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        """Open the folder of a plan, new or that of a server that ended.

        Raises:
            UserError: it is the folder of another plan, or of something else.
        """
        self.path, self._plan = path, plan
        path.mkdir(parents=True, exist_ok=True)
        if (path / "config.json").is_file():
            stored = read_config(path).content
            check_seal(path / "config.json", stored)
            if stored.get("federation", {}).get("plan") != plan.digest:
                raise UserError(f"{path} is the folder of another run or plan: choose another for this one")
        self.checkpoints = Checkpoints(path / "checkpoints", keep=KEPT)

    @property
    def is_finished(self) -> bool:
        """Say whether the deployment has ended with its results."""
        return (self.path / RESULTS).is_file()

    def write_config(self, model: str, adapter: Mapping[str, Any], members: Mapping[int, Member], steps: int) -> None:
        """Write the record of the start, once; `adapter` is what `describe_adapter` says."""
        file = self.path / "config.json"
        if file.is_file():
            return
        plan, names = self._plan, [members[number].name for number in sorted(members)]
        sizes = [members[number].sizes for number in sorted(members)]
        resolved = {
            "wave": 1,
            "waves": plan.cohort,
            "cohort": plan.cohort,
            "steps": steps,
            "mesh": {"clients": 1, "model": 1},
            "processes": 1,
            "clients": names,
            "evaluated": names,
            "train_examples": [held["train"] for held in sizes],
            **adapter,
            "skipped": [],
        }
        config = {
            "run": {**to_json(plan.run), "model": model, "out": str(self.path)},
            **artifacts.describe_start(),
            **artifacts.describe_environment(),
            "devices": [f"{plan.clients} × a node's own"],
            "examples": {split: sum(held[split] for held in sizes) for split in SPLITS},
            "resolved": resolved,
            "fingerprint": {"data": "", **plan.model, "clients": dict.fromkeys(names, "")},
            "federation": {"deployment": f"{plan.clients} nodes", "plan": plan.digest},
        }
        write_json(file, seal(config))

    def save(self, round_: int, state: PyTree, members: Mapping[int, Member], best: tuple[int, list[float]]) -> None:
        """Write the checkpoint of a round."""
        listed = {str(number): asdict(member) for number, member in members.items()}
        self.checkpoints.save(round_, state, {"members": listed, "best": list(best)})

    def load(self, template: PyTree) -> tuple[int, PyTree, dict[int, Member], tuple[int, list[float]]] | None:
        """Read the newest checkpoint that is whole: its round and what `save` was given; None where there is none.

        Raises:
            UserError: there are checkpoints, and none is whole or fits.
        """
        faults = list[str]()
        for round_ in self.checkpoints.rounds():
            try:
                state, extra = self.checkpoints.restore(round_, template)
            except DamagedError as error:
                faults.append(str(error))
                self.checkpoints.forget(round_)
                continue
            members = {int(number): Member(**member) for number, member in extra["members"].items()}
            best_round, score = extra["best"]
            return round_, state, members, (best_round, score)
        if faults:
            raise UserError(f"{self.path}: no checkpoint is whole ({faults[0]}); choose another folder and start anew")
        return None

    def write_results(self, method: str, round_: int, shared: PyTree, results: Mapping[str, Any]) -> None:
        """Write what is shared and the numbers that the deployment ends with."""
        artifacts.save_adapters(self.path / "adapters", [], jax.device_get(shared), {"method": method, "round": round_})
        self.replace_results(results)

    def read_results(self) -> dict[str, Any]:
        """Read the numbers that the deployment ended with.

        Raises:
            UserError: they cannot be read.
        """
        return read_results(self.path / RESULTS)

    def replace_results(self, results: Mapping[str, Any]) -> None:
        """Write the numbers anew, for clients that came later."""
        write_json(self.path / RESULTS, results)
