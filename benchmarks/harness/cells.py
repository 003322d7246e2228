"""One comparison from start to end: this package's round and a PyTorch + PEFT loop in the same world, a line of JSON.

A cell names a model, a batch size and what each side does about vision. Finished cells are kept in a file, a line each,
so that a measurement that was cut short goes on where it was.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedvlm_jax.models import Vlm
from harness.machine import MatmulPeak, describe_machine, has_bfloat16_units
from harness.ours import Ours, Vision, choose_examples, count_round_flops
from harness.peer import Peer
from harness.timing import describe_times, interleave, ratio
from harness.world import World

USES: Mapping[str, tuple[Vision, Vision]] = {
    "both": ("cached", "cached"),
    "neither": ("computed", "computed"),
    "users": ("cached", "computed"),
}
"""Who keeps the frozen tower's features: name -> (ours, theirs); `users`: as each side's users really run it."""


@dataclass(frozen=True)
class Cell:
    """What is compared with what."""

    model: str
    batch: int
    cached: str

    @property
    def name(self) -> str:
        """`nano-2-both`."""
        return f"{self.model}-{self.batch}-{self.cached}"

    @classmethod
    def parse(cls, name: str) -> "Cell":
        """The cell of a name."""
        model, batch, cached = name.split("-")
        return cls(model, int(batch), cached)


def compare_factors(
    start: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """How far the factors moved in a round, and how far apart they ended: norms over all, and the second per first.

    And how many entries hold 99% of the squared distance, out of how many: where those are few, it is not that all
    are a little off.

    Raises:
        ValueError: they are not the same factors.
    """
    if not start.keys() == ours.keys() == theirs.keys():
        raise ValueError(f"unlike factors: {sorted(set(start) ^ set(ours) | set(start) ^ set(theirs))[:4]}")
    moved, apart = (
        np.concatenate([np.square(np.asarray(one[path], np.float64) - other[path]).ravel() for path in start])
        for one, other in ((theirs, start), (ours, theirs))
    )
    movement, error = math.sqrt(moved.sum()), math.sqrt(apart.sum())
    largest = np.cumsum(np.sort(apart)[::-1])
    return {
        "movement": movement,
        "error": error,
        "error_of_movement": error / movement if movement else math.inf,
        "entries": apart.size,
        "entries_of_error": int(np.searchsorted(largest, 0.99 * largest[-1])) + 1 if error else 0,
    }


def measure_cell(
    cell: Cell, vlm: Vlm, params: Any, world: World, folder: Path, *, wave: int, peer_python: str, repeats: int,
    compute: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """Measure a cell: interleaved runs of the matmul peak, ours, theirs in float32, and theirs in bfloat16.

    The last only where the processor has units for it: elsewhere it is emulated, and many times slower.

    Args:
        cell: which.
        vlm, params, folder: the model, loaded and as the peer reads it.
        world: the round's work; its batch is the cell's.
        wave: clients that we train side by side.
        peer_python: an interpreter with torch, transformers and peft.
        repeats: interleaved runs.
        compute: what our model computes in, and the matmul peak is measured in.
    """
    mine, its = USES[cell.cached]
    peak, ours = MatmulPeak(dtype=compute), Ours(vlm, params, world, mine, wave)
    ours()  # warm
    with Peer(peer_python, folder, world) as peer:
        choices = {"theirs": peer.choose(its, "float32")}
        if has_bfloat16_units():
            choices["theirs_bfloat16"] = peer.choose(its, "bfloat16")
        apart = compare_factors(world.start, ours.give_factors(), peer.give_factors(choices["theirs"], its))
        inside: list[float] = []

        def run_ours() -> float:
            seconds = ours()
            inside.append(ours.inside)
            return seconds

        theirs = {name: peer.runner(choice, its) for name, choice in choices.items()}
        found = interleave({"peak": peak, "ours": run_ours, **theirs}, repeats)
    flops = count_round_flops(vlm, world.shape, world.settings, _one_batch(world, mine))
    seconds = statistics.median(found["ours"])
    return {
        "cell": cell.name,
        **asdict(cell),
        "compute": compute,
        "vision": {"ours": mine, "theirs": its},
        "clients": world.shape.clients,
        "steps": world.shape.steps,
        "wave": wave,
        "tokens": int(world.examples["input_ids"].shape[-1]),
        "labels": int(world.examples["labels"].shape[-1]),
        "peer": {name: {"threads": threads, "form": form} for name, (threads, form) in choices.items()},
        "seconds": {name: describe_times(found[name]) for name in ("ours", *choices)},
        **{f"times_{name}": round(ratio(found[name], found["ours"]), 3) for name in choices},
        "adapters": apart,
        "gflop": round(flops / 1e9, 3),
        "matmul_peak_gflops": round(statistics.median(found["peak"]) / 1e9, 1),
        "share_of_peak": round(
            statistics.median(flops / s / p for s, p in zip(found["ours"], found["peak"], strict=True)), 4
        ),
        "host_share": round(1 - statistics.median(a / b for a, b in zip(inside, found["ours"], strict=True)), 4),
        "examples_per_second": round(world.shape.examples / seconds, 3),
        "compile_seconds": round(ours.compile_seconds, 1),
        **describe_machine(),
    }


def measure_rounding(
    cell: Cell, vlm: Vlm, params: Any, world: World, folder: Path, *, wave: int, peer_python: str
) -> dict[str, dict[str, float]]:
    """How far each side's own rounding takes it from a round of the peer in float64, beside how far apart they are.

    Adam's first steps are as long for a gradient that is almost zero as for any other, so the rounding of those shows.

    Args:
        cell, vlm, params, world, folder, wave, peer_python: as of `measure_cell`.

    Returns:
        `apart`, `ours_off`, `theirs_off`: what `compare_factors` tells of each two.
    """
    mine, its = USES[cell.cached]
    ours = Ours(vlm, params, world, mine, wave)
    ours()
    with Peer(peer_python, folder, world) as peer:
        theirs, exact = peer.give_factors((2, "float32"), its), peer.give_factors((2, "float64"), its)
    own = ours.give_factors()
    pairs = {"apart": (own, theirs), "ours_off": (own, exact), "theirs_off": (theirs, exact)}
    return {name: compare_factors(world.start, *pair) for name, pair in pairs.items()}


def read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by name, the last of each; a line that was cut short does not count."""
    return {line["cell"]: line for line in _parse(file)} if file.exists() else {}


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """Keep a finished cell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line) + "\n"
    with file.open("a+", encoding="utf-8") as out:
        out.seek(0)
        kept = out.read()
        out.write(text if kept.endswith("\n") or not kept else "\n" + text)


def _parse(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _one_batch(world: World, vision: Vision) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((world.shape.batch, *rows.shape[2:]), rows.dtype)
        for name, rows in choose_examples(world.examples, vision).items()
    }
