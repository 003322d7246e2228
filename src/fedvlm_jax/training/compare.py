"""Several methods and seeds on the same clients, cohorts and initial adapter, in one folder.

Everything that does not depend on the method (model, data, frozen features, zero-shot scores) is shared, and a method's
compiled programs serve all its seeds. "X+ft" and "X+knn" continue the run of X where that is in the comparison with
the same options. A comparison that was interrupted goes on where it stopped: finished runs are read, a half-finished
one is resumed. Several processes may share the methods out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_checks import for_method
from fedvlm_jax.config.option_checks import FINETUNED, REMEMBERING, plain, validate_comparison
from fedvlm_jax.config.run_options import SHARE, Run, TrainOptions, to_json, without_extras
from fedvlm_jax.config.start_folder import fit_start
from fedvlm_jax.config.track_options import TrackOptions, check_tracking
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.models import read_vlm
from fedvlm_jax.privacy.accounting import import_accounting
from fedvlm_jax.run_dir.absolute_paths import anchor, move
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.run_dir.fingerprints import compare_given, compare_sources
from fedvlm_jax.run_dir.folder_lock import Claim, name_command
from fedvlm_jax.run_dir.reader import RunRecord, read_run
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.training.round_setup import check_fit
from fedvlm_jax.training.tracking.base import read_records, require
from fedvlm_jax.training.tracking.run_tracking import RunTracking
from fedvlm_jax.training.trainer import Callback
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.parallel import spread
from fedvlm_jax.utils.progress import NoProgress, Numbered, Progress, SilentProgress
from fedvlm_jax.utils.serialization import encode

BYTES = ("bytes_up_per_client", "bytes_down_per_client")
"""Of a round; a comparison has their mean over the federated rounds."""


def compare(
    comparison: Compare,
    show: Progress | None = None,
    model: LoadedModel | None = None,
    settings: Mapping[str, TrainOptions] | None = None,
    track: TrackOptions = TrackOptions(),  # noqa: B008  frozen
) -> Path:
    """Run every method with every seed; return the folder with `comparison.json` and a folder per run.

    A model that earlier runs on the same mesh have loaded saves a start. `settings`: method (with its "+ft" or "+knn")
    -> training options in place of `comparison.base.train`, for example the learning rates tuned for it, which are kept
    in `comparison.json`. `track`: trackers that get the numbers of every run.

    Raises:
        UserError: as `federated_run.train`, or the folder holds runs with other options.
    """
    settings = dict(settings or {})
    check_tracking(track)
    require(track)
    validate_comparison(comparison)
    if comparison.base.privacy.on:
        import_accounting()
    for method, train in settings.items():
        if method not in comparison.methods:
            raise UserError(f"settings for {method}, which is not compared: there are {', '.join(comparison.methods)}")
        validate_comparison(replace(comparison, base=replace(comparison.base, train=train)))
    if comparison.out is None:
        raise UserError("a comparison needs a folder: set out")
    plan = _Plan(replace(comparison, base=fit_start(anchor(comparison.base))), settings, track)
    with Claim(comparison.out):
        return plan.run(show or SilentProgress(), model)


@dataclass(frozen=True)
class _Plan:
    """A comparison with the settings of its methods; it is sent to workers."""

    comparison: Compare
    settings: Mapping[str, TrainOptions]
    track: TrackOptions

    @property
    def folder(self) -> Path:
        assert self.comparison.out is not None
        return self.comparison.out

    @property
    def seeds(self) -> list[int]:
        return [self.comparison.base.seed + number for number in range(self.comparison.seeds)]

    @property
    def common(self) -> Run:
        """The options to load the model with; a rule of `share` is judged by the model's paths then."""
        base, rule = self.comparison.base, self.comparison.method_options.get(SHARE)
        return base if rule is None else for_method(base, SHARE, rule)

    def train_options(self, method: str) -> TrainOptions:
        steps = self.comparison.finetune_steps if method.endswith(FINETUNED) else 0
        return replace(self.settings.get(method, self.comparison.base.train), finetune_steps=steps)

    def make_run(self, method: str, seed: int) -> Run:
        base, name = self.comparison.base, plain(method)
        neighbours = self.comparison.neighbours if method.endswith(REMEMBERING) else 0
        return replace(
            for_method(replace(base, train=self.train_options(method)), name, self.comparison.method_options.get(name)),
            seed=seed,
            evaluation=replace(base.evaluation, neighbours=neighbours),
            out=self.folder / "runs" / f"{method}-seed{seed}",
        )

    def run(self, show: Progress, model: LoadedModel | None) -> Path:
        methods = self.comparison.methods
        self.check_methods(model)
        if self.comparison.processes > 1:
            self.spread_out(show)
            self.tell_faults(show)
            show = NoProgress()  # from here on, all is there to be read
        model = model or load_model(self.common, show.note)
        self.check_finished(methods, model)
        runs: list[dict[str, Any]] = []
        zero_shot: list[dict[str, Any]] = []
        metric = ""
        for seed in self.seeds:
            records = self.run_seed(seed, methods, show, model)
            runs += [_describe(records[method], method, seed, self.folder) for method in methods]
            first = records[methods[0]]
            zero_shot.append({"seed": seed, **first.results["zero_shot"]})
            metric = first.metric
        content = {
            "methods": list(methods),
            "seeds": self.seeds,
            "selected_by": metric,
            "command": name_command(),
            "runs": runs,
            "zero_shot": zero_shot,
            "settings": to_json(replace(self.comparison.base, out=None)),
            "train": {method: encode(self.train_options(method)) for method in methods},
            **describe_environment(),
        }
        if processes.is_first():
            write_json(self.folder / "comparison.json", content)
        return self.folder

    def tell_faults(self, show: Progress) -> None:
        """Say which trackers were dropped, which workers can tell nobody."""
        for run in (self.make_run(method, seed) for seed in self.seeds for method in self.comparison.methods):
            assert run.out is not None
            for record in read_records(run.out):
                if record.fault and record.tracker in self.track.trackers:
                    show.note(f"{run.out.name}: {record.tracker} was dropped: {record.fault}")

    def check_methods(self, model: LoadedModel | None) -> None:
        """Refuse a method that cannot work with the model, before another one is trained."""
        vlm = read_vlm(self.comparison.base.model) if model is None else model.vlm
        for method in dict.fromkeys(map(plain, self.comparison.methods)):
            check_fit(self.make_run(method, self.seeds[0]), vlm)

    def check_finished(self, methods: Sequence[str], model: LoadedModel) -> None:
        """Refuse to compare runs of other data or another model: those that are finished are only read."""
        for run in (self.make_run(method, seed) for seed in self.seeds for method in methods):
            assert run.out is not None
            if (run.out / "results.json").is_file():
                refuse_other_sources(run.out, run, model)

    def run_seed(self, seed: int, methods: Sequence[str], show: Progress, model: LoadedModel) -> dict[str, RunRecord]:
        records: dict[str, RunRecord] = {}
        before, total = len(methods) * self.seeds.index(seed), len(methods) * len(self.seeds)
        ordered = sorted(methods, key=lambda name: name != plain(name))  # a run comes before its continuation
        for number, method in enumerate(ordered, start=before + 1):
            start = records.get(plain(method)) if method != plain(method) else None
            run, numbered = self.make_run(method, seed), Numbered(show, number, total)
            callbacks = (RunTracking(self.track, self.track.name or self.folder.name),)
            records[method] = finish_run(run, numbered, model, start.folder if start else None, callbacks)
        return records

    def spread_out(self, show: Progress) -> None:
        """Give a method to one process, which compiles it once for all seeds, and its continuations with it."""
        groups: dict[str, list[str]] = {}
        for method in self.comparison.methods:
            groups.setdefault(plain(method), []).append(method)
        count = self.comparison.processes
        show.note(
            f"{format_count(len(groups), 'method')}, {format_count(len(self.seeds), 'seed')} each, in "
            f"{format_count(count, 'process', 'processes')}"
        )
        tasks = [(self, tuple(methods)) for methods in groups.values()]
        for number, methods in enumerate(spread(_work, tasks, count), start=1):
            show.note(f"{number} of {len(groups)} finished: {', '.join(methods)}")


def _work(task: tuple[_Plan, tuple[str, ...]]) -> tuple[str, ...]:
    plan, methods = task
    model = _load_once(plan.common)
    plan.check_finished(methods, model)
    for seed in plan.seeds:
        plan.run_seed(seed, methods, NoProgress(), model)
    model.drop_programs()
    return methods


_load_once = lru_cache(maxsize=1)(load_model)  # the tasks of a worker share a model


def _describe(record: RunRecord, method: str, seed: int, folder: Path) -> dict[str, Any]:
    federated = [line for line in record.rounds if line["method"] == plain(method)]
    return {
        "method": method,
        "seed": seed,
        "folder": str(record.folder.relative_to(folder)),
        **record.results["personal"],
        **{name: record.results[name] for name in ("global", "held_out") if name in record.results},
        "selected_round": record.results["selected_round"],
        **({"epsilon": found["epsilon"]} if (found := record.results.get("privacy")) else {}),
        "seconds": sum(line["seconds"] for line in record.rounds),
        **{name: round(sum(line[name] for line in federated) / len(federated)) for name in BYTES},
    }


def refuse_other_sources(folder: Path, run: Run, model: LoadedModel) -> None:
    """Refuse a finished run, which is only read, of other files than the runs it is put beside.

    Raises:
        UserError: they have changed since.
    """
    if stored := read_config(folder).content.get("fingerprint"):
        compare_sources(folder, run, stored, model.sources(run.data))
        compare_given(folder, run, stored)


def finish_run(
    run: Run,
    show: Progress,
    model: federated_run.Model,
    start: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunRecord:
    """Read the run if it is finished, go on with it if it was begun, else run it.

    `start` is the folder of a finished run, which `run` continues if it is `run` without what follows the federation.
    `callbacks` come after those of every run.

    Raises:
        UserError: as `federated_run.train`, or the folder holds a run with other options.
    """
    run = anchor(run)
    assert run.out is not None
    if (run.out / "config.json").exists():
        stored = replace(read_config(run.out).run, out=run.out)
        if move(stored, run) != run:  # but for where data and model are
            raise UserError(f"{run.out} was made with other options: choose another --out, or repeat the first command")
        federated_run.resume(run.out, show, model, callbacks, places=None if stored == run else run)
        return read_run(run.out)
    done = None if start is None else read_config(start).run
    if start is not None and done is not None and done == replace(without_extras(run), out=done.out):
        federated_run.extend(start, run, show, model, callbacks)
    else:
        federated_run.train(run, show, model, callbacks)
    return read_run(run.out)
