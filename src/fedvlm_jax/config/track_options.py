"""Options of the trackers that get a run's numbers; they decide nothing of a run, so they are no part of `Run`.

No heavy package is imported here, so that `--help` answers at once.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from fedvlm_jax.errors import UserError, check_utf8
from fedvlm_jax.utils.option_ranges import shorten

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)

LONGEST = 128
"""Characters of a project's or a run's name at most, as W&B has it."""


@dataclass(frozen=True)
class TrackOptions:
    """Trackers that get the numbers of metrics.jsonl too; what they need beside these they read as they always do"""

    trackers: Annotated[tuple[TrackerName, ...], tyro.conf.arg(name="", help_behavior_hint="(default: none)")] = ()
    """Send every round's line, the options and the results to these as well: losses, validation, bytes, no text of
    any row. A tracker that fails is dropped, and the run goes on. A resumed run goes on with those that it has."""
    project: str = "fedvlm"
    """Project of W&B and trackio, experiment of MLflow."""
    name: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: the folder's name)")] = ""
    """Name of the run there; training alone, and the runs of a comparison, are NAME/FOLDER."""
    client_names: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(default: numbers)")
    ] = False
    """Send clients' results under their names, and not under their numbers."""


def check_tracking(options: TrackOptions) -> None:
    """Refuse options of trackers that cannot work, or that would do nothing.

    Raises:
        UserError: the first of them.

    >>> check_tracking(TrackOptions(project="mine"))
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: --track.project says nothing without --track: name a tracker, or leave it out
    """
    default = TrackOptions()
    if not options.trackers:
        for field, flag in (("project", "project"), ("name", "name"), ("client_names", "client-names")):
            if getattr(options, field) != getattr(default, field):
                raise UserError(f"--track.{flag} says nothing without --track: name a tracker, or leave it out")
    for name in options.trackers:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: there are {', '.join(TRACKERS)}")
        if options.trackers.count(name) > 1:
            raise UserError(f"--track names {name} twice: leave one out")
    for flag, text in (("--track.project", options.project), ("--track.name", options.name)):
        check_utf8(flag, text)
        if len(text) > LONGEST or not text.isprintable() or re.search(r"[/\\#?%:]", text) or text != text.strip():
            raise UserError(
                f"{flag} {shorten(text)!r}: at most {LONGEST} characters that are seen, none of / \\ # ? % : among them"
            )
    if not options.project:
        raise UserError("--track.project is empty: give it a name, or leave it out")
