"""`fedvlm report RUN...`: Markdown and one self-contained HTML page."""

from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.errors import UserError


def report(
    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help="Folders of runs, or one of a comparison."),
    ],
) -> None:
    """Write the report of a run, of several runs, or of a comparison, anew."""
    if not folders:
        raise UserError("say whose report: fedvlm report RUN...")

    from fedvlm_jax.reporting.report import write_report

    print(write_report(folders))
