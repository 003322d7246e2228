"""`fedvlm compare`: several methods and seeds on the same clients, side by side."""

import dataclasses
import sys
from datetime import datetime
from typing import Annotated

import tyro

from fedvlm_jax.runs.config import Compare, name_folder
from fedvlm_jax.runs.quick_start import start_quickly
from fedvlm_jax.runs.validation import validate_comparison

__all__ = ["compare"]


def compare(comparison: Annotated[Compare, tyro.conf.arg(name="")]) -> None:
    """Run several methods on the same clients, cohorts and initial adapter, and compare them client by client."""
    validate_comparison(comparison)
    start_quickly()
    folder = comparison.out or name_folder("compare", datetime.now())
    comparison = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, out=folder))

    from rich.console import Console

    from fedvlm_jax.runs import compare as comparing
    from fedvlm_jax.runs import folders, progress, report, tables

    show = progress.open_progress()
    try:
        folder = comparing.compare(comparison, show)
    except KeyboardInterrupt:
        show.finish()
        print(f"\nfedvlm: stopped. To go on: the same command with --out {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        show.finish()
    record = folders.read_comparison(folder)
    page = report.write_report([folder])
    console = Console()
    for table in tables.tabulate_comparison(record):
        tables.show(console, table)
    console.print(f"comparison  {folder}\nreport      {page}", highlight=False, soft_wrap=True)
