"""`fedvlm compare`: several methods and seeds on the same clients, side by side."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fedvlm_jax.cli._flags import find_written
from fedvlm_jax.cli._process.signals import advising
from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import validate_comparison
from fedvlm_jax.config.track_options import TrackOptions, check_tracking
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.folder_lock import choose_folder

if TYPE_CHECKING:
    from fedvlm_jax.config.benchmark import Benchmark
    from fedvlm_jax.methods.config import MethodOptions
    from fedvlm_jax.run_dir.benchmark_entry import Entry


def compare(
    comparison: Annotated[Compare, tyro.conf.arg(name="")] = Compare(),  # noqa: B008  frozen
    track: TrackOptions = TrackOptions(),  # noqa: B008  frozen
    benchmark: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: what the options say)")
    ] = None,
    check: Annotated[
        Path | None, tyro.conf.arg(metavar="LINE.json", help_behavior_hint="(default: measure a line)")
    ] = None,
) -> None:
    """Run several methods on the same clients, cohorts and initial adapter, and compare them client by client.

    Args:
        comparison: the options.
        track: trackers of all its runs.
        benchmark: rerun this set-up, and write the line for its table: all but --methods, --seeds and where things are
            is settled.
        check: rerun rows of somebody's line, by default the first two with one seed, and say whether they lie within
            their intervals; if not, the exit code is 1.
    """
    if check is not None and benchmark is None:
        raise UserError(f"--check {check} is for a benchmark's line: say which with --benchmark NAME")
    validate_comparison(comparison)
    check_tracking(track)
    if track.trackers:
        from fedvlm_jax.training.tracking.base import require

        require(track)
    tracked: dict[str, Any] = {"track": track} if track.trackers else {}
    if benchmark is not None:
        _run_benchmark(benchmark, comparison, check, tracked)
        return
    start_quickly()

    from fedvlm_jax.training import compare as comparing
    from fedvlm_jax.utils import progress_display

    with choose_folder(comparison.out, "compare") as folder:
        placed = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, out=folder))
        show = progress_display.open_progress()
        with advising(show.finish, lambda: _advise(folder)):
            comparing.compare(placed, show, **tracked)
    _show_comparison(folder)


def _show_comparison(folder: Path) -> None:
    from fedvlm_jax.reporting import report, score_tables, tables
    from fedvlm_jax.run_dir import reader

    record = reader.read_comparison(folder)
    page = report.write_report([folder])
    console = tables.show_all(score_tables.tabulate_comparison(record))
    console.say(f"comparison  {folder}\nreport      {page}")


def _run_benchmark(name: str, comparison: Compare, check: Path | None, tracked: dict[str, Any]) -> None:
    from fedvlm_jax.config.benchmark import check_comparison, find_benchmark

    benchmark = find_benchmark(name)
    entry = None
    if check is None:
        check_comparison(benchmark, comparison)
    else:
        entry, comparison, numbers = _choose_rows(check, benchmark, comparison)
        check_comparison(benchmark, dataclasses.replace(comparison, method_options=numbers))
    start_quickly()

    from fedvlm_jax.reporting import benchmark_tables, report, tables
    from fedvlm_jax.training.benchmarks.check import check_entry
    from fedvlm_jax.training.benchmarks.measure import LINE, run_benchmark
    from fedvlm_jax.utils import progress_display

    with choose_folder(comparison.out, "benchmark") as folder:
        placed = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, out=folder))
        show = progress_display.open_progress()
        with advising(show.finish, lambda: _advise(folder)):
            if entry is None:
                table = benchmark_tables.tabulate_entry(run_benchmark(benchmark, placed, show, **tracked))
                verdicts = []
            else:
                verdicts = check_entry(benchmark, entry, placed, show, **tracked)
                table = benchmark_tables.tabulate_verdicts(benchmark, verdicts)
    page = report.write_report([folder])
    console = tables.show_all([table])
    console.say(f"line        {folder / LINE}\nreport      {page}")
    if not all(verdict.reproduced for verdict in verdicts):
        raise SystemExit(1)


def _choose_rows(
    check: Path, benchmark: "Benchmark", comparison: Compare
) -> "tuple[Entry, Compare, dict[str, MethodOptions]]":
    """Read a line, and choose what of it is rerun: what is written, else its first two rows with one seed.

    With that come the numbers that the line has for these methods.
    """
    from fedvlm_jax.run_dir.benchmark_entry import read_submission, take_numbers

    entry, written = read_submission(check, benchmark), find_written()
    if numbers := [flag for flag in written if flag.startswith("--method.")]:
        raise UserError(f"--check reruns a row with the numbers of its line: leave out {numbers[0]}")
    methods = comparison.methods if "--methods" in written else entry.methods[:2]
    seeds = comparison.seeds if "--seeds" in written else 1
    chosen = dataclasses.replace(comparison, methods=methods, seeds=seeds, method_options={})
    return entry, chosen, take_numbers(entry, methods)


def _advise(folder: Path) -> str:
    if any(folder.glob("**/runs/*/config.json")):
        return f"To go on: the same command with --out {folder}"
    return "No run had begun: there is nothing to go on with, so give the command again"
