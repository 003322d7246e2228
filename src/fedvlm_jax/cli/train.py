"""`fedvlm train`: one federated run, or the rest of one."""

import dataclasses
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.errors import UserError
from fedvlm_jax.runs.config import Run, name_folder, to_json
from fedvlm_jax.runs.validation import validate

__all__ = ["train"]


def train(run: Annotated[Run, tyro.conf.arg(name="")]) -> None:
    """Fine-tune one adapter per client, together, and evaluate every client's own model."""
    if run.resume is not None:
        _refuse_changes(run)
        folder = run.resume
        if not (folder / "config.json").is_file():
            raise UserError(f"--resume {folder}: no config.json there, so it is not the folder of a run")
    else:
        validate(run)
        folder = run.out or name_folder(run.method, datetime.now())
        run = dataclasses.replace(run, out=folder)

    from fedvlm_jax.runs import loop, progress

    show = progress.open_progress()
    try:
        folder = loop.train(run, show) if run.resume is None else loop.resume(run.resume, show)
    except KeyboardInterrupt:
        show.finish()
        print(f"\nfedvlm: stopped. To go on: fedvlm train --resume {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        show.finish()
    _print_results(folder)


def _refuse_changes(run: Run) -> None:
    """A resumed run has its options from its folder, so others beside `--resume` would silently do nothing."""
    asked, default = (_flatten(to_json(dataclasses.replace(one, resume=None))) for one in (run, Run()))
    changed = [name for name in asked if asked[name] != default[name]]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-").replace("data.source", "data") for name in changed)
        raise UserError(f"--resume takes all options from the run's folder: leave out {flags}")


def _flatten(options: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in options.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _print_results(folder: Path) -> None:
    from rich.console import Console

    from fedvlm_jax.runs import folders, report, tables

    record = folders.read_run(folder)
    page = report.write_report([folder])
    console = Console()
    for table in tables.tabulate_run(record):
        tables.show(console, table)
    console.print(f"run     {folder}\nreport  {page}", highlight=False, soft_wrap=True)
