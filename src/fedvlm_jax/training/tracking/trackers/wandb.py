"""Weights & Biases: online, or with WANDB_MODE=offline in `RUN/tracking/wandb`, which `wandb sync` sends later.

Sent are the numbers and the options: no console, code, git state, list of packages, machine or its load.
"""

import os
import shlex
import uuid
from importlib import import_module
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.training.tracking.base import PATIENCE, Numbers, Session

PACKAGE, REQUIREMENT = "wandb", "wandb>=0.31,<1"
UNSENT = ("disable_git", "disable_code", "disable_job_creation", "x_disable_stats", "x_disable_meta")


def check() -> None:
    """Refuse to ask for a key in the middle of a run.

    Raises:
        UserError: runs are to be sent, and nobody is logged in.
    """
    wandb = _load()
    wandb.setup(settings=wandb.Settings(silent=True))
    if wandb.setup().settings.mode in ("online", "run") and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "--track wandb: nobody is logged in to W&B on this machine: run `wandb login`, or keep the run here with "
            "WANDB_MODE=offline"
        )


def open_tracker(session: Session) -> "WandbRun":
    """Begin a run, or go on with the one of the record's id.

    Raises:
        Exception: what W&B raises where it is not reached.
    """
    return WandbRun(session)


class WandbRun:
    """A run at W&B; a round is a step, and the results are its summary."""

    def __init__(self, session: Session) -> None:
        wandb, record = _load(), session.record
        self.id = record.id or uuid.uuid4().hex[:12]
        self.place, self.sent = "", record.round
        session.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            **dict.fromkeys(UNSENT, True), console="off", silent=True, save_code=False, x_save_requirements=False,
            x_disable_machine_info=True, host="", reinit="create_new", init_timeout=PATIENCE, finish_timeout=PATIENCE,
        )  # fmt: skip
        self._run: Any = wandb.init(
            project=record.project, name=record.name, group=record.group, id=self.id, resume="allow",
            dir=str(session.folder), config=dict(session.parameters), settings=settings, allow_val_change=True,
        )  # fmt: skip
        offline = bool(self._run.offline)
        self.view = f"wandb sync {shlex.quote(str(self._run.settings.sync_dir))}" if offline else str(self._run.url)
        if not offline:  # where it is asked what it has; the next step is the one after that
            self.sent = max(self.sent, int(self._run.step) - 1)

    def log(self, round_: int, numbers: Numbers) -> None:
        """Log the numbers of a round."""
        self._run.log(dict(numbers), step=round_)

    def log_results(self, round_: int, numbers: Numbers) -> None:
        """Put the results into the summary."""
        del round_
        self._run.summary.update(dict(numbers))

    def close(self, finished: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if finished else 1)


def _load() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own faults, with what stands on the stack
    return import_module("wandb")
