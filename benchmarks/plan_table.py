"""Table of pods: `fedvlm plan` of one round on each, devices and clients growing together.

    python benchmarks/plan_table.py                       # all cells that are not there yet, then the table
    python benchmarks/plan_table.py --only v5e:2x2        # those of one topology
    python benchmarks/plan_table.py --table               # the table of the cells that are there

Needs the extra `plan` (libtpu) and no TPU. Every cell is one `fedvlm plan` with eight clients a chip: pLoRA of rank 8
on the language model, four steps of two examples, features of 768x768 pictures (577 tokens, and 24 of text), answers of
64 tokens, bfloat16 arithmetic, layers recomputed. A compilation takes two to three minutes of one core (more for v6e),
whatever the number of chips. A cell that is done is a line of `results/plan_table.jsonl`, so this can be killed and
started again; `results/plan_table.json` holds them all, with versions and commit. A round takes the time of its
arithmetic at the chip's peak at least: a bound that no chip has confirmed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from fedvlm_jax.analysis.tpu_topologies import parse_topology
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.utils.files import write_json

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "plan_table.jsonl"
MODELS = ("florence2-base", "florence2-large")
TOPOLOGIES = (
    *("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:4x4x4"),
    *("v6e:2x2", "v6e:4x4", "v6e:16x16"),
)
CLIENTS_PER_CHIP = 8
OPTIONS = (
    *("--train.local-steps", "4", "--train.batch-size", "2", "--sizes.answer-tokens", "64"),
    *("--system.compute", "bfloat16", "--system.remat"),
)
GIB = 2**30


def main() -> None:
    """Do what is missing, then write all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="topologies or models that contain this")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    chosen = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu is there, a TPU is not
    RESULTS.mkdir(exist_ok=True)
    for topology, model in itertools.product(TOPOLOGIES, MODELS):
        name = f"{topology}/{model}"
        if not chosen.table and chosen.only in name and name not in read_cells():
            print(f"{name} ...", file=sys.stderr, flush=True)
            cell = make_cell(topology, model)
            with LINES.open("a") as file:
                file.write(json.dumps({"cell": name, **cell}) + "\n")
    cells = read_cells()
    if not chosen.table:
        write_json(RESULTS / "plan_table.json", {"options": OPTIONS, "cells": cells, **describe_environment()})
    print("\n".join(tabulate(cells)))


def read_cells() -> dict[str, dict[str, Any]]:
    """The cells that are done, by name; a line that a kill cut short is none."""
    cells: dict[str, dict[str, Any]] = {}
    for line in LINES.read_text().splitlines() if LINES.exists() else ():
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        cells[cell["cell"]] = cell
    return cells


def make_cell(topology: str, model: str) -> dict[str, Any]:
    """One plan, in a process of its own; what did not fit is a cell too."""
    clients = str(CLIENTS_PER_CHIP * (parse_topology(topology).devices or 1))
    words = ["--topology", topology, "--model", model, "--clients", clients, *OPTIONS]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedvlm_jax", "plan", *words, "--out", folder]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        file = Path(folder) / "plan.json"
        if not file.exists():
            if done.returncode != 2:  # not an answer but an accident
                raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
            return {"refused": done.stderr.splitlines()[-1]}
        plan = json.loads(file.read_text())
    kept = ("mesh", "layout", "clients", "memory", "room", "flops", "seconds", "collectives", "versions", "commit")
    return {"command": " ".join(["fedvlm plan", *words]), **{name: plan[name] for name in kept}}


def tabulate(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown: every cell, those too that are missing or that no wave fits."""
    lines = [
        "| pod | model | clients a round | side by side on a chip | HBM needed of a chip's | TFLOP a chip "
        "| collectives a chip | round at least |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for topology, model in itertools.product(TOPOLOGIES, MODELS):
        cell = cells.get(f"{topology}/{model}")
        if cell is None or "refused" in cell:
            lines.append(f"| {topology} | {model} | {cell['refused'] if cell else 'not compiled'} |" + " |" * 5)
            continue
        sent = sum(one["bytes_per_round"] for one in cell["collectives"])
        lines.append(
            f"| {topology} | {model} | {cell['layout']['cohort']} | {cell['clients']} "
            f"| {cell['memory']['needed'] / GIB:.1f} of {cell['room'] / GIB:.0f} GiB "
            f"| {cell['flops'] / 1e12:.1f} | {sent / 2**20:.1f} MiB | {1e3 * cell['seconds']:.0f} ms |"
        )
    return lines


if __name__ == "__main__":
    main()
