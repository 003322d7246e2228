"""MLflow: where MLFLOW_TRACKING_URI says, else where MLflow keeps runs by default, a database in the working folder.

Sent are the numbers and the options, through MLflow's client, which adds no user, source or commit.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from fedvlm_jax.training.tracking.base import Numbers, Session, Value
from fedvlm_jax.training.tracking.tracker_thread import hide_passwords

PACKAGE, REQUIREMENT = "mlflow", "mlflow>=3,<4"
MOST_METRICS, MOST_PARAMETERS, LONGEST = 1000, 100, 500
"""Of a request: metrics and parameters at most, and characters of a parameter that every kind of store takes."""

EVERY_LINE = "seconds"  # a number that the line of every round has


def check() -> None:
    """Require nothing yet: whether a server is there is seen when the run begins."""


def open_tracker(session: Session) -> "MlflowRun":
    """Create a run in the experiment that has the project's name, or go on with the one of the record's id.

    Raises:
        Exception: what MLflow raises where the store is not reached, or has no such run.
    """
    return MlflowRun(session)


class MlflowRun:
    """A run at MLflow; a round is a step, and the results are metrics of the last."""

    def __init__(self, session: Session) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # to its makers
        mlflow = import_module("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table of a new database
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._entities: Any = import_module("mlflow.entities")
        record = session.record
        # The default depends on the working folder, which may be another when a run goes on.
        # A record may be a stranger's, who is not to say which server numbers are sent to.
        known = record.place if _is_local(record.place) and not os.environ.get("MLFLOW_TRACKING_URI") else ""
        uri = known or str(mlflow.get_tracking_uri())
        local = _is_local(uri)
        self._client: Any = import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        self.place = uri if local else ""  # others may hold a password
        self.id, self.sent = record.id, record.round
        if record.id:
            self._client.update_run(record.id, status="RUNNING")
            self.sent = max((entry.step for entry in self._client.get_metric_history(self.id, EVERY_LINE)), default=0)
        else:
            tags = {"group": record.group}
            experiment = self._find_experiment(record.project)
            self.id = self._client.create_run(experiment, run_name=record.name, tags=tags).info.run_id
            for parameters in _divide(session.parameters, MOST_PARAMETERS):
                listed = [self._entities.Param(name, str(value)[:LONGEST]) for name, value in parameters.items()]
                self._client.log_batch(self.id, params=listed)
        self.view = f"mlflow ui --backend-store-uri {uri}" if local else hide_passwords(uri)

    def log(self, round_: int, numbers: Numbers) -> None:
        """Log the numbers of a round in one request, unless there are very many."""
        now = int(time.time() * 1000)
        for part in _divide(numbers, MOST_METRICS):
            self._client.log_batch(self.id, [self._entities.Metric(name, part[name], now, round_) for name in part])

    def log_results(self, round_: int, numbers: Numbers) -> None:
        """Log the results, at the last round."""
        self.log(round_, numbers)

    def close(self, finished: bool) -> None:
        """Say that the run is finished, or was stopped."""
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")

    def _find_experiment(self, name: str) -> str:
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except Exception:
            if (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return found.experiment_id  # another process has created it in between


def _is_local(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file", "sqlite")


def _divide(values: Mapping[str, Value], most: int) -> Iterator[dict[str, Any]]:
    left = iter(values.items())
    while part := dict(islice(left, most)):
        yield part
