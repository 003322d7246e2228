"""`fedvlm train`: one federated run, or the rest of one."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedvlm_jax.cli._flags import WORDS, find_written
from fedvlm_jax.cli._process.signals import advising
from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.cli._process.supervise import CHILD, Together, supervise, together
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.config.track_options import TrackOptions, check_tracking
from fedvlm_jax.distributed.launch import DistributedOptions, check_distributed
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.folder_lock import make_folder, remove_unused
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.utils.option_ranges import list_options

ROUNDS = ("--train.rounds", "--rounds")  # the one option that a resumed run takes: it trains a finished run longer
# Options that say where something is: a resumed run may find it elsewhere.
PLACES = ("--model", "--data", "--data.path", "--data.image-root")
# Flags that may stand beside `--resume`, with those of several processes.
TRACK = ("--track", "--track.project", "--track.name", "--track.client-names")
GO_ON = frozenset(("--resume", "--profile", "--baseline", "--no-baseline", *TRACK, *PLACES, *ROUNDS))


def train(
    run: Annotated[Run, tyro.conf.arg(name="")] = Run(),  # noqa: B008  frozen
    distributed: DistributedOptions = DistributedOptions(),  # noqa: B008  frozen
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(default: no)")] = False,
    baseline: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: yes)")] = True,
    track: TrackOptions = TrackOptions(),  # noqa: B008  frozen
) -> None:
    """Fine-tune one adapter per client, together, and evaluate every client's own model.

    Args:
        run: the options.
        distributed: of several processes.
        profile: trace two rounds after the first into RUN/profile, for Perfetto, XProf and TensorBoard. Goes with
            --resume too, and changes no result.
        baseline: then train every client alone with the same options, into RUN/baseline, to say what sharing is worth;
            it takes as long again. Goes with --resume too.
        track: trackers. Go with --resume too.
    """
    check_distributed(distributed)
    check_tracking(track)
    if distributed.asked and CHILD not in os.environ:
        command = [sys.executable, "-m", "fedvlm_jax", *WORDS.get()]
        raise SystemExit(supervise(command, distributed, run.resume or run.out))
    if run.resume is None:
        validate(run)
    else:
        _refuse_options(run)
        if not (run.resume / "config.json").is_file():
            raise UserError(f"--resume {run.resume}: no config.json there, so it is not the folder of a run")
        track = _find_trackers(run.resume, track)
    if track.trackers and distributed.process in (None, 0):  # the first process tracks
        from fedvlm_jax.training.tracking.base import require

        require(track)
    start_quickly(lines=profile)
    with together(distributed) as about:
        _train(run, about, distributed.asked, profile, baseline, track)


def _find_trackers(folder: Path, track: TrackOptions) -> TrackOptions:
    """Return the trackers of a run that goes on: those that are named, else those that it has."""
    from fedvlm_jax.training.tracking.base import make_record, read_tracked

    if find_written().isdisjoint(TRACK):
        return read_tracked(folder)
    for name in track.trackers:
        make_record(folder, name, track)  # refuses another project than the run is in
    return track


def _train(run: Run, about: Together, again: bool, profile: bool, baseline: bool, track: TrackOptions) -> None:
    """Train or go on; `again`: a run that has begun in its folder goes on without being asked to."""
    from fedvlm_jax.distributed import processes
    from fedvlm_jax.training import federated_run
    from fedvlm_jax.training.extend_run import lengthen
    from fedvlm_jax.utils import progress, progress_display

    folder = about.folder = Path(processes.tell_all(lambda: str(run.resume or run.out or make_folder(run.method))))
    if run.start is not None:
        from fedvlm_jax.config.start_folder import fit_start

        run = fit_start(run)
    begun = run.resume is not None or (again and processes.tell_all(lambda: _has_begun(run, folder)))
    watch, watched = None, dict[str, Any]()
    if profile:
        from fedvlm_jax.analysis.profiling import RoundProfile

        watch = RoundProfile(folder)
        watched["callbacks"] = (watch,)
    alone = dict[str, Any]()
    if track.trackers:
        from fedvlm_jax.training.tracking.run_tracking import RunTracking

        watched["callbacks"] = (*watched.get("callbacks", ()), RunTracking(track))
        alone["make_callbacks"] = lambda: (RunTracking(track, beside=folder),)
    show = progress_display.open_progress() if processes.is_first() else progress.SilentProgress()
    options = dataclasses.replace(read_config(folder).run if begun else run, out=folder, resume=None)
    against, first = "--no-baseline", show
    if baseline:
        from fedvlm_jax.training.local_baseline import find_reason_against

        against = find_reason_against(options)
    if not against:
        first, watched["model"] = progress.Numbered(show, 1, 2), federated_run.load_later(show)
    try:
        with advising(show.finish, lambda: _advise(folder, baseline)):
            if run.resume is not None and not find_written().isdisjoint(ROUNDS):
                processes.tell_all(lambda: lengthen(folder, run.train.rounds))
            if begun:
                named = run.resume is not None and not {*PLACES}.isdisjoint(_list_changes(run))
                moved: dict[str, Any] = {"places": run} if named else {}
                federated_run.resume(folder, first, **moved, **watched)
            else:
                federated_run.train(options, first, **watched)
            if not against:
                from fedvlm_jax.training.local_baseline import train_alone

                train_alone(folder, progress.Numbered(show, 2, 2), watched["model"], **alone)
    finally:
        if run.out is None and processes.is_first():
            remove_unused(folder)
    if processes.is_first():
        _print_results(folder, against)
        if watch is not None:
            print(_describe_profile(watch.folder, watch.written))


def _advise(folder: Path, baseline: bool) -> str:
    if (folder / "results.json").is_file():
        if baseline:
            return f"The run itself is finished; to go on with training alone: fedvlm train --resume {folder}"
        return f"The run itself is finished; its report: fedvlm report {folder}"
    if (folder / "config.json").is_file():
        return f"To go on: fedvlm train --resume {folder}" + ("" if baseline else " --no-baseline")
    return "The run had not begun: there is nothing to go on with, so give the command again"


def _describe_profile(folder: Path, written: Sequence[Path]) -> str:
    if not written:
        return "profile nothing was traced: only rounds whose program has run before are, so there must be two or more"
    return (
        f"profile {folder}: " + ", ".join(path.name for path in written) + " open in "
        f"https://ui.perfetto.dev (nothing is uploaded), and the whole in XProf or TensorBoard: pip install xprof && "
        f"xprof --logdir {folder}"
    )


def _has_begun(run: Run, folder: Path) -> bool:
    """Tell whether this very run is in the folder already; refuse a folder with another one."""
    if not (folder / "config.json").is_file():
        return False
    from fedvlm_jax.run_dir.absolute_paths import anchor

    begun, run = read_config(folder).run, anchor(run)
    if dataclasses.replace(begun, out=None) != dataclasses.replace(run, out=None):
        stored = {option.flag: option.value for option in list_options(dataclasses.replace(begun, out=run.out))}
        other = ", ".join(option.flag for option in list_options(run) if option.value != stored.get(option.flag))
        raise UserError(f"--out {folder} has a run with other options ({other}): choose another folder")
    return True


def _refuse_options(run: Run) -> None:
    """Refuse options beside `--resume`: a resumed run has them from its folder, so they would silently do nothing."""
    if changed := [flag for flag in _list_changes(run) if flag not in (*PLACES, *ROUNDS)]:
        raise UserError(
            f"--resume takes all options from the run's folder, but where moved data are (--data) or a moved model is "
            f"(--model): leave out {', '.join(changed)}"
        )
    # A flag that says the default is no change, and would do nothing either: `--seed 0` for a run of seed 3.
    if written := sorted(flag for flag in find_written() - GO_ON if not flag.startswith("--distributed")):
        raise UserError(f"--resume takes all options from the run's folder: leave out {', '.join(written)}")


def _list_changes(run: Run) -> list[str]:
    """List the flags of options that are not as they are by default."""
    default = {option.flag: option.value for option in list_options(Run(resume=run.resume))}
    return [option.flag for option in list_options(run) if option.value != default.get(option.flag, option.default)]


def _print_results(folder: Path, no_baseline: str) -> None:
    """Show the tables, then the few numbers that matter; `no_baseline`: why nobody was trained alone."""
    from fedvlm_jax.cli._closing import close_run, describe_trackers, suggest_comparison
    from fedvlm_jax.reporting import report, score_tables, tables
    from fedvlm_jax.run_dir import reader, stored_baseline

    record = reader.read_run(folder)
    page = report.write_report([folder])
    console = tables.show_all(score_tables.tabulate_run(record))
    lines = close_run(record)
    if no_baseline and stored_baseline.read_baseline(record) is None:
        lines.append(f"  training alone was left out: {no_baseline}")
    lines += [f"run     {folder}", f"report  {page}", *describe_trackers(folder)]
    lines.append(f"next    {suggest_comparison(record)}")
    console.say("\n".join(lines))
