"""`fedvlm compare`: several methods and seeds on the same clients, side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedvlm_jax.cli._process.signals import advising
from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import validate_comparison
from fedvlm_jax.config.track_options import TrackOptions, check_tracking
from fedvlm_jax.run_dir.folder_lock import choose_folder


def compare(
    comparison: Annotated[Compare, tyro.conf.arg(name="")] = Compare(),  # noqa: B008  frozen
    track: TrackOptions = TrackOptions(),  # noqa: B008  frozen
) -> None:
    """Run several methods on the same clients, cohorts and initial adapter, and compare them client by client.

    Args:
        comparison: the options.
        track: trackers of all its runs.
    """
    validate_comparison(comparison)
    check_tracking(track)
    if track.trackers:
        from fedvlm_jax.training.tracking.base import require

        require(track)
    tracked: dict[str, Any] = {"track": track} if track.trackers else {}
    start_quickly()

    from fedvlm_jax.reporting import report, score_tables, tables
    from fedvlm_jax.run_dir import reader
    from fedvlm_jax.training import compare as comparing
    from fedvlm_jax.utils import progress_display

    with choose_folder(comparison.out, "compare") as folder:
        placed = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, out=folder))
        show = progress_display.open_progress()
        with advising(show.finish, lambda: _advise(folder)):
            comparing.compare(placed, show, **tracked)
    record = reader.read_comparison(folder)
    page = report.write_report([folder])
    console = tables.show_all(score_tables.tabulate_comparison(record))
    console.say(f"comparison  {folder}\nreport      {page}")


def _advise(folder: Path) -> str:
    if any(folder.glob("runs/*/config.json")):
        return f"To go on: the same command with --out {folder}"
    return "No run had begun: there is nothing to go on with, so give the command again"
