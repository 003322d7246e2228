"""`fedvlm evaluate RUN`: every client's stored adapter once more."""

from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.cli._startup import start_quickly
from fedvlm_jax.errors import UserError


def evaluate(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="The folder of a run.")],
) -> None:
    """Evaluate every client's adapter of a finished run again."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no config.json there, so it is not the folder of a run")

    start_quickly()

    from fedvlm_jax.reporting import score_tables, tables
    from fedvlm_jax.run_dir import reader
    from fedvlm_jax.training import evaluate as evaluating
    from fedvlm_jax.utils import progress_display

    show = progress_display.open_progress()
    try:
        evaluating.evaluate(run, show)
    finally:
        show.finish()
    tables.show_all(score_tables.tabulate_run(reader.read_run(run)))
