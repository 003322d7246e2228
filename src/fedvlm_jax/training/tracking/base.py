"""The interface of a tracker, and the record of a run at one, `RUN/tracking/NAME.json`, by which it is found again."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from fedvlm_jax.config.track_options import TRACKERS, TrackerName, TrackOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.validated_files import parse_json, read_text
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.serialization import decode, encode

FOLDER = "tracking"
"""In a run's folder: the records, and what trackers themselves write."""

PATIENCE = 60.0
"""Seconds after which a tracker that does not answer is dropped."""

Value = str | int | float | bool
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """A run as a tracker knows it.

    Attributes:
        tracker: its name.
        project, name, group: of the run there; runs of a comparison are a group, and a run with training alone.
        client_names: are clients named?
        id: by which the tracker finds the run.
        place: where the tracker keeps it, if that is on this machine and a tracker may have several such places.
        view: the command or the address that shows it.
        round: the last round that was sent.
        results: the round after which results were sent; 0 where they were not.
        fault: why the tracker was dropped last time.
    """

    tracker: TrackerName
    project: str
    name: str
    group: str
    client_names: bool = False
    id: str = ""
    place: str = ""
    view: str = ""
    round: int = 0
    results: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Session:
    """A run that is about to begin or to go on, for a tracker.

    Attributes:
        folder: for what the tracker writes beside the run.
        record: of the run there; without an `id` where it is new to the tracker.
        sent: the last round that was sent and is not run again: a tracker that can take rounds back goes on after it,
            another after `record.round`.
        parameters: the run's options, and what was resolved.
    """

    folder: Path
    record: Record
    sent: int
    parameters: Mapping[str, Value]


class Tracker(Protocol):
    """A run at a tracker; every call may raise anything, and may take its time.

    Attributes:
        id, place, view: as `Record` has them.
        sent: the last round that it has: a resumed run sends it the rounds after that.
    """

    id: str
    place: str
    view: str
    sent: int

    def log(self, round_: int, numbers: Numbers) -> None:
        """Take the numbers of a round."""

    def log_results(self, round_: int, numbers: Numbers) -> None:
        """Take the results of a run whose last round this is."""

    def close(self, finished: bool) -> None:
        """Send what is left, and let go; the run is finished, or was stopped."""


class TrackerModule(Protocol):
    """A file in `trackers/`.

    Attributes:
        PACKAGE: that is imported.
        REQUIREMENT: what pip installs it by, as in the extra of the tracker's name.
    """

    PACKAGE: str
    REQUIREMENT: str

    def check(self) -> None:
        """Raise a `UserError` where the tracker is installed and cannot work."""

    def open_tracker(self, session: Session) -> Tracker:
        """Begin the run, or go on with it."""
        ...


def load_tracker(name: str) -> TrackerModule:
    """Return a tracker's file, which imports the tracker's package only when it is asked to.

    >>> load_tracker("tensorboard").PACKAGE
    'tensorboardX'
    """
    return cast(TrackerModule, import_module(f"fedvlm_jax.training.tracking.trackers.{name}"))


def require(options: TrackOptions) -> None:
    """Refuse trackers that are not installed, or not set up.

    Raises:
        UserError: says what to do.
    """
    for name in options.trackers:
        module = load_tracker(name)
        found = find_spec(module.PACKAGE)
        # A folder of that name in the working folder, as W&B makes one, would be found too.
        if found is None or found.origin is None:
            raise UserError(
                f"--track {name} needs the package {module.PACKAGE}, which is not installed: "
                f"pip install '{module.REQUIREMENT}'"
            )
        module.check()


def locate(folder: Path, name: str) -> Path:
    """Return the file of the record of a run at a tracker."""
    return folder / FOLDER / f"{name}.json"


def read_record(folder: Path, name: str) -> Record | None:
    """Read the record of the run in a folder at a tracker; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = locate(folder, name)
    if not file.is_file():
        return None
    try:
        record = decode(Record, parse_json(file, read_text(file)))
    except UserError as error:
        raise UserError(f"{file}: {error}; without this file the run is a new one to {name}") from None
    if record.tracker != name:
        raise UserError(f"{file} is the record of {record.tracker}; without this file the run is a new one to {name}")
    return record


def read_records(folder: Path) -> list[Record]:
    """Read the records of the run in a folder at all trackers.

    Raises:
        UserError: a file is damaged.
    """
    found = (read_record(folder, name) for name in TRACKERS)
    return [record for record in found if record is not None]


def write_record(folder: Path, record: Record) -> None:
    """Write the record of the run in a folder.

    Raises:
        OSError: the disk does not take it.
    """
    file = locate(folder, record.tracker)
    file.parent.mkdir(exist_ok=True)
    write_json(file, encode(record))


def make_record(
    folder: Path, name: TrackerName, options: TrackOptions, within: str = "", beside: Path | None = None
) -> Record:
    """Return the record of a run at a tracker: the one that there is, or a new one.

    Args:
        folder, name: of the run, and of the tracker.
        options: what was asked for.
        within: the name of the comparison that the run is a part of.
        beside: the folder of the run that this one is a baseline of; the tracker has both in one project and group.

    Raises:
        UserError: the record that there is is damaged, or the options ask for another project or name.
    """
    known, default = read_record(folder, name), TrackOptions()
    own = options.name or folder.name
    new = Record(
        tracker=name,
        project=options.project,
        name=f"{within}/{folder.name}" if within else own,
        group=within or own,
        client_names=options.client_names,
    )
    if beside is not None and (above := read_record(beside, name)):
        new = dataclasses.replace(
            above, name=f"{above.name}/{folder.name}", id="", place="", view="", round=0, results=0, fault=""
        )
    if known is None:
        return new
    for flag, asked, there in (
        ("project", options.project != default.project and new.project, known.project),
        ("name", bool(options.name) and new.name, known.name),
    ):
        if asked and asked != there:
            raise UserError(f"{folder} is at {name} already, with --track.{flag} {there}: leave the option out")
    return dataclasses.replace(known, client_names=known.client_names or options.client_names)


def read_tracked(folder: Path) -> TrackOptions:
    """Return the options by which a run that goes on is tracked as it was.

    Raises:
        UserError: a record is damaged.
    """
    return TrackOptions(tuple(record.tracker for record in read_records(folder)))
