"""Our round against Flower's simulation of the same round, whose clients train with PyTorch + PEFT.

    python -m venv ~/flower && ~/flower/bin/pip install torch==2.13.0 peft 'flwr[simulation]==1.42.*' transformers
    python benchmarks/flower_simulation.py --peer-python ~/flower/bin/python
    python benchmarks/flower_simulation.py --peer-python ~/flower/bin/python --models smolvlm-nano --rounds 7

The first eight clients of the emoji set, two local steps of four examples, float32, AdamW and the same initial factors;
the frozen tower's features are kept by all. Four take turns, a round each: this package's compiled round; Flower's
FedAvg over Ray (`benchmarks/flower_peft.py`), a process per processor with one client at a time and one thread in each,
where a process keeps the model; the same where every client loads it, as Flower's examples do; and the loop that
Flower's clients are made of, in one process with one thread (`benchmarks/pytorch_peft.py`), which says how much of the
difference is Flower's and Ray's. A first round of each, in which models are loaded and programs compiled, is not
counted; the adapters after it are compared.

Of each round the seconds are taken and the processor seconds of the whole process tree, by the kernel's count (Linux).
On a machine that has other work to do the latter, and ratios of neighbouring rounds, are the fairer figures. Writes
results/flower_simulation.json and its table.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from harness.cells import compare_factors
from harness.command import name_command
from harness.machine import describe_machine
from harness.ours import Ours
from harness.peer import NEEDS, Choice, Peer
from harness.process_tree import count_tree_seconds
from harness.shipped import CLIENTS, open_shipped
from harness.timing import describe_times, interleave, ratio
from harness.world import Shape, take_clients

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import resolve_folder
from fedvlm_jax.utils.files import write_json

RESULTS = Path(__file__).parent / "results"
FLOWER = Path(__file__).parent / "flower_peft.py"
CHOICE: Choice = (1, "float32")
"""Threads of a client of theirs, and its arithmetic."""

Round = dict[str, float]
"""`wall` and `cpu` seconds, and of Flower `clients_cpu`, those inside of its clients' functions."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    peer_python: str
    """A Python that has torch, transformers, peft and flwr[simulation]."""
    models: tuple[str, ...] = ("florence2-nano", "smolvlm-nano")
    """Which, of those that ship."""
    rounds: int = 5
    """Of each side, after the first."""
    clients: int = 8
    """Of the 16 that ship."""
    steps: int = 2
    """Local steps of a client."""
    batch: int = 4
    """Examples of a step."""
    out: Path = RESULTS / "flower_simulation.json"
    """Results; models measured before stay in it. The table is written next to it."""


def main() -> None:
    """Measure, write and print."""
    options = tyro.cli(Options, description=__doc__)
    if not 1 <= options.clients <= CLIENTS or min(options.rounds, options.steps, options.batch) < 1:
        sys.exit(f"expected 1 to {CLIENTS} clients, and one or more of rounds, steps and examples")
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for model in options.models:
        print(f"{model}, load {os.getloadavg()[0]:.1f}", flush=True)
        try:
            found[model] = measure(model, options)
        except UserError as error:
            sys.exit(str(error))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, found)
        text = "\n".join(tabulate(found)) + "\n"
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text, flush=True)


def measure(model: str, options: Options) -> dict[str, Any]:
    """Measure rounds of a model that ships; returns what goes into JSON."""
    shipped = open_shipped(Shape(CLIENTS, options.steps, options.batch), name=model)
    world, folder = take_clients(shipped.world, options.clients), resolve_folder(model)
    ours = Ours(shipped.vlm, shipped.params, world, "cached", options.clients)
    ours()
    with (
        Peer(options.peer_python, folder, world, FLOWER, f"{NEEDS}, and flwr[simulation]") as flower,
        Peer(options.peer_python, folder, world) as loop,
    ):
        load = os.getloadavg()[0]
        asked: dict[str, tuple[Peer, dict[str, bool]]] = {
            "flower": (flower, {}),
            "flower_reload": (flower, {"reload": True}),
            "loop": (loop, {}),
        }
        apart = {
            name: compare_factors(world.start, ours.give_factors(), peer.give_factors(CHOICE, "cached", **more))
            for name, (peer, more) in asked.items()
        }
        peers = {name: partial(run_peer, peer, **more) for name, (peer, more) in asked.items()}
        found = interleave({"ours": partial(run_ours, ours), **peers}, options.rounds)
    # Side -> kind of seconds -> each round's.
    taken = {name: {kind: [line[kind] for line in lines] for kind in lines[0]} for name, lines in found.items()}
    return {
        "command": name_command().replace(options.peer_python, "PYTHON"),
        "clients": options.clients,
        "steps": options.steps,
        "batch": options.batch,
        "rounds": options.rounds,
        "seconds": {
            name: {kind: describe_times(seconds) for kind, seconds in kinds.items()} for name, kinds in taken.items()
        },
        **{
            f"times_{name}": {kind: describe_ratio(taken[name][kind], taken["ours"][kind]) for kind in ("cpu", "wall")}
            for name in asked
        },
        "adapters": apart,
        "load": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        **describe_machine(),
    }


def run_ours(ours: Ours) -> Round:
    """A round of ours, in this process."""
    before = time.process_time()
    wall = ours()
    return {"wall": wall, "cpu": time.process_time() - before}


def run_peer(peer: Peer, **more: Any) -> Round:
    """A round of a peer's processes."""
    before = count_tree_seconds(peer.pid)
    answer = peer.describe_round(CHOICE, "cached", **more)
    cpu = count_tree_seconds(peer.pid) - before
    return {"wall": answer.pop("seconds"), "cpu": cpu, **answer}


def describe_ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """The median of the ratios of neighbouring rounds, the least and the most."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": round(ratio(above, below), 2), "least": round(min(pairs), 2), "most": round(max(pairs), 2)}


def tabulate(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: a row per model and side."""
    rows = ["| model | round | CPU s | wall s | CPU, times | wall, times | apart |", "| --- | --- |" + " ---: |" * 5]
    names = {
        "ours": "ours",
        "flower": "Flower, model kept",
        "flower_reload": "Flower, model loaded by every client",
        "loop": "the clients' loop alone",
    }
    for model, line in found.items():
        for side, name in names.items():
            kinds, times = line["seconds"][side], line.get(f"times_{side}")
            cells = [
                show_range(min(kinds[k]["all"]), kinds[k]["median"], max(kinds[k]["all"])) for k in ("cpu", "wall")
            ]
            if times is None:
                cells += ["", "", ""]
            else:
                cells += [show_range(times[k]["least"], times[k]["median"], times[k]["most"]) for k in ("cpu", "wall")]
                cells.append(f"{line['adapters'][side]['error_of_movement']:.0e}")
            rows.append("| " + " | ".join((model, name, *cells)) + " |")
    return rows


def show_range(least: float, median: float, most: float) -> str:
    """`5.7 (5.0 to 6.7)`."""
    digits = 1 if median >= 2 else 2
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


if __name__ == "__main__":
    main()
