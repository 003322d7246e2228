"""The numbers, the table and the picture of `study_emoji.py`, from the folders of its comparisons; trains nothing.

What `summarise_study` returns is plain JSON, small enough to be committed; table and picture are drawn from it alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import (
    Difference,
    compare_paired,
    mean_over_seeds,
    paired_difference,
    spread,
)
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, format_bytes, format_paired, points
from fedvlm_jax.run_dir.reader import ComparisonRecord

RIVALS = ("local", "fedavg-lora", "fedavg-lora+ft")
FAR = 0.1
"""A method further than this from `local` is written at the picture's edge, as is zero-shot: it would press the others
together."""

Json = dict[str, Any]


def summarise_study(cells: Mapping[str, ComparisonRecord]) -> dict[str, Json]:
    """Cell -> method -> figures; shares from 0 to 1."""
    return {name: summarise_cell(record) for name, record in cells.items()}


def summarise_cell(record: ComparisonRecord) -> Json:
    """Summarise one comparison: every method's spread over seeds, and its paired differences with the rivals."""
    scores = {method: record.scores(method) for method in ("zero-shot", *record.methods)}
    return {
        "prompt": record.settings["data"]["prompt"],
        "images_per_client": record.settings["data"]["images_per_client"],
        "seeds": record.seeds,
        "methods": {method: _summarise_method(method, scores, record) for method in scores},
    }


def _summarise_method(method: str, scores: Mapping[str, Mapping[int, Mapping[str, float]]], record: Any) -> Json:
    sent = [run["bytes_up_per_client"] for run in record.runs if run["method"] == method]
    rivals = {rival: scores[rival] for rival in RIVALS if rival in scores and rival != method}
    return summarise_scores(scores[method], rivals) | {"bytes_up_per_client": float(np.mean(sent)) if sent else None}


def summarise_scores(
    by_seed: Mapping[int, Mapping[str, float]], rivals: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> Json:
    """Summarise a method's scores by seed and client: its spread over seeds, and paired differences with rivals."""
    summaries = [summarise(one) for one in by_seed.values()]
    nothing = {seed: dict.fromkeys(one, 0.0) for seed, one in by_seed.items()}
    around = paired_difference(by_seed, nothing)  # the mean itself, with the interval over seeds
    return {
        "mean": around.mean,
        "low": around.low,
        "high": around.high,
        "std_over_seeds": spread([one.mean for one in summaries]).std,
        "worst_decile": float(np.mean([one.worst_decile for one in summaries])),
        "by_seed": [one.mean for one in summaries],
        "by_client": mean_over_seeds(by_seed),
        "against": {rival: _as_json(compare_paired(by_seed, other)) for rival, other in rivals.items()},
    }


def _as_json(difference: Difference | None) -> Json | None:
    return None if difference is None else vars(difference)


def format_mean(one: Json) -> str:
    """Write a method's mean with its standard deviation over seeds, in per cent."""
    error = "" if one["std_over_seeds"] is None else f" ± {100 * one['std_over_seeds']:.1f}"
    return f"{100 * one['mean']:.1f}{error} %"


def tabulate(name: str, cell: Json) -> Table:
    """Tabulate one cell for the README."""
    rows, methods = [], cell["methods"]
    for method, one in methods.items():
        differences = [format_paired(Difference(**one["against"][r])) if r in one["against"] else "–" for r in RIVALS]
        sent = "–" if one["bytes_up_per_client"] is None else format_bytes(one["bytes_up_per_client"])
        rows.append((method, format_mean(one), percent(one["worst_decile"]), *differences, sent))
    best = max(one["mean"] for one in methods.values())
    strong = frozenset(row for row, one in enumerate(methods.values()) if one["mean"] == best)
    columns = ("method", "mean", "worst decile", *(f"against {rival}" for rival in RIVALS), "sent per client, round")
    return Table(describe_cell(cell), columns, tuple(rows), strong)


def describe_cell(cell: Json) -> str:
    """Say which cell this is, in words."""
    prompt = {"neutral": "Neutral question", "client-language": "Question in the client's language"}[cell["prompt"]]
    return f"{prompt}, {cell['images_per_client']} images per client"


def write_note(study: Json) -> str:
    """Say how to read the tables, how settings were found, and the command."""
    first = next(iter(study["cells"].values()))
    clients, seeds = len(first["methods"]["local"]["by_client"]), len(first["seeds"])
    rates = [
        f"{name}: " + ", ".join(f"{method} {one[0]:g}/{one[1]:g}" for method, one in chosen.items())
        for name, chosen in study["rates"].items()
    ]
    return "\n".join(
        [
            f"Exact match on test: mean over {clients} clients ± standard deviation over {seeds} seeds; worst decile: "
            "mean of the worst tenth of the clients. Differences: percentage points on the same clients and seeds, "
            "with a 95 % t-interval over seeds; ▲ ahead, ▼ behind, ≈ the interval holds zero. Bold: the highest mean.",
            "",
            f"Learning rates of A and B were chosen on validation from the same {len(study['grid'])} pairs for every "
            f"method ({len(study['tuning'])} tuning runs, all logged in emoji_study.json, with other seeds than the "
            "study's); test was scored afterwards, once. Chosen (A/B): " + "; ".join(rates) + ".",
            "",
            f"Made by `{study['command']}`.",
        ]
    )


def draw_study(cells: Mapping[str, Json]) -> Figure:
    """Draw all cells side by side: clients and means above, the distance from local training below."""
    methods = list(next(iter(cells.values()))["methods"])[::-1]
    count = len(cells)
    figure, axes = theme.make_figure(2.1 * count + 1.0, 1.6 + 0.9 * len(methods), count, 2, sharex="row", sharey="row")
    series = theme.choose_series([method for method in methods if method != "zero-shot"])
    for column, cell in enumerate(cells.values()):
        top, bottom = axes[column], axes[count + column]
        prompt = {"neutral": "neutral question"}.get(cell["prompt"], "client's language")
        top.set_title(f"{prompt},\n{cell['images_per_client']} images", fontsize=10, loc="left", color=theme.INK)
        local = cell["methods"]["local"]["by_client"]
        for row, method in enumerate(methods):
            one = cell["methods"][method]
            colour = theme.MUTED if method == "zero-shot" else theme.SERIES[series[method]]
            _scatter(top, row, list(one["by_client"].values()), colour)
            _mark(top, row, one, f"{100 * one['mean']:.1f}")
            against = one["against"].get("local")
            if against is None or method == "zero-shot" or abs(against["mean"]) > FAR:
                text = "the yardstick" if against is None else f"{points(against['mean'])} (off scale)"
                box = {"facecolor": theme.PAPER, "linewidth": 0, "pad": 1}
                place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (1, -3)}
                bottom.annotate(text, (0, row), color=theme.MUTED, fontsize=9, bbox=box, **place)
                continue
            ahead = [score - local[client] for client, score in one["by_client"].items() if client in local]
            _scatter(bottom, row, ahead, colour)
            _mark(bottom, row, against, points(against["mean"]))
        bottom.axvline(0, color=theme.MUTED, linewidth=1)
        top.set_xlabel("test exact match, %")
        bottom.set_xlabel("points ahead of local")
        for ax in (top, bottom):
            ax.set_yticks(range(len(methods)), methods)
            ax.set_ylim(-0.6, len(methods) - 0.3)
    legend = "dots: clients (mean over seeds);  black: mean over clients, 95 % interval over seeds"
    figure.supxlabel(legend, fontsize=9, color=theme.MUTED)
    figure.get_layout_engine().set(hspace=0.06, wspace=0.03)
    return figure


def _scatter(ax: Any, row: int, values: Sequence[float], colour: str) -> None:
    jitter = 0.13 * np.sin(2.4 * np.arange(len(values)))
    ax.scatter(100 * np.asarray(values), row - 0.2 + jitter, s=14, color=colour, alpha=0.55, linewidths=0)


def _mark(ax: Any, row: int, one: Json, text: str) -> None:
    """Draw a mean with its interval, and write it above."""
    mean, ends = 100 * one["mean"], [[100 * (one["mean"] - one["low"])], [100 * (one["high"] - one["mean"])]]
    if np.isfinite(ends).all():
        ax.errorbar(mean, row, xerr=ends, color=theme.INK, capsize=3, linewidth=1.5, zorder=4)
    ax.plot(mean, row, "o", color=theme.INK, markersize=4.5, zorder=5)
    place = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
    ax.annotate(text, (mean, row), color=theme.INK, fontsize=9, **place)


def choose_rates(points_: Sequence[Json], grid: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Pick every method's best pair of rates by mean validation score over tuning seeds; the first of equals.

    Raises:
        ValueError: a method was not tried at every point of the grid, or not with the same seeds at each.
    """
    chosen = {}
    for method in dict.fromkeys(point["method"] for point in points_):
        tried = {
            pair: {
                point["seed"]: point["score"]
                for point in points_
                if (point["method"], *_pair(point)) == (method, *pair)
            }
            for pair in grid
        }
        if len({frozenset(scores) for scores in tried.values()}) != 1 or not tried[grid[0]]:
            raise ValueError(f"{method} was not tried with equal effort: {tried}")
        chosen[method] = max(grid, key=lambda pair, tried=tried: float(np.mean(list(tried[pair].values()))))
    return chosen


def _pair(point: Json) -> tuple[float, float]:
    return point["learning_rate_a"], point["learning_rate_b"]


def read_lines(path: Path) -> list[Json]:
    """Read JSON lines; a last one that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
