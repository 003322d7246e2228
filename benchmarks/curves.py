"""What a client's local step costs as a round grows: measured curves on the model that ships, and their picture.

    python benchmarks/curves.py run [--curves clients cohort] [--repeats 5]
    python benchmarks/curves.py report

- clients: 1 to 256 of a round at fixed work each, at most 16 side by side, as `fedvlm train` lays them out on a device;
- cohort: 8 to 64, all of them side by side;
- length: tokens of the encoder, up to the 64 positions that the model has;
- rank: of the adapter.

All points of a curve run in turn with one another and with a float32 matmul that tells the machine's peak at that
moment. Data are random, image features are kept, the rest is as the round of `fedvlm train --method fedavg-lora`. A
finished curve is a line per point in results/curves.jsonl, and is not measured again; the report is results/curves.json
and results/curves.png.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from harness.cells import append_line, read_lines
from harness.machine import MatmulPeak, describe_machine
from harness.ours import Ours, choose_examples, count_round_flops
from harness.timing import describe_times, interleave
from harness.world import Shape, World, draw_world, start_factors

from fedvlm_jax.models import Vlm, load_vlm, resolve_folder
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.utils.compilation_cache import keep_programs
from fedvlm_jax.utils.files import write_json

RESULTS = Path(__file__).parent / "results"
MODEL, SIZE, ANSWER = "florence2-nano", (64, 64), 8
SIDE_BY_SIDE = 16
"""Clients of a wave, as `fedvlm train` chooses where nothing is said."""


@dataclass(frozen=True)
class Point:
    """A round: how many clients, how many of them side by side, tokens of the encoder, rank."""

    clients: int = 16
    wave: int = SIDE_BY_SIDE
    length: int = 24
    rank: int = 8

    def name(self, curve: str) -> str:
        """`rank-64`."""
        return f"{curve}-{self.place(curve)}"

    def place(self, curve: str) -> int:
        """Where on the curve."""
        return self.clients if curve in ("clients", "cohort") else int(getattr(self, curve))


CURVES: Mapping[str, tuple[str, Sequence[Point]]] = {
    "clients": (
        "clients of a round, 16 side by side",
        [Point(clients=count, wave=min(count, SIDE_BY_SIDE)) for count in (1, 4, 16, 64, 256)],
    ),
    "cohort": ("clients, all side by side", [Point(clients=count, wave=count) for count in (8, 16, 32, 64)]),
    "length": ("tokens of the encoder", [Point(length=length) for length in (24, 32, 48, 64)]),
    "rank": ("rank of the adapter", [Point(rank=rank) for rank in (1, 4, 8, 16, 32, 64)]),
}
"""name -> (what its axis says, its points)."""


@dataclass(frozen=True)
class Run:
    """Measure the curves that are not measured yet."""

    curves: tuple[str, ...] = tuple(CURVES)
    """Which."""
    steps: int = 2
    """Local steps of a client in a round."""
    batch: int = 2
    """Examples of a step."""
    repeats: int = 5
    """Interleaved runs."""
    most: int = 10**9
    """Leave out points with more clients; to try the script."""
    again: bool = False
    """Measure them again; the last line of a point counts."""
    into: Path = RESULTS / "curves.jsonl"
    """A line per finished point."""


@dataclass(frozen=True)
class Report:
    """Write the JSON and the picture from the lines."""

    source: Path = RESULTS / "curves.jsonl"
    """Where the lines are; the JSON and the picture go beside them."""


def main() -> None:
    """Do what was asked."""
    keep_programs()
    asked = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Report, tyro.conf.subcommand("report")],
        description=__doc__,
    )
    if isinstance(asked, Run):
        measure(asked)
    else:
        report(asked)


def measure(options: Run) -> None:
    """Measure curve by curve, keeping each as it is finished."""
    if unknown := sorted(set(options.curves) - set(CURVES)):
        sys.exit(f"no curve {unknown[0]}; there are {', '.join(CURVES)}")
    done = {} if options.again else read_lines(options.into)
    points = {curve: [point for point in CURVES[curve][1] if point.clients <= options.most] for curve in options.curves}
    left = [curve for curve in options.curves if any(point.name(curve) not in done for point in points[curve])]
    if not left:
        return
    vlm, params = load_vlm(resolve_folder(MODEL))
    world = draw_largest(vlm, params, options, [point for curve in left for point in points[curve]])
    peak = MatmulPeak()
    for curve in left:
        began = time.perf_counter()
        print(f"{curve}: {len(points[curve])} points, load {os.getloadavg()[0]:.1f}", flush=True)
        for line in measure_curve(curve, points[curve], vlm, params, world, peak, options.repeats):
            append_line(options.into, line)
            print(json.dumps({key: line[key] for key in ("cell", "step_ms", "share_of_peak")}), flush=True)
        print(f"{curve}: {time.perf_counter() - began:.0f} s", flush=True)


def draw_largest(vlm: Vlm, params: Any, options: Run, points: Sequence[Point]) -> World:
    """One world of which all points are parts, so that the vision tower is asked once."""
    tokens = vlm.image_tokens(*SIZE)
    shape = Shape(max(point.clients for point in points), options.steps, options.batch)
    return draw_world(
        vlm, params, shape, size=SIZE, prompt=max(point.length for point in points) - tokens, answer=ANSWER
    )


def cut_world(vlm: Vlm, world: World, point: Point) -> World:
    """The part of a world that a point asks for: its first clients, its first tokens, another rank."""
    settings = dataclasses.replace(world.settings, rank=point.rank)
    examples = {name: rows[: point.clients] for name, rows in choose_examples(world.examples, "cached").items()}
    examples |= {name: examples[name][..., : point.length] for name in ("input_ids", "attention_mask")}
    return dataclasses.replace(
        world,
        shape=dataclasses.replace(world.shape, clients=point.clients),
        examples=examples,
        indices=world.indices[: point.clients],
        weights=np.full(point.clients, 1 / point.clients, np.float32),
        start=start_factors(vlm, settings),
        settings=settings,
    )


def measure_curve(
    curve: str, points: Sequence[Point], vlm: Vlm, params: Any, world: World, peak: MatmulPeak, repeats: int
) -> list[dict[str, Any]]:
    """Compile all rounds of a curve, then run them in turn; a line of JSON each."""
    worlds = {point: cut_world(vlm, world, point) for point in points}
    rounds = {point: Ours(vlm, params, worlds[point], "cached", point.wave) for point in points}
    for one in rounds.values():
        one()  # warm
    found = interleave({"peak": peak} | {point.name(curve): rounds[point] for point in points}, repeats)
    about, lines = describe_machine(), []
    for point in points:
        seconds, shape = found[point.name(curve)], worlds[point].shape
        batch = {
            name: jax.ShapeDtypeStruct((shape.batch, *rows.shape[2:]), rows.dtype)
            for name, rows in worlds[point].examples.items()
        }
        flops = count_round_flops(vlm, shape, worlds[point].settings, batch)
        shares = [flops / second / rate for second, rate in zip(seconds, found["peak"], strict=True)]
        steps = shape.clients * shape.steps
        lines.append(
            {
                "cell": point.name(curve),
                "curve": curve,
                "at": point.place(curve),
                **dataclasses.asdict(point),
                "steps": shape.steps,
                "batch": shape.batch,
                "seconds": describe_times(seconds),
                "step_ms": round(1e3 * statistics.median(seconds) / steps, 3),
                "step_ms_range": [round(1e3 * end(seconds) / steps, 3) for end in (min, max)],
                "share_of_peak": round(statistics.median(shares), 4),
                "gflop": round(flops / 1e9, 3),
                "matmul_peak_gflops": round(statistics.median(found["peak"]) / 1e9, 1),
                "load": round(os.getloadavg()[0], 2),
                **about,
            }
        )
    return lines


def report(options: Report) -> None:
    """The lines as one JSON, and the picture."""
    lines = read_lines(options.source)
    curves = {curve: [line for line in lines.values() if line["curve"] == curve] for curve in CURVES}
    curves = {curve: sorted(found, key=lambda line: line["at"]) for curve, found in curves.items() if found}
    if not curves:
        sys.exit(f"{options.source}: no finished point there")
    write_json(options.source.with_suffix(".json"), {"command": "python benchmarks/curves.py run", "curves": curves})
    draw(curves, options.source.with_suffix(".png"))
    for curve, found in curves.items():
        print(curve, " ".join(f"{line['at']}: {line['step_ms']} ms, {line['share_of_peak']:.0%};" for line in found))


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Small multiples: milliseconds of a client's step above, share of the peak below."""
    figure, axes = theme.make_figure(2.6 * len(curves) + 0.4, 4.0, columns=len(curves), rows=2)
    for column, (curve, found) in enumerate(curves.items()):
        above, below = axes[column], axes[len(curves) + column]
        at = [line["at"] for line in found]
        low, high = zip(*(line["step_ms_range"] for line in found), strict=True)
        above.fill_between(at, low, high, color=theme.SERIES[0], alpha=0.18, linewidth=0)
        above.plot(at, [line["step_ms"] for line in found], "o-", color=theme.SERIES[0], markersize=4)
        below.plot(at, [100 * line["share_of_peak"] for line in found], "s-", color=theme.SERIES[2], markersize=4)
        for ax in (above, below):
            ax.set_xscale("log", base=2)
            ax.set_xticks(at, [str(value) for value in at])
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
        below.set_xlabel(CURVES[curve][0])
    axes[0].set_ylabel("ms of a client's step")
    axes[len(curves)].set_ylabel("% of the matmul peak")
    first = next(iter(curves.values()))[0]
    figure.suptitle(
        f"{MODEL}, {first['steps']} steps of {first['batch']} examples, {first['machine']['cores']} cores; "
        "medians and ranges",
        fontsize=9,
        color=theme.MUTED,
    )
    theme.save_png(figure, file)


if __name__ == "__main__":
    main()
