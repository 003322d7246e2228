"""Tables and pictures of `methods_emoji.py`, from the lines that its runs leave; trains nothing.

A cell that is not finished is reported as far as it is, with the number of seeds of every method.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from study_summary import Json, format_mean, read_lines, summarise_scores

from fedvlm_jax.evaluation.metrics.metric_labels import percent
from fedvlm_jax.evaluation.statistics.over_seeds import Difference
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, format_bytes, format_paired, points, to_markdown
from fedvlm_jax.run_dir.artifacts import describe_environment

RIVALS = ("local", "fedavg-lora")
LEVEL = 0.5
"""Bytes are counted until a method has gone so far from zero-shot to what local training ends with."""
MANY = 8
"""More methods than this are all of them."""
EDGE = 8.0
"""Points behind local training beyond which the picture shows a number in place of a mark."""
STAGES = ("run", "curve", "search")
NAMES = {
    "lang-20": "Client's language in the prompt, 20 images per client",
    "lang-60": "Client's language in the prompt, 60 images per client",
    "neutral-20": "Neutral prompt, 20 images per client",
    "neutral-60": "Neutral prompt, 60 images per client",
    "iid-20": "The same pictures dealt at random, 20 images per client",
    "iid-60": "The same pictures dealt at random, 60 images per client",
    "style": "Four clients that differ in drawing style alone",
    "language": "Four clients that differ in the answers' language alone",
    "both": "Four clients that differ in both",
}


def read_all(folder: Path) -> list[Json]:
    """Every line of every part; a last one that a kill cut short is left out."""
    return [line for path in sorted(folder.glob("lines-*.jsonl")) for line in read_lines(path)]


def write(folder: Path, results: Path, order: Iterable[str], model: str) -> None:
    """Write `methods_emoji.json`, `.md` and a picture per finished part into `results`.

    Args:
        folder: of the lines.
        results: where to write.
        order: the cells' names, in the order of the report.
        model: the base's name.
    """
    lines = read_all(folder)
    if not lines:
        raise SystemExit(f"{folder}: nothing has been measured yet; run the stage run")
    cells = {name: cell for name in order if (cell := summarise_cell(name, lines))["methods"]}
    content = {
        **{key: value for key, value in describe_environment().items() if key != "time"},
        "model": model,
        "commits": sorted({line["commit"] for line in lines}),
        "stages": [stage for stage in STAGES if any(line["stage"] == stage for line in lines)],
        "runs": len(lines),
        "hours": round(sum(line["seconds"] for line in lines) / 3600, 1),
        "cells": cells,
        "search": summarise_search(lines),
        "tuning": [
            {key: line[key] for key in ("cell", "method", "seed", "rates", "validation")}
            for line in lines
            if line["stage"] == "tune"
        ],
    }
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (results / "methods_emoji.json").write_text(text + "\n", encoding="utf-8")
    tables = tabulate_overview(cells) + [tabulate(name, cell) for name, cell in cells.items()]
    tables += tabulate_shift(cells) + tabulate_neighbours(cells) + tabulate_search(content["search"])
    words = "\n\n".join([*map(to_markdown, tables), write_note(content)])
    (results / "methods_emoji.md").write_text(words + "\n", encoding="utf-8")
    if wide := _pick_wide(cells):
        theme.save_png(draw(wide), results / "methods_emoji.png")
    print(words)


def summarise_cell(name: str, lines: Sequence[Json]) -> Json:
    """Method -> figures of one cell; shares from 0 to 1. Methods stand by their mean, the best first."""
    own = [line for line in lines if line["stage"] == "run" and line["cell"] == name]
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for line in own:
        scores.setdefault(line["method"], {})[line["seed"]] = line["test"]
        scores.setdefault("zero-shot", {})[line["seed"]] = line["zero_shot"]
    levels = {method: _find_level(name, method, lines) for method in scores}
    methods = {}
    for method, by_seed in scores.items():
        rivals = {rival: scores[rival] for rival in RIVALS if rival in scores and rival != method}
        mine = [line for line in own if line["method"] == method]
        methods[method] = summarise_scores(by_seed, rivals) | {
            "seeds": sorted(by_seed),
            "rates": mine[0]["rates"] if mine else None,
            "bytes_up": float(np.mean([line["bytes_up"] for line in mine])) if mine else None,
            "bytes_down": float(np.mean([line["bytes_down"] for line in mine])) if mine else None,
            "bytes_to_level": levels[method],
            "health": _average([line["health"] for line in mine]),
            "neighbours": float(np.mean([list(line["neighbours"].values()) for line in mine]))
            if mine and mine[0]["neighbours"]
            else None,
        }
    return {"methods": dict(sorted(methods.items(), key=lambda item: -item[1]["mean"]))}


def _average(health: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = set.intersection(*(set(one) for one in health)) if health else set()
    return {name: float(np.mean([one[name] for one in health])) for name in sorted(names)}


def _find_level(cell: str, method: str, lines: Sequence[Json]) -> float | str | None:
    """Bytes up until validation is half way from zero-shot to local's end, or "never"; None without curves."""
    curves = {line["method"]: line for line in lines if line["stage"] == "curve" and line["cell"] == cell}
    if method not in curves or "local" not in curves:
        return None
    zero, end = float(np.mean(list(curves["local"]["zero_shot"].values()))), curves["local"]["curve"][-1][1]
    rounds = [round_ for round_, value in curves[method]["curve"] if value >= zero + LEVEL * (end - zero)]
    return rounds[0] * curves[method]["bytes_up"] if rounds else "never"


def summarise_search(lines: Sequence[Json]) -> Json:
    """Candidate -> mean validation of the search; and the figures of those that were confirmed on fresh seeds."""
    tried: dict[str, list[float]] = {}
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        if line["stage"] == "search":
            tried.setdefault(line["method"], []).append(line["validation"])
        if line["stage"] == "confirm":
            scores.setdefault(line["method"], {})[line["seed"]] = line["test"]
    confirmed = {
        method: summarise_scores(
            by_seed, {rival: scores[rival] for rival in ("local", "plora") if rival in scores and rival != method}
        )
        for method, by_seed in scores.items()
    }
    return {
        "validation": dict(sorted(((name, float(np.mean(v))) for name, v in tried.items()), key=lambda item: -item[1])),
        "confirmed": confirmed,
    }


def format_against(one: Json, rival: str) -> str:
    """Write a method's paired difference from a rival; a dash from itself."""
    found = one["against"].get(rival)
    return "–" if found is None else format_paired(Difference(**found))


def _format_level(count: float | str | None) -> str:
    return "–" if count is None else count if isinstance(count, str) else format_bytes(count)


def _pick_wide(cells: Mapping[str, Json]) -> dict[str, Json]:
    """The cells in which all methods are compared, not a few."""
    return {name: cell for name, cell in cells.items() if len(cell["methods"]) > MANY}


def tabulate_overview(cells: Mapping[str, Json]) -> list[Table]:
    """Every method in every cell that compares all: mean, and the difference from local training.

    Methods stand by that difference, averaged over the cells that they are in.
    """
    wide = _pick_wide(cells)
    if len(wide) < 2:
        return []
    gains: dict[str, list[float]] = {}
    for cell in wide.values():
        for method, one in cell["methods"].items():
            gains.setdefault(method, []).append(one["against"]["local"]["mean"] if method != "local" else 0.0)
    order = sorted(gains, key=lambda method: -float(np.mean(gains[method])))
    rows = []
    for method in order:
        found = [cell["methods"].get(method) for cell in wide.values()]
        sent = next((one["bytes_up"] for one in found if one), None)
        cells_of = ["–" if one is None else f"{format_mean(one)}, {format_against(one, 'local')}" for one in found]
        rows.append((method, *cells_of, "–" if sent is None else format_bytes(sent)))
    return [Table("Every method in every cell", ("method", *wide, "up"), tuple(rows), frozenset())]


def tabulate(name: str, cell: Json) -> Table:
    """One cell: every method, the best first."""
    columns = (
        "method",
        "mean",
        "worst decile",
        *(f"against {rival}" for rival in RIVALS),
        "up",
        "down",
        "to level",
        "A / B",
        "seeds",
    )
    rows = [
        (
            method,
            format_mean(one),
            percent(one["worst_decile"]),
            *(format_against(one, rival) for rival in RIVALS),
            "–" if one["bytes_up"] is None else format_bytes(one["bytes_up"]),
            "–" if one["bytes_down"] is None else format_bytes(one["bytes_down"]),
            _format_level(one["bytes_to_level"]),
            "–" if one["rates"] is None else " / ".join(f"{rate:g}" for rate in one["rates"]),
            str(len(one["seeds"])),
        )
        for method, one in cell["methods"].items()
    ]
    return Table(NAMES.get(name, name), columns, tuple(rows), frozenset())


def tabulate_shift(cells: Mapping[str, Json]) -> list[Table]:
    """Which factor to share under which shift: means, and differences from local training."""
    names = [name for name in ("style", "language", "both") if name in cells]
    if not names:
        return []
    methods = list(dict.fromkeys(method for name in names for method in cells[name]["methods"]))
    rows = [(method, *(format_cell(cells[name], method) for name in names)) for method in sorted(methods)]
    return [Table("Which factor to share under which shift", ("method", *names), tuple(rows), frozenset())]


def format_cell(cell: Json, method: str) -> str:
    """Write a method's mean in a cell, and its difference from local training; a dash where it has not run."""
    one = cell["methods"].get(method)
    return "–" if one is None else f"{format_mean(one)}, {format_against(one, 'local')}"


def tabulate_neighbours(cells: Mapping[str, Json]) -> list[Table]:
    """What kNN-Per adds to FedAvg, by how unlike the clients are."""
    rows = []
    for name, cell in cells.items():
        plain, mixed = cell["methods"].get("fedavg-lora"), cell["methods"].get("fedavg-lora+knn")
        if plain is None or mixed is None:
            continue
        local = cell["methods"].get("local")
        rows.append(
            (
                NAMES[name],
                "–" if local is None else points(local["mean"] - plain["mean"]),
                format_mean(plain),
                format_mean(mixed),
                format_against(mixed, "fedavg-lora"),
                f"{mixed['neighbours']:.2f}",
            )
        )
    columns = ("cell", "local − fedavg-lora", "fedavg-lora", "with kNN-Per", "gain", "mean λ")
    return (
        [Table("kNN-Per's claim: the gain grows with heterogeneity", columns, tuple(rows), frozenset())] if rows else []
    )


def tabulate_search(search: Json) -> list[Table]:
    """What was tried, and what fresh seeds said of the best."""
    tables = []
    if search["validation"]:
        rows = [(name, percent(value)) for name, value in search["validation"].items()]
        tables.append(
            Table("Sharing patterns tried, validation, two seeds", ("averaged", "mean"), tuple(rows), frozenset())
        )
    if search["confirmed"]:
        rows = [
            (name, format_mean(one), format_against(one, "local"), format_against(one, "plora"))
            for name, one in search["confirmed"].items()
        ]
        columns = ("averaged", "mean", "against local", "against plora")
        tables.append(Table("The best of them on five fresh seeds, test", columns, tuple(rows), frozenset()))
    return tables


def write_note(content: Json) -> str:
    """Say how to read the tables and how settings were found."""
    cost = f"{content['runs']} runs, {content['hours']} hours on one core each."
    return (
        "Exact match on test: mean over clients ± standard deviation over seeds; worst decile: mean of the worst tenth "
        "of the clients. Differences: percentage points on the same clients and seeds, with a 95 % t-interval over "
        "seeds, not corrected for the number of methods; ▲ ahead, ▼ behind, ≈ the interval holds zero. Up, down: per "
        "client and round. To level: what a client has sent when validation, looked at every second round of one run, "
        "is half way from zero-shot to what local training ends with. A / B: the learning rates that did best on "
        f"validation out of three pairs, with a seed that is not among the study's. {cost}\n\n"
        f"Made on {content['model']} by `python experiments/methods_emoji.py`, stages {', '.join(content['stages'])}."
    )


def draw(cells: Mapping[str, Json]) -> Figure:
    """Every cell's methods by their distance from local training, with 95 % intervals over seeds.

    Who is more than `EDGE` points behind is written at the edge, so that the others can be told apart.
    """
    shown = {
        name: [method for method in cell["methods"] if method not in ("zero-shot", "local")][::-1]
        for name, cell in cells.items()
    }
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    height = rows * (1.3 + 0.24 * max(map(len, shown.values())))
    figure, axes = theme.make_figure(4.6 * columns + 0.4, height, columns, rows)
    for ax, (name, methods) in zip(np.ravel(axes), shown.items(), strict=False):
        _draw_cell(ax, cells[name], methods)
        ax.set_title(NAMES.get(name, name), fontsize=9, loc="left", color=theme.INK)
    for ax in np.ravel(axes)[len(shown) :]:
        ax.set_visible(False)
    return figure


def _draw_cell(ax: Any, cell: Json, methods: Sequence[str]) -> None:
    edge = False
    for row, method in enumerate(methods):
        one = cell["methods"][method]["against"]["local"]
        mean = 100 * one["mean"]
        colour = theme.INK if one["low"] > 0 or one["high"] < 0 else theme.MUTED
        if mean < -EDGE:
            edge = True
            ax.plot(-EDGE, row, marker="<", markersize=5, color=colour, clip_on=False)
            ax.text(-EDGE + 0.35, row, points(one["mean"]), va="center", fontsize=8, color=colour)
            continue
        ends = [[100 * (one["mean"] - one["low"])], [100 * (one["high"] - one["mean"])]]
        style = {"xerr": ends, "capsize": 2, "linewidth": 1.2} if np.isfinite(ends).all() else {}
        ax.errorbar(mean, row, fmt="o", markersize=4, color=colour, **style)
    ax.axvline(0, color=theme.MUTED, linewidth=1)
    if edge:
        ax.set_xlim(left=-EDGE)
    ax.set_yticks(range(len(methods)), methods, fontsize=8)
    ax.set_xlabel("points ahead of local")
