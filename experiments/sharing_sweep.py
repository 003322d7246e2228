"""When does sharing beat training alone? Examples per client, number of clients and conflict of their answers.

    python experiments/sharing_sweep.py run                       # everything; goes on where it was stopped
    python experiments/sharing_sweep.py run --cells 10-16-full    # one cell
    python experiments/sharing_sweep.py run --model smolvlm-nano  # on the other shipped base
    python experiments/sharing_sweep.py search                    # for what beats local and plora with few images
    python experiments/sharing_sweep.py report                    # tables and pictures of what there is
    python experiments/sharing_sweep.py run --quick --out smoke   # a smoke run

A *cell* is named images-clients-conflict. Clients have pictures of two styles, each its own mix of topics, and all are
asked the same questions in English. They answer in one language (conflict `none`), in one of two (`half`: half of the
other clients call another answer right) or in one of four (`full`: three quarters do). Images and conflict are crossed
at 16 clients; 8 and 64 clients have 10 images.

In every cell every method takes the same local steps, validates every fourth round and keeps its best one. Rates of A
and B are chosen on validation from the same grid, with a seed that is not used again, for each conflict at 10 images
and 16 clients. Then come five seeds, and test is scored once.

The search looks for a way to share that beats local and plora at 5 and at 10 images of full conflict. It chooses rates
on validation with one seed and orders the candidates by two; the best two of each cell meet local and plora on five
fresh seeds.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import methods_emoji
import sharing_summary
import tyro
from methods_emoji import PATTERNS, RESULTS, SEARCH_SEEDS, Bench, Cell, Rates
from sharing_summary import USUAL_CLIENTS, USUAL_IMAGES

from fedvlm_jax.config.run_options import EvaluationOptions, Run
from fedvlm_jax.data.sources import emoji

METHODS = (
    "local", "plora", "fedavg-lora+ft", "fedsa-lora", "ditto", "apfl", "fedlease", "hilora", "fedavg-lora", "feddat",
)  # fmt: skip
"""Those that the sweep compares; averaging both factors is there as the start of its fine-tuned form."""
LANGUAGES: Mapping[str, tuple[str, ...]] = {"none": ("en",), "half": ("en", "de"), "full": ("en", "de", "fr", "es")}
"""Conflict -> the languages of the clients' answers."""
STYLES = ("noto", "fluent")
IMAGES, CLIENTS = (10, 5, 20, 60), (8, 64)
"""Images are varied at the usual number of clients, clients at the usual number of images."""
SEARCHED = ("5-16-full", "10-16-full")
CANDIDATES = (
    *PATTERNS, "fedavg-lora+ft", "fedsa-lora", "iat", "iat-inverted", "ditto", "apfl", "feddpa-t", "feddpa-f",
    "fedalt", "fedmosaic", "feddat", "fedlease", "hilora", "fedtreelora",
)  # fmt: skip
"""What the search tries beside local and plora: sharing patterns by name, and methods."""


@dataclass(frozen=True)
class Sweep(methods_emoji.Study):
    """The sweep's options; the defaults are those of the docs"""

    stage: tyro.conf.Positional[Literal["run", "search", "report"]]
    out: Path = Path("runs/sharing-sweep")
    """Folder of what is measured: in a folder of the base's name, one line per finished run."""
    results: Path | None = None
    """Where the report goes (default: experiments/results; with --quick, into --out)."""
    validate_every: int = 4
    """Validate every so many rounds; the best of them is scored."""
    data: tyro.conf.Suppress[emoji.Options] = field(
        default_factory=lambda: emoji.Options(
            prompt="neutral", vendors=STYLES, validation_per_client=15, test_per_client=40
        )
    )

    @property
    def report_folder(self) -> Path:
        """Where the report goes; one report has all bases."""
        return self.results or (self.out / "results" if self.quick else RESULTS)

    def plan(self) -> dict[str, Cell]:
        """The cells by name, in the order in which they are run: those that choose rates first, many clients last."""
        crossed = [(images, USUAL_CLIENTS, conflict) for images in IMAGES for conflict in LANGUAGES]
        scaled = [(USUAL_IMAGES, clients, conflict) for clients in CLIENTS for conflict in LANGUAGES]
        cells = {}
        for images, clients, conflict in (*crossed, *scaled):
            data = self.data.replace(
                languages=LANGUAGES[conflict], images_per_client=images, partition=emoji.Topics(clients=clients)
            )
            cells[f"{images}-{clients}-{conflict}"] = Cell(data, METHODS, f"{USUAL_IMAGES}-{USUAL_CLIENTS}-{conflict}")
        return cells

    def make_run(self, stage: str, cell: Cell, method: str, seed: int, rates: Rates) -> Run:
        """One run, validated as the sweep says; the best of its validated rounds is scored."""
        run = super().make_run(stage, cell, method, seed, rates)
        evaluation: EvaluationOptions = dataclasses.replace(run.evaluation, every=self.validate_every)
        return dataclasses.replace(run, evaluation=evaluation, checkpoint_every=self.validate_every)


def search(bench: Bench) -> None:
    """Try the candidates on validation; confirm the best two of each cell on fresh seeds, with local and plora."""
    sweep = bench.study
    candidates = ("B of attention", "apfl") if sweep.quick else CANDIDATES
    for cell in sweep.cells or SEARCHED:
        rates: dict[str, Rates] = {}
        tried: dict[str, float] = {}
        for method in (*candidates, "local", "plora"):
            first, *others = SEARCH_SEEDS
            points = {point: _validate(bench, cell, method, first, point) for point in sweep.grid}
            best = rates[method] = max(points, key=lambda point: points[point])
            scores = [points[best], *(_validate(bench, cell, method, seed, best) for seed in others)]
            tried[method] = sum(scores) / len(scores)
            bench.forget()
        chosen = sorted(candidates, key=lambda name: -tried[name])[:2]
        bench.confirm(cell, {method: rates[method] for method in (*chosen, "local", "plora")})


def _validate(bench: Bench, cell: str, method: str, seed: int, rates: Rates) -> float:
    return bench.score("search", cell, method, seed, rates)["validation"]


QUICK: dict[str, Any] = {
    "grid": methods_emoji.GRID[1:], "seeds": 2, "rounds": 4, "local_steps": 1, "batch_size": 2, "validate_every": 2,
    "data": emoji.Options(prompt="neutral", vendors=STYLES[:1], validation_per_client=2, test_per_client=3),
    "cells": ("5-16-half",),
}  # fmt: skip


def main() -> None:
    """Run the stage that was asked for."""
    sweep = tyro.cli(Sweep, description=__doc__)
    if sweep.quick:
        sweep = dataclasses.replace(sweep, **QUICK)
    methods_emoji.start(sweep)
    if sweep.stage == "report":
        sharing_summary.write(sweep.out, sweep.report_folder, list(sweep.plan()), METHODS)
        return
    with methods_emoji.open_bench(sweep) as bench:
        search(bench) if sweep.stage == "search" else bench.run()


if __name__ == "__main__":
    main()
