"""Which findings of `methods_emoji.py` hold on both shipped bases; trains nothing.

    python experiments/two_bases.py      # from the committed results of Florence2-nano and SmolVLM-nano

The two studies share clients, seeds, steps and grids of rates and differ in the base alone, so a method's distance
from local training is read side by side. Writes `two_bases.md` and `two_bases.png`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from methods_summary import NAMES
from study_summary import Json, format_mean

from fedvlm_jax.evaluation.statistics.over_seeds import Difference, judge
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, format_paired, points, to_markdown

RESULTS = Path(__file__).parent / "results"
RIVALS = ("local", "fedavg-lora")
EDGE = 12.0
"""Points behind local training beyond which the picture shows a number in place of a mark."""


@dataclass(frozen=True)
class TwoBases:
    """The results to compare, and where the comparison goes"""

    first: Path = RESULTS / "methods_emoji.json"
    second: Path = RESULTS / "methods_smolvlm-nano" / "methods_emoji.json"
    names: tuple[str, str] = ("Florence2-nano", "SmolVLM-nano")
    results: Path = RESULTS


def pair_cells(first: Mapping[str, Json], second: Mapping[str, Json]) -> dict[str, dict[str, tuple[Json, Json]]]:
    """Cell -> method -> its figures on both bases, for the cells and methods that both have; by the second's mean.

    A cell in which a rival is still to come is left out.
    """
    return {
        cell: {
            method: (first[cell]["methods"][method], one)
            for method, one in second[cell]["methods"].items()
            if method in first[cell]["methods"]
        }
        for cell in first
        if cell in second and set(RIVALS) <= second[cell]["methods"].keys()
    }


def find_difference(one: Json, rival: str) -> Difference | None:
    """Return the paired difference from a rival; None from itself."""
    return Difference(**one["against"][rival]) if rival in one["against"] else None


def tabulate(cell: str, methods: Mapping[str, tuple[Json, Json]], names: tuple[str, str]) -> Table:
    """Tabulate one cell: each method's mean and differences on both bases, and whether the verdicts agree."""
    rows = []
    for method, both in methods.items():
        row, agreed = [method], []
        for one in both:
            found = [find_difference(one, rival) for rival in RIVALS]
            row += [format_mean(one), *("–" if each is None else format_paired(each) for each in found)]
            agreed.append([None if each is None else judge(each) for each in found])
        verdicts = [f"vs {rival}" for rival, a, b in zip(RIVALS, *agreed, strict=True) if a is not None and a != b]
        rows.append((*row, ", ".join(verdicts) or "none"))
    columns = [f"{name}{what}" for name in names for what in ("", *(f" vs {rival}" for rival in RIVALS))]
    return Table(NAMES[cell], ("method", *columns, "verdicts that differ"), tuple(rows))


def draw(cells: Mapping[str, Mapping[str, tuple[Json, Json]]], names: tuple[str, str]) -> Figure:
    """Draw each method's distance from local training on both bases, with 95 % intervals over seeds."""
    count = len(cells)
    longest = max(map(len, cells.values())) - 1
    figure, axes = theme.make_figure(3.4 * count + 0.6, 1.3 + 0.42 * longest, count, 1, sharey=True)
    first = next(iter(cells.values()))
    order = [method for method in first if method != "local"][::-1]
    for ax, (cell, methods) in zip(np.ravel(axes), cells.items(), strict=True):
        for row, method in enumerate(order):
            for place, one in enumerate(methods.get(method, ())):
                _mark(ax, row + (0.17, -0.17)[place], one["against"]["local"], place, names[place])
        ax.axvline(0, color=theme.MUTED, linewidth=1)
        ax.set_xlim(left=-EDGE)
        ax.set_yticks(range(len(order)), order)
        ax.set_title(NAMES[cell].replace(", ", ",\n"), fontsize=9, loc="left", color=theme.INK)
        ax.set_xlabel("points ahead of local")
    handles, labels = np.ravel(axes)[0].get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    figure.legend(kept.values(), kept.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _mark(ax: Any, row: float, one: Json, place: int, name: str) -> None:
    mean, colour, marker = 100 * one["mean"], theme.SERIES[place], theme.MARKERS[place]
    if mean < -EDGE:
        ax.plot(-EDGE, row, marker="<", markersize=5, color=colour, clip_on=False)
        ax.text(-EDGE + 0.6, row, points(one["mean"]), va="center", fontsize=8, color=colour)
        return
    ends = [[100 * (one["mean"] - one["low"])], [100 * (one["high"] - one["mean"])]]
    style = {"xerr": ends, "capsize": 2, "linewidth": 1.2} if np.isfinite(ends).all() else {}
    ax.errorbar(mean, row, fmt=marker, markersize=4, color=colour, label=name, **style)


def main(run: TwoBases) -> None:
    """Write the tables and the picture."""
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in (run.first, run.second)]
    cells = pair_cells(stored[0]["cells"], stored[1]["cells"])
    tables = [to_markdown(tabulate(cell, methods, run.names)) for cell, methods in cells.items()]
    note = (
        "Exact match on test, mean over clients ± standard deviation over seeds; differences in percentage points on "
        "the same clients and seeds with a 95 % t-interval over seeds; ▲ ahead, ▼ behind, ≈ the interval holds zero. "
        "Made by `python experiments/two_bases.py`."
    )
    (run.results / "two_bases.md").write_text("\n\n".join([*tables, note]) + "\n", encoding="utf-8")
    theme.save_png(draw(cells, run.names), run.results / "two_bases.png")
    print("\n\n".join([*tables, note]))


if __name__ == "__main__":
    main(tyro.cli(TwoBases, description=__doc__))
