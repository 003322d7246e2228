"""The study behind the README's result table: pLoRA against local, fedavg-lora, both with fine-tuning, and zero-shot.

    python experiments/study_emoji.py            # tune, run, report; goes on where it was stopped
    python experiments/study_emoji.py --quick    # a smoke run of all three stages

Cells: {neutral, client-language} x {20, 60 images per client}. `tune` tries the same grid of learning rates for every
method and scores it on validation, with seeds that the study does not use, and never touches test; every point is a
line of `tuning.jsonl`. `run` compares the methods with the rates chosen for each, five seeds, test scored once at the
end. `report` writes `emoji_study.json`, `.md` and `.png`.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import study_summary as summary
import tyro

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import EvaluationOptions, Run, TrainOptions
from fedvlm_jax.data.config import DataOptions, Prompt
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.reporting.figures.theme import save_png
from fedvlm_jax.reporting.tables import to_markdown
from fedvlm_jax.run_dir.reader import read_comparison

METHODS = ("local", "fedavg-lora", "fedavg-lora+ft", "plora")
GRID = ((2e-3, 2e-3), (5e-3, 2e-3), (1e-2, 5e-3))
RESULTS = Path(__file__).parent / "results"
QUICK = {
    "grid": GRID[1:3], "seeds": 2, "images": (6,), "vendors": ("noto", "fluent"), "languages": ("en", "de"),
    "held_out": (4, 6), "rounds": 2, "local_steps": 2, "batch_size": 4, "finetune_steps": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """The study's options; the defaults are those of the README"""

    stage: tyro.conf.Positional[Literal["all", "tune", "run", "report"]] = "all"
    out: Path = Path("runs/study-emoji")
    """Folder of all runs."""
    results: Path | None = None
    """Where the report goes (default: experiments/results; with --quick, into --out)."""
    quick: bool = False
    """A smoke run: four clients, two rounds, two seeds, two points."""
    grid: tuple[tuple[float, float], ...] = GRID
    """Pairs of learning rates for A and B, the same for every method."""
    tune_per: Literal["cell", "prompt"] = "prompt"
    """Tune in every cell, or for each prompt with the most images only and use that for fewer images too."""
    tune_seeds: tuple[int, ...] = (100,)
    """Seeds of the tuning runs."""
    seed: int = 0
    """First seed of the study."""
    seeds: int = 5
    """How many seeds."""
    prompts: tuple[Prompt, ...] = ("client-language", "neutral")
    images: tuple[int, ...] = (20, 60)
    """Training images per client."""
    vendors: tuple[str, ...] = emoji.Options.vendors
    languages: tuple[str, ...] = emoji.Options.languages
    held_out: tuple[int, int] = (emoji.Options.validation_per_client, emoji.Options.test_per_client)
    """Validation and test images per client."""
    rounds: int = 16
    local_steps: int = 4
    batch_size: int = 16
    finetune_steps: int = 20
    evaluate_every: int = 16
    """Validate every so many rounds, and after the last."""
    evaluation_batch: int = 32
    """Examples of one client that are answered at a time."""
    model: str = "florence2-nano"

    def __post_init__(self) -> None:
        study_seeds = range(self.seed, self.seed + self.seeds)
        if set(self.tune_seeds) & set(study_seeds):
            raise SystemExit(f"--tune-seeds {self.tune_seeds} are among the study's own {list(study_seeds)}")

    @property
    def cells(self) -> dict[str, DataOptions]:
        """Cell -> its data."""
        return {f"{p}-{n}": self.data(p, n) for p in self.prompts for n in self.images}

    def data(self, prompt: Prompt, images: int) -> DataOptions:
        """The data of one cell."""
        return emoji.Options(
            prompt=prompt, images_per_client=images, vendors=self.vendors, languages=self.languages,
            validation_per_client=self.held_out[0], test_per_client=self.held_out[1],
        )  # fmt: skip

    def tuned_in(self, cell: str) -> str:
        """The cell whose tuning serves this one."""
        prompt = self.cells[cell].prompt
        return cell if self.tune_per == "cell" else f"{prompt}-{max(self.images)}"

    def base(self, cell: str, seed: int, out: Path, *, test: bool) -> Run:
        """What all runs of a cell have in common."""
        train = TrainOptions(rounds=self.rounds, local_steps=self.local_steps, batch_size=self.batch_size)
        evaluation = EvaluationOptions(
            every=self.evaluate_every, batch_size=self.evaluation_batch, before_redistribution=False, test=test
        )
        return Run(
            model=self.model, seed=seed, data=self.cells[cell], train=train, evaluation=evaluation, out=out,
            checkpoint_every=self.rounds,
        )  # fmt: skip

    def rates(self, train: TrainOptions, method: str, pair: tuple[float, float]) -> TrainOptions:
        """A method's training options at a point of the grid."""
        steps = self.finetune_steps if method.endswith("+ft") else 0
        return dataclasses.replace(train, learning_rate_a=pair[0], learning_rate_b=pair[1], finetune_steps=steps)

    @property
    def extra_rounds(self) -> int:
        """Rounds of local fine-tuning."""
        return -(-self.finetune_steps // self.local_steps)


class Clock:
    """Progress of the whole stage: a line per run, with the time that is left at the present pace."""

    def __init__(self, rounds_left: int) -> None:
        self.left, self.done, self.start_time = rounds_left, 0, time.monotonic()

    def start(self, total_rounds: int, description: str, done: int = 0) -> None:
        """Begin a run."""

    def note(self, text: str) -> None:
        """Notes are left out: there are hundreds of runs."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Count a round."""
        self.done, self.left = self.done + 1, max(self.left - 1, 0)

    def finish(self) -> None:
        """End a run's rounds."""

    def say(self, text: str) -> None:
        """Print a line with the time that has passed and the time left."""
        passed = time.monotonic() - self.start_time
        left = f"about {passed / self.done * self.left / 60:.0f} min left" if self.done else "no estimate yet"
        print(f"[{passed / 60:5.1f} min, {left}] {text}", flush=True)


@dataclass(frozen=True)
class Bench:
    """The stages that train; one loaded model serves them all."""

    study: Study

    @cached_property
    def model(self) -> Any:
        """The base with image features and compiled programs."""
        from fedvlm_jax.training.loaded_model import load_model

        study = self.study
        return load_model(study.base(next(iter(study.cells)), study.seed, study.out, test=False), print)

    def tune(self) -> None:
        """Try the grid; append every point to tuning.jsonl."""
        from fedvlm_jax.training.compare import finish_run

        study, log = self.study, self.study.out / "tuning.jsonl"
        todo = list(missing_points(study))
        later = len(study.cells) * study.seeds * self._rounds_of(METHODS, shared=True)
        tuning = sum(self._rounds_of((method,), shared=True) for *_, method in todo)
        clock = Clock(tuning + (later if study.stage == "all" else 0))
        clock.say(f"tuning: {len(todo)} points to try")
        for cell, seed, pair, method in todo:
            home = study.out / "tuning" / f"{cell}-seed{seed}-a{pair[0]:g}-b{pair[1]:g}"
            base = study.base(cell, seed, home / method, test=False)
            train = study.rates(base.train, method, pair)
            run = dataclasses.replace(base, method=method.removesuffix("+ft"), train=train)
            start = home / method.removesuffix("+ft")
            began = time.monotonic()
            usable = method.endswith("+ft") and (start / "results.json").is_file()
            record = finish_run(run, clock, self.model, start if usable else None)
            scores = record.scores("personal", split="validation")
            point = {
                "cell": cell, "seed": seed, "method": method, "learning_rate_a": pair[0], "learning_rate_b": pair[1],
                "score": sum(scores.values()) / len(scores), "selected_round": record.results["selected_round"],
                "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
            if method == METHODS[-1]:  # the last at this point: nothing will continue from its runs
                drop_checkpoints(home)
            clock.say(f"{cell} {method} a={pair[0]:g} b={pair[1]:g}: validation {point['score']:.1%}")

    def run(self) -> None:
        """Compare the methods in every cell, with the rates chosen for each."""
        from fedvlm_jax.training.compare import compare

        study, chosen = self.study, choose(self.study)
        left = {cell: pairs for cell, pairs in chosen.items() if not self._is_done(cell)}
        clock = Clock(sum(self._rounds_left(cell, pairs) for cell, pairs in left.items()))
        for cell, pairs in left.items():
            clock.say(f"{cell}: {study.seeds} seeds, rates {pairs}")
            base = study.base(cell, study.seed, study.out / cell, test=True)
            settings = {method: study.rates(base.train, method, pair) for method, pair in pairs.items()}
            settings = {name: dataclasses.replace(train, finetune_steps=0) for name, train in settings.items()}
            comparison = Compare(METHODS, study.seeds, study.finetune_steps, base)
            compare(comparison, _Announcing(clock), self.model, settings)
            drop_checkpoints(study.out / cell)
            clock.say(f"{cell}: done")

    def _rounds_left(self, cell: str, pairs: Mapping[str, tuple[float, float]]) -> int:
        seeds = range(self.study.seed, self.study.seed + self.study.seeds)
        runs = [
            (method, self.study.out / cell / "runs" / f"{method}-seed{seed}") for method in METHODS for seed in seeds
        ]
        todo = tuple(method for method, folder in runs if not (folder / "results.json").is_file())
        return self._rounds_of(todo, shared=pairs["fedavg-lora"] == pairs["fedavg-lora+ft"])

    def _is_done(self, cell: str) -> bool:
        return (self.study.out / cell / "comparison.json").is_file()

    def _rounds_of(self, methods: tuple[str, ...], *, shared: bool) -> int:
        """Rounds to train; fine-tuning continues a run of the same rates where there is one."""
        study = self.study
        ft = study.extra_rounds + (0 if shared else study.rounds)
        return sum(ft if method.endswith("+ft") else study.rounds for method in methods)


class _Announcing:
    """A clock that says when each run inside a comparison begins."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def start(self, total_rounds: int, description: str, done: int = 0) -> None:
        """Say it."""
        self.clock.say(f"  {description}: {total_rounds - done} rounds")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.clock, name)


def drop_checkpoints(folder: Path) -> None:
    """Free the disk: finished runs keep their options, metrics, results and adapters."""
    for path in sorted(folder.rglob("checkpoints")):
        shutil.rmtree(path)


def missing_points(study: Study) -> Iterator[tuple[str, int, tuple[float, float], str]]:
    """List the points of the grid that are not in tuning.jsonl; a method's fine-tuned form comes after it."""
    names = ("cell", "seed", "learning_rate_a", "learning_rate_b", "method")
    there = {tuple(line[name] for name in names) for line in summary.read_lines(study.out / "tuning.jsonl")}
    for cell in dict.fromkeys(map(study.tuned_in, study.cells)):
        for seed in study.tune_seeds:
            for pair in study.grid:
                for method in METHODS:
                    if (cell, seed, *pair, method) not in there:
                        yield cell, seed, pair, method


def choose(study: Study) -> dict[str, dict[str, tuple[float, float]]]:
    """Cell -> method -> the rates that did best on validation."""
    if next(missing_points(study), None):
        raise SystemExit("the tuning is not finished: run the stage tune first")
    lines = summary.read_lines(study.out / "tuning.jsonl")
    lines = [line for line in lines if line["seed"] in study.tune_seeds]
    return {
        cell: summary.choose_rates([line for line in lines if line["cell"] == study.tuned_in(cell)], study.grid)
        for cell in study.cells
    }


def report(study: Study, words: list[str]) -> None:
    """Write the study's JSON, table and picture."""
    records = {cell: read_comparison(study.out / cell) for cell in study.cells}
    stored = json.loads((next(iter(records.values())).folder / "comparison.json").read_text(encoding="utf-8"))
    content = {
        "command": shlex.join(["python", "experiments/study_emoji.py", *words]),
        "versions": stored["versions"],
        "commit": stored["commit"],
        "options": {
            field.name: getattr(study, field.name)
            for field in dataclasses.fields(study)
            if field.name not in ("stage", "out", "results", "quick")
        },
        "grid": study.grid,
        "rates": choose(study),
        "cells": summary.summarise_study(records),
        "tuning": summary.read_lines(study.out / "tuning.jsonl"),
    }
    folder = study.results or (study.out / "results" if study.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "emoji_study.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tables = [to_markdown(summary.tabulate(name, cell)) for name, cell in content["cells"].items()]
    text = "\n\n".join([*tables, summary.write_note(content)]) + "\n"
    (folder / "emoji_study.md").write_text(text, encoding="utf-8")
    save_png(summary.draw_study(content["cells"]), folder / "emoji_study.png")
    print(text)


def main() -> None:
    """Run the stages that were asked for."""
    study = tyro.cli(Study, description=__doc__)
    if study.quick:
        study = dataclasses.replace(study, **QUICK)
    study.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(study)
    if study.stage in ("all", "tune"):
        bench.tune()
    if study.stage in ("all", "run"):
        bench.run()
    if study.stage in ("all", "report"):
        report(study, without_places(sys.argv[1:]))


def without_places(words: list[str]) -> list[str]:
    """Leave the stage and the folders out of a command: they change no number, and folders are this machine's."""
    kept, skip = [], False
    for word in words:
        if skip or word in ("all", "tune", "run", "report"):
            skip = False
        elif word in ("--out", "--results"):
            skip = True
        elif not word.startswith(("--out=", "--results=")):
            kept.append(word)
    return kept


if __name__ == "__main__":
    main()
