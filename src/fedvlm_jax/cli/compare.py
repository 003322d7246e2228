"""`fedvlm compare`: several methods and seeds on the same clients, side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.cli._signals import exit_code, say
from fedvlm_jax.cli._startup import start_quickly
from fedvlm_jax.config.run_options import Compare
from fedvlm_jax.config.validation import validate_comparison
from fedvlm_jax.errors import UserError, describe_os_error
from fedvlm_jax.run_dir.folder_lock import choose_folder


def compare(
    comparison: Annotated[Compare, tyro.conf.arg(name="")] = Compare(),  # noqa: B008  frozen
) -> None:
    """Run several methods on the same clients, cohorts and initial adapter, and compare them client by client."""
    validate_comparison(comparison)
    start_quickly()

    from fedvlm_jax.reporting import report, score_tables, tables
    from fedvlm_jax.run_dir import reader
    from fedvlm_jax.utils.console import open_console

    with choose_folder(comparison.out, "compare") as folder:
        _compare(dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, out=folder)), folder)
    record = reader.read_comparison(folder)
    page = report.write_report([folder])
    console = open_console()
    for table in score_tables.tabulate_comparison(record):
        tables.show(console, table)
    console.say(f"comparison  {folder}\nreport      {page}")


def _compare(comparison: Compare, folder: Path) -> None:
    from fedvlm_jax.training import compare as comparing
    from fedvlm_jax.training import progress

    show = progress.open_progress()
    try:
        comparing.compare(comparison, show)
    except KeyboardInterrupt as error:
        show.finish()
        raise SystemExit(say(f"stopped. {_advise(folder)}", exit_code(error))) from None
    except OSError as error:
        raise UserError(f"{describe_os_error(error)}. {_advise(folder)}") from error
    finally:
        show.finish()


def _advise(folder: Path) -> str:
    """How to go on with what is in the folder of a comparison that ended early."""
    if any(folder.glob("runs/*/config.json")):
        return f"To go on: the same command with --out {folder}"
    return "No run had begun: there is nothing to go on with, so give the command again"
