"""Several methods and seeds on the same clients, cohorts and initial adapter, in one folder.

Everything that does not depend on the method (model, data, frozen features, zero-shot scores) is shared, and a method's
compiled programs serve all its seeds. "X+ft" and "X+knn" continue the run of X where that is in the comparison with
the same options. A comparison that was interrupted goes on where it stopped: finished runs are read, a half-finished
one is resumed. Several processes may share the methods out.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm_jax.config.method_options import for_method
from fedvlm_jax.config.run_options import SHARE, Compare, Run, TrainOptions, to_json, without_extras
from fedvlm_jax.config.validation import FINETUNED, REMEMBERING, plain, validate_comparison
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.run_dir.fingerprints import anchor, compare_sources, move
from fedvlm_jax.run_dir.folder_lock import Claim, name_command
from fedvlm_jax.run_dir.reader import RunRecord, read_run
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.training.parallel import WorkerProgress, spread
from fedvlm_jax.training.progress import Numbered, Progress, SilentProgress
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.serialization import encode

BYTES = ("bytes_up_per_client", "bytes_down_per_client")
"""Of a round; a comparison tells their mean over the federated rounds."""


def compare(
    comparison: Compare,
    show: Progress | None = None,
    model: LoadedModel | None = None,
    settings: Mapping[str, TrainOptions] | None = None,
) -> Path:
    """Run every method with every seed; returns the folder with `comparison.json` and a folder per run.

    Args:
        comparison: what is compared.
        show: where to report.
        model: what an earlier run of the same model and data left, to start faster.
        settings: method (with its "+ft" or "+knn") -> its own training options in place of `comparison.base.train`,
            for example the learning rates tuned for it. They are kept in `comparison.json`.

    Raises:
        UserError: as `federated_run.train`, or the folder holds runs with other options.
    """
    settings = dict(settings or {})
    _check(comparison, settings)
    comparison = dataclasses.replace(comparison, base=anchor(comparison.base))
    folder = comparison.out
    if folder is None:
        raise UserError("a comparison needs a folder: set out")
    with Claim(folder):
        return _compare(comparison, folder, show or SilentProgress(), model, settings)


def _compare(
    comparison: Compare, folder: Path, show: Progress, model: LoadedModel | None, settings: Mapping[str, TrainOptions]
) -> Path:
    seeds = [comparison.base.seed + number for number in range(comparison.seeds)]
    if comparison.processes > 1:
        _share_out(comparison, settings, seeds, show)
        show = SilentProgress()  # from here on, all is there to be read
    model = model or load_model(_find_common(comparison), show.note)
    _check_finished(comparison, settings, comparison.methods, seeds, model)
    entries: list[dict[str, Any]] = []
    zero_shot: list[dict[str, Any]] = []
    selected_by = ""
    for seed in seeds:
        records = _run_methods(comparison, settings, comparison.methods, seed, show, model)
        entries += [_describe(records[method], method, seed, folder) for method in comparison.methods]
        zero_shot.append({"seed": seed, **records[comparison.methods[0]].results["zero_shot"]})
        selected_by = records[comparison.methods[0]].metric
    content = {
        "methods": list(comparison.methods),
        "seeds": seeds,
        "selected_by": selected_by,
        "command": name_command(),
        "runs": entries,
        "zero_shot": zero_shot,
        "settings": to_json(dataclasses.replace(comparison.base, out=None)),
        "train": {method: encode(_train_options(comparison, settings, method)) for method in comparison.methods},
        **describe_environment(),
    }
    if processes.is_first():
        write_json(folder / "comparison.json", content)
    return folder


def _find_common(comparison: Compare) -> Run:
    """Return the options to open model and data with; a rule of `share` is judged by the model's paths then."""
    rule = comparison.method_options.get(SHARE)
    return comparison.base if rule is None else for_method(comparison.base, SHARE, rule)


def _check_finished(
    comparison: Compare,
    settings: Mapping[str, TrainOptions],
    methods: Sequence[str],
    seeds: Sequence[int],
    model: LoadedModel,
) -> None:
    """Refuse to put runs of other data or another model into one comparison: those that are finished are only read."""
    for run in (_make_run(comparison, settings, method, seed) for seed in seeds for method in methods):
        assert run.out is not None
        if (run.out / "results.json").is_file():
            refuse_other_sources(run.out, run, model)


def _run_methods(
    comparison: Compare,
    settings: Mapping[str, TrainOptions],
    methods: Sequence[str],
    seed: int,
    show: Progress,
    model: LoadedModel,
) -> dict[str, RunRecord]:
    runs = {method: _make_run(comparison, settings, method, seed) for method in methods}
    records: dict[str, RunRecord] = {}
    before, total = len(methods) * (seed - comparison.base.seed), len(methods) * comparison.seeds
    ordered = sorted(runs, key=lambda name: name != plain(name))  # a run comes before its continuation
    for number, method in enumerate(ordered, start=before + 1):
        start = records.get(plain(method)) if method != plain(method) else None
        numbered = Numbered(show, number, total)
        records[method] = finish_run(runs[method], numbered, model, start.folder if start else None)
    return records


def _share_out(comparison: Compare, settings: Mapping[str, TrainOptions], seeds: list[int], show: Progress) -> None:
    """A method goes to one process, which compiles it once for all seeds, and its continuations with it."""
    groups: dict[str, list[str]] = {}
    for method in comparison.methods:
        groups.setdefault(plain(method), []).append(method)
    tasks = [(comparison, settings, tuple(methods), seeds) for methods in groups.values()]
    show.note(f"{len(tasks)} methods, {len(seeds)} seeds each, in {comparison.processes} processes")
    for number, methods in enumerate(spread(_work, tasks, comparison.processes), start=1):
        show.note(f"{number} of {len(tasks)} finished: {', '.join(methods)}")


def _work(task: tuple[Compare, Mapping[str, TrainOptions], tuple[str, ...], list[int]]) -> tuple[str, ...]:
    comparison, settings, methods, seeds = task
    model = _open_kept(_find_common(comparison))
    _check_finished(comparison, settings, methods, seeds, model)
    for seed in seeds:
        _run_methods(comparison, settings, methods, seed, WorkerProgress(), model)
    model.drop_programs()
    return methods


_open_kept = functools.lru_cache(maxsize=1)(load_model)
"""In a worker: what all its tasks have in common."""


def refuse_other_sources(folder: Path, run: Run, model: LoadedModel) -> None:
    """See that a finished run, which is only read, was of the data and the model beside whose runs it is put.

    Raises:
        UserError: they have changed since.
    """
    if stored := read_config(folder).content.get("fingerprint"):
        compare_sources(folder, run, stored, model.sources(run.data))


def finish_run(run: Run, show: Progress, model: federated_run.Model, start: Path | None = None) -> RunRecord:
    """Read the run if it is finished, go on with it if it was begun, else run it.

    Args:
        run: its options; `out` must be given.
        show: where to report.
        model: of the same model and data, or what opens it.
        start: the folder of a finished run; where it is `run` without what comes after the federation, `run` continues
            it.

    Raises:
        UserError: as `federated_run.train`, or the folder holds a run with other options.
    """
    run = anchor(run)
    assert run.out is not None
    if not (run.out / "config.json").exists():
        if start is not None and _is_start(start, run):
            federated_run.extend(start, run, show, model)
        else:
            federated_run.train(run, show, model)
        return read_run(run.out)
    there = dataclasses.replace(_read_options(run.out), out=run.out)
    if move(there, run) != run:
        raise UserError(f"{run.out} was made with other options: choose another --out, or repeat the first command")
    federated_run.resume(run.out, show, model, places=None if there == run else run)
    return read_run(run.out)


def _read_options(folder: Path) -> Run:
    return read_config(folder).run


def _is_start(folder: Path, run: Run) -> bool:
    return _read_options(folder) == dataclasses.replace(without_extras(run), out=_read_options(folder).out)


def _check(comparison: Compare, settings: Mapping[str, TrainOptions]) -> None:
    validate_comparison(comparison)
    for method, train in settings.items():
        if method not in comparison.methods:
            raise UserError(f"settings for {method}, which is not compared: there are {', '.join(comparison.methods)}")
        validate_comparison(dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, train=train)))


def _train_options(comparison: Compare, settings: Mapping[str, TrainOptions], method: str) -> TrainOptions:
    steps = comparison.finetune_steps if method.endswith(FINETUNED) else 0
    return dataclasses.replace(settings.get(method, comparison.base.train), finetune_steps=steps)


def _make_run(comparison: Compare, settings: Mapping[str, TrainOptions], method: str, seed: int) -> Run:
    assert comparison.out is not None
    base = dataclasses.replace(comparison.base, train=_train_options(comparison, settings, method))
    neighbours = comparison.neighbours if method.endswith(REMEMBERING) else 0
    return dataclasses.replace(
        for_method(base, plain(method), comparison.method_options.get(plain(method))),
        seed=seed,
        evaluation=dataclasses.replace(base.evaluation, neighbours=neighbours),
        out=comparison.out / "runs" / f"{method}-seed{seed}",
    )


def _describe(record: RunRecord, method: str, seed: int, folder: Path) -> dict[str, Any]:
    federated = [line for line in record.rounds if line["method"] == plain(method)]
    return {
        "method": method,
        "seed": seed,
        "folder": str(record.folder.relative_to(folder)),
        **record.results["personal"],
        **{name: record.results[name] for name in ("global", "held_out") if name in record.results},
        "selected_round": record.results["selected_round"],
        "seconds": sum(line["seconds"] for line in record.rounds),
        **{name: round(sum(line[name] for line in federated) / len(federated)) for name in BYTES},
    }
