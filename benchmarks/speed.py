"""Our round against a sequential PyTorch + PEFT client loop, cell by cell.

    python benchmarks/speed.py run --peer-python ~/torch/bin/python                    # all cells; goes on where it was
    python benchmarks/speed.py run --peer-python ~/torch/bin/python --cells nano-1-both base-2-users
    python benchmarks/speed.py memory                                                  # what one more client takes
    python benchmarks/speed.py rounding --peer-python ~/torch/bin/python               # each side's, against float64
    python benchmarks/speed.py stacks                                                  # layers written out, or scanned
    python benchmarks/speed.py products                                                # gradients of ours, or jax's
    python benchmarks/speed.py bounds                                                  # what a round's time goes to
    python benchmarks/speed.py report                                                  # results/speed.json, speed.md
    JAX_DEFAULT_MATMUL_PRECISION=highest python benchmarks/speed.py run --peer-python python3 --into gpu.jsonl

The same model, data, float32 arithmetic, LoRA sites, rank, initial factors, batches and AdamW on both sides, runs
interleaved in one process group; adapters are compared after the round. PyTorch is measured in bfloat16 as well where
the processor has units for it. `nano` is the model that ships, on its own data; `base` has Florence-2-base's shape
(pictures of 768x768, 577 image tokens and 32 more) and random weights, `smolvlm` SmolVLM-256M's (512x512, 64 and 32). A
finished cell is a line of results/speed.jsonl, and is not measured again. On a GPU both sides compute there, rounds of
base shape have more clients, and XLA makes float32 products from TF32 unless it is asked for more, as in the last line.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from harness.bases import BASES
from harness.cells import USES, Cell, append_line, measure_cell, measure_rounding, read_lines
from harness.kinds import KINDS, measure_kinds
from harness.machine import describe_machine
from harness.memory import measure_clients
from harness.ours import Ours
from harness.shipped import open_shipped
from harness.timing import describe_times, interleave, ratio
from harness.world import Shape, World, draw_world

from fedvlm_jax.models import Stacking, Vlm, load_vlm, read_vlm, resolve_folder
from fedvlm_jax.utils.files import write_json

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 2, 8)
SHAPES = {
    "nano": {batch: (Shape(16, 4, batch), 16) for batch in BATCHES},
    **{name: base.rounds for name, base in BASES.items()},
}
"""model -> batch -> a round's shape, and clients side by side."""

CELLS = [Cell(model, batch, cached).name for model, rounds in SHAPES.items() for batch in rounds for cached in USES]


@dataclass(frozen=True)
class Run:
    """Measure cells that are not measured yet."""

    peer_python: str
    """A Python that has torch, transformers and peft."""
    cells: tuple[str, ...] = tuple(CELLS)
    """Which."""
    repeats: int = 5
    """Interleaved runs of a cell."""
    work: Path = Path(tempfile.gettempdir()) / "fedvlm-speed"
    """Where the checkpoint of base shape is made, and kept."""
    again: bool = False
    """Measure them again; the last line of a cell counts."""
    into: Path = RESULTS / "speed.jsonl"
    """A line per finished cell."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """What our model computes in, as `--system.compute` says it."""


@dataclass(frozen=True)
class Memory:
    """Ask the compiler what one more client takes of a device, against a round of one client without its base."""

    models: tuple[str, ...] = ("nano", "base")
    """Which."""
    work: Path = Path(tempfile.gettempdir()) / "fedvlm-speed"
    """As above."""


@dataclass(frozen=True)
class Rounding:
    """Tell how far each side's rounding takes its adapters from a round in float64; times nothing."""

    peer_python: str
    """A Python that has torch, transformers and peft."""
    cells: tuple[str, ...] = (*(Cell("nano", batch, "both").name for batch in BATCHES), "base-1-both")
    """Which."""
    work: Path = Path(tempfile.gettempdir()) / "fedvlm-speed"
    """As above."""


@dataclass(frozen=True)
class Stacks:
    """Measure a round of base shape, one client and one picture, with its layers written out and scanned."""

    repeats: int = 5
    """Interleaved runs."""
    work: Path = Path(tempfile.gettempdir()) / "fedvlm-speed"
    """As above."""


@dataclass(frozen=True)
class Products:
    """Measure rounds with the gradients of `fedvlm_jax.utils.products`, and with those that jax derives."""

    cells: tuple[str, ...] = ("nano-1-both", "nano-8-both", "base-1-both")
    """Which."""
    repeats: int = 7
    """Interleaved runs."""
    work: Path = Path(tempfile.gettempdir()) / "fedvlm-speed"
    """As above."""


@dataclass(frozen=True)
class Bounds:
    """Trace a round of ours, and tell which kinds of operations its time went to."""

    cells: tuple[str, ...] = ("nano-1-both", "nano-2-both", "nano-8-both", "base-1-both")
    """Which."""
    work: Path = Path(tempfile.gettempdir()) / "fedvlm-speed"
    """As above."""


@dataclass(frozen=True)
class Report:
    """Write all lines as one JSON, and as a table, next to where they are."""

    source: Path = RESULTS / "speed.jsonl"
    """Where the lines are; those of another machine belong in another file."""


def main() -> None:
    """Do what was asked."""
    asked = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Memory, tyro.conf.subcommand("memory")]
        | Annotated[Rounding, tyro.conf.subcommand("rounding")]
        | Annotated[Stacks, tyro.conf.subcommand("stacks")]
        | Annotated[Products, tyro.conf.subcommand("products")]
        | Annotated[Bounds, tyro.conf.subcommand("bounds")]
        | Annotated[Report, tyro.conf.subcommand("report")],
        description=__doc__,
    )
    parts = {
        Run: measure, Memory: report_memory, Rounding: report_rounding, Stacks: report_stacks,
        Products: report_products, Bounds: report_bounds, Report: report,
    }  # fmt: skip
    parts[type(asked)](asked)


def measure(options: Run) -> None:
    """Measure cells, keeping each as it is finished; one model and batch are loaded at a time."""
    if unknown := sorted(set(options.cells) - set(CELLS)):
        sys.exit(f"no cell {unknown[0]}; there are {', '.join(CELLS)}")
    done = {} if options.again else read_lines(options.into)
    left = [name for name in CELLS if name in options.cells and name not in done]
    world_of: tuple[Any, Any] = (None, None)
    for place, name in enumerate(left, 1):
        cell = Cell.parse(name)
        print(f"{name} ({place} of {len(left)}), load {os.getloadavg()[0]:.1f}", flush=True)
        if world_of[0] != (cell.model, cell.batch):
            world_of = ((cell.model, cell.batch), open_world(cell, options.work))
        folder, vlm, params, world = world_of[1]
        wave = choose_shape(cell)[1]
        if options.compute != "float32":
            vlm = read_vlm(folder, compute_dtype=getattr(jnp, options.compute), stacking=choose_stacking(cell.model))
        line = measure_cell(
            cell, vlm, params, world, folder, wave=wave, peer_python=options.peer_python, repeats=options.repeats,
            compute=options.compute,
        )  # fmt: skip
        append_line(options.into, {**line, "load": round(os.getloadavg()[0], 2)})
        print(json.dumps({key: line[key] for key in ("times_theirs", "share_of_peak", "adapters")}), flush=True)


def choose_shape(cell: Cell) -> tuple[Shape, int]:
    """A cell's round, and clients side by side in it."""
    many = cell.model in BASES and jax.default_backend() != "cpu"
    return (BASES[cell.model].accelerated if many else SHAPES[cell.model])[cell.batch]


def choose_stacking(model: str) -> Stacking:
    """How a model's layers are run here."""
    written = model in BASES and jax.default_backend() == "cpu"
    return Stacking(unroll=BASES[model].unroll) if written else Stacking()


def open_world(cell: Cell, work: Path) -> tuple[Path, Vlm, Any, World]:
    """A cell's model and its work."""
    shape = choose_shape(cell)[0]
    if cell.model == "nano":
        shipped = open_shipped(shape)
        return resolve_folder("florence2-nano"), shipped.vlm, shipped.params, shipped.world
    base = BASES[cell.model]
    folder = base.open_folder(cell.model, work)
    vlm, params = load_vlm(folder, stacking=choose_stacking(cell.model))
    world = draw_world(vlm, params, shape, size=base.picture, prompt=base.prompt, answer=base.answer)
    return folder, vlm, params, world


def report_memory(options: Memory) -> None:
    """Write results/client_memory.json."""
    found = {}
    for model in options.models:
        base = BASES.get(model)
        folder = base.open_folder(model, options.work) if base else resolve_folder("florence2-nano")
        vlm, params = load_vlm(folder, stacking=Stacking(unroll=base.unroll if base else 6))
        size, prompt, answer = (base.picture, base.prompt, base.answer) if base else ((64, 64), 8, 8)
        for batch in (1, 2):
            shape = Shape(1, 2, batch)
            found[f"{model}-{batch}"] = measure_clients(vlm, params, shape, size=size, prompt=prompt, answer=answer)
            print(model, batch, json.dumps(found[f"{model}-{batch}"]), flush=True)
    write_json(RESULTS / "client_memory.json", {"bytes": found, **describe_machine()})


def report_rounding(options: Rounding) -> None:
    """Write results/rounding.json."""
    found = {}
    for name in options.cells:
        cell = Cell.parse(name)
        folder, vlm, params, world = open_world(cell, options.work)
        wave = choose_shape(cell)[1]
        found[name] = measure_rounding(cell, vlm, params, world, folder, wave=wave, peer_python=options.peer_python)
        print(name, json.dumps(found[name]), flush=True)
    write_json(RESULTS / "rounding.json", {"of_movement": found, **describe_machine()})


def report_stacks(options: Stacks) -> None:
    """Write results/stacks.json."""
    base = BASES["base"]
    folder = base.open_folder("base", options.work)
    vlm, params = load_vlm(folder)
    world = draw_world(vlm, params, Shape(1, 1, 1), size=base.picture, prompt=base.prompt, answer=base.answer)
    rounds = {
        f"unroll {stacking.unroll}": Ours(read_vlm(folder, stacking=stacking), params, world, "cached", 1)
        for stacking in (Stacking(), Stacking(unroll=base.unroll))
    }
    for run in rounds.values():
        run()  # warm
    found = interleave(rounds, options.repeats)
    scanned, written = found.values()
    result = {
        "seconds": {name: describe_times(seconds) for name, seconds in found.items()},
        "written_out_over_scanned": round(ratio(written, scanned), 3),
        "compile_seconds": {name: round(run.compile_seconds, 1) for name, run in rounds.items()},
    }
    write_json(RESULTS / "stacks.json", {**result, **describe_machine()})
    print(json.dumps(result))


def report_products(options: Products) -> None:
    """Write results/products.json."""
    plain = {
        "fedvlm_jax.models.layers.score": lambda query, key: query @ key.swapaxes(-1, -2),
        "fedvlm_jax.models.layers.mix": jnp.matmul,
        "fedvlm_jax.lora.forward_injection.project": lambda low, right, precision: jnp.matmul(
            low, right, precision=precision
        ),
    }
    found = {}
    for name in options.cells:
        cell = Cell.parse(name)
        _, vlm, params, world = open_world(cell, options.work)
        given = (vlm, params, world, USES[cell.cached][0], choose_shape(cell)[1])
        rounds = {"ours": Ours(*given)}
        jax.clear_caches()  # what was traced with our products
        with contextlib.ExitStack() as replaced:
            for place, product in plain.items():
                replaced.enter_context(mock.patch(place, product))
            rounds["derived"] = Ours(*given)
        for run in rounds.values():
            run()  # warm
        times = interleave(rounds, options.repeats)
        seconds = {which: describe_times(of) for which, of in times.items()}
        found[name] = {"seconds": seconds, "times_derived": round(ratio(times["derived"], times["ours"]), 3)}
        print(name, json.dumps(found[name]), flush=True)
    write_json(RESULTS / "products.json", {"cells": found, **describe_machine()})


def report_bounds(options: Bounds) -> None:
    """Write results/bounds.json and bounds.md."""
    found = {}
    for name in options.cells:
        cell = Cell.parse(name)
        _, vlm, params, world = open_world(cell, options.work)
        ours = Ours(vlm, params, world, USES[cell.cached][0], choose_shape(cell)[1])
        ours()  # warm
        found[name] = measure_kinds(ours, ours.compiled.as_text())
        print(name, json.dumps(found[name]), flush=True)
    write_json(RESULTS / "bounds.json", {"of_operations": found, **describe_machine()})
    head = f"| of the time of a round's operations | {' | '.join(KINDS)} |\n| --- |{' ---: |' * len(KINDS)}\n"
    rows = (f"| {name} | {' | '.join(f'{of[kind]:.0%}' for kind in KINDS)} |\n" for name, of in found.items())
    (RESULTS / "bounds.md").write_text(head + "".join(rows), encoding="utf-8")


def report(options: Report) -> None:
    """The table, and all lines as one JSON."""
    lines = read_lines(options.source)
    ordered = {name: lines[name] for name in CELLS if name in lines}
    if not ordered:
        sys.exit(f"{options.source}: no finished cell there")
    write_json(options.source.with_suffix(".json"), {"command": "python benchmarks/speed.py run", "cells": ordered})
    text = "\n".join(tabulate(ordered))
    options.source.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


def tabulate(lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: a row per cell; PyTorch's bfloat16 only where all cells have it.

    A round above the peak says that the peak beside it was disturbed: that share is not told.
    """
    bfloat16 = all("theirs_bfloat16" in line["seconds"] for line in lines.values())
    head = (
        "model", "batch", "vision kept", "ours", "PyTorch + PEFT", "times",
        *(("bfloat16", "times") if bfloat16 else ()), "of peak", "apart",
    )  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "| --- | ---: | --- |" + " ---: |" * (len(head) - 3)]
    kept = {"both": "by both", "neither": "by neither", "users": "by us"}
    for line in lines.values():
        seconds = {name: f"{found['median']:.2f} s" for name, found in line["seconds"].items()}
        figures = (
            line["model"], str(line["batch"]), kept[line["cached"]], seconds["ours"],
            seconds["theirs"], f"{line['times_theirs']:.2f}",
            *((seconds["theirs_bfloat16"], f"{line['times_theirs_bfloat16']:.2f}") if bfloat16 else ()),
            f"{line['share_of_peak']:.0%}" if line["share_of_peak"] < 1 else "?",
            f"{line['adapters']['error_of_movement']:.0e}",
        )  # fmt: skip
        rows.append("| " + " | ".join(figures) + " |")
    return rows


if __name__ == "__main__":
    main()
