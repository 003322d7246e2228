"""Tables and pictures of `sharing_sweep.py`, from the lines that its runs leave; trains nothing.

A cell is reported as far as it is, with its number of seeds; a verdict needs local and plora of the same seeds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from methods_summary import format_against, format_cell, read_all
from study_summary import Json, format_mean, summarise_scores

from fedvlm_jax.evaluation.metrics.metric_labels import percent
from fedvlm_jax.evaluation.statistics.over_seeds import Difference, judge
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, points, to_markdown
from fedvlm_jax.run_dir.artifacts import describe_environment

RIVALS = ("local", "plora")
USUAL_IMAGES, USUAL_CLIENTS = 10, 16
"""At which the other is varied."""
CONFLICTS = {"none": "one language", "half": "two languages", "full": "four languages"}
FAR = 6.0
"""Points behind local training beyond which the picture does not show a method."""


def write(folder: Path, results: Path, cells: Sequence[str], methods: Sequence[str]) -> None:
    """Write `sharing_sweep.json`, `.md` and the pictures into `results`.

    Args:
        folder: of the bases' folders, with their lines.
        results: where to write.
        cells: names of the cells, in the order of the report.
        methods: names of the methods, in the order of the report.
    """
    lines = {path.name: read_all(path) for path in sorted(folder.iterdir()) if path.is_dir() and path != results}
    lines = {base: found for base, found in lines.items() if found}
    if not lines:
        raise SystemExit(f"{folder}: nothing has been measured yet; run the stage run")
    everything = [line for found in lines.values() for line in found]
    bases = {base: summarise(found, cells, methods) for base, found in lines.items()}
    content = {
        **{key: value for key, value in describe_environment().items() if key != "time"},
        "commits": sorted({line["commit"] for line in everything}),
        "runs": len(everything),
        "hours": round(sum(line["seconds"] for line in everything) / 3600, 1),
        "bases": bases,
        "tuning": {
            base: [
                {key: line[key] for key in ("stage", "cell", "method", "seed", "rates", "validation")}
                for line in found
                if line["stage"] in ("tune", "search")
            ]
            for base, found in lines.items()
        },
    }
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (results / "sharing_sweep.json").write_text(text + "\n", encoding="utf-8")
    tables = [table for base, found in bases.items() for table in tabulate(base, found)]
    words = "\n\n".join([*map(to_markdown, tables), write_note(content)])
    (results / "sharing_sweep.md").write_text(words + "\n", encoding="utf-8")
    for base, found in bases.items():
        if any(cell["clients"] == USUAL_CLIENTS for cell in found["cells"].values()):
            theme.save_png(draw_curves(found["cells"]), results / f"sharing_sweep_{base}.png")
    if any(found["cells"] for found in bases.values()):
        theme.save_png(
            draw_regions({base: found["cells"] for base, found in bases.items()}), results / "sharing_regions.png"
        )
    print(words)


def summarise(lines: Sequence[Json], cells: Sequence[str], methods: Sequence[str]) -> Json:
    """Summarise a base: cells by name with the figures of their methods; and the search. Shares from 0 to 1."""
    found: dict[str, Json] = {}
    for name in cells:
        scores = collect(lines, "run", name)
        if not set(RIVALS) <= scores.keys():
            continue
        images, clients, conflict = name.split("-")
        rates = {line["method"]: line["rates"] for line in lines if line["stage"] == "run" and line["cell"] == name}
        found[name] = {
            "images": int(images),
            "clients": int(clients),
            "conflict": conflict,
            "methods": {
                method: _against(method, scores) | {"rates": rates.get(method)}
                for method in ("zero-shot", *methods)
                if method in scores
            },
        }
    return {"cells": found, "search": summarise_search(lines)}


def collect(lines: Sequence[Json], stage: str, cell: str) -> dict[str, dict[int, dict[str, float]]]:
    """Collect the test scores of a stage and cell: method (and zero-shot) -> seed -> client -> share."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        if line["stage"] == stage and line["cell"] == cell:
            scores.setdefault(line["method"], {})[line["seed"]] = line["test"]
            scores.setdefault("zero-shot", {})[line["seed"]] = line["zero_shot"]
    return scores


def _against(method: str, scores: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Json:
    rivals = {rival: scores[rival] for rival in RIVALS if rival in scores and rival != method}
    return summarise_scores(scores[method], rivals) | {"seeds": sorted(scores[method])}


def summarise_search(lines: Sequence[Json]) -> dict[str, Json]:
    """Cell -> candidates by their mean validation at their best rates, and those that were confirmed on fresh seeds."""
    found: dict[str, Json] = {}
    for cell in dict.fromkeys(line["cell"] for line in lines if line["stage"] == "search"):
        tried: dict[str, dict[tuple[float, ...], list[float]]] = {}
        for line in lines:
            if line["stage"] == "search" and line["cell"] == cell:
                tried.setdefault(line["method"], {}).setdefault(tuple(line["rates"]), []).append(line["validation"])
        # Only the best rates meet the second seed: of what has met most seeds, the best mean.
        means = {
            method: max((len(scores), sum(scores) / len(scores)) for scores in of.values())[1]
            for method, of in tried.items()
        }
        scores = collect(lines, "confirm", cell)
        found[cell] = {
            "validation": dict(sorted(means.items(), key=lambda item: -item[1])),
            "confirmed": {method: _against(method, scores) for method in scores if set(RIVALS) <= scores.keys()},
        }
    return found


def describe(name: str) -> str:
    """Say in words which cell this is.

    >>> describe("10-16-full")
    '10 images, 16 clients, four languages'
    """
    images, clients, conflict = name.split("-")
    return f"{images} images, {clients} clients, {CONFLICTS[conflict]}"


def tabulate(base: str, found: Json) -> list[Table]:
    """Tabulate a base: who wins each cell, each conflict's methods by cell, and the search."""
    cells = found["cells"]
    tables = []
    if cells:
        tables.append(_tabulate_winners(base, cells))
    for conflict, words in CONFLICTS.items():
        if chosen := {name: cell for name, cell in cells.items() if cell["conflict"] == conflict}:
            methods = list(dict.fromkeys(method for cell in chosen.values() for method in cell["methods"]))
            rows = [(method, *(format_cell(cell, method) for cell in chosen.values())) for method in methods]
            columns = [f"{cell['images']} images, {cell['clients']} clients" for cell in chosen.values()]
            tables.append(Table(f"{base}: answers in {words}", ("method", *columns), tuple(rows), frozenset()))
    for name, one in found["search"].items():
        rows = [(method, percent(value)) for method, value in one["validation"].items()]
        title = f"{base}: candidates by validation, {describe(name)}"
        tables.append(Table(title, ("shared, or method", "mean"), tuple(rows), frozenset()))
        if one["confirmed"]:
            rows = [
                (method, format_mean(each), format_against(each, "local"), format_against(each, "plora"))
                for method, each in one["confirmed"].items()
            ]
            columns = ("shared, or method", "mean", "against local", "against plora")
            title = f"{base}: the best of them on fresh seeds, test, {describe(name)}"
            tables.append(Table(title, columns, tuple(rows), frozenset()))
    return tables


def pick_winner(cell: Json) -> tuple[str, Json]:
    """Pick the method of the highest mean; zero-shot is no method."""
    methods = {method: one for method, one in cell["methods"].items() if method != "zero-shot"}
    best = max(methods, key=lambda method: methods[method]["mean"])
    return best, methods[best]


def _tabulate_winners(base: str, cells: Mapping[str, Json]) -> Table:
    rows = []
    for name, cell in cells.items():
        best, one = pick_winner(cell)
        ahead = [
            method
            for method, each in cell["methods"].items()
            if each["against"].get("local") and judge(Difference(**each["against"]["local"])) == "ahead"
        ]
        seeds = str(len(one["seeds"]))
        row = (describe(name), best, format_mean(one), format_against(one, "local"), format_against(one, "plora"))
        rows.append((*row, ", ".join(ahead) or "none", seeds))
    columns = ("cell", "highest mean", "mean", "against local", "against plora", "ahead of local", "seeds")
    return Table(f"{base}: who is ahead where", columns, tuple(rows), frozenset())


def write_note(content: Json) -> str:
    """Say how to read the tables and how settings were found."""
    return (
        "Exact match on test: mean over clients ± standard deviation over seeds. Differences: percentage points on the "
        "same clients and seeds, with a 95 % t-interval over seeds, not corrected for the number of methods; ▲ ahead, "
        "▼ behind, ≈ the interval holds zero. Rates of A and B: the best on validation of three pairs, for each "
        "conflict at 10 images and 16 clients, with a seed that is not among the study's; the validated round that did "
        "best is scored. Methods that cluster know the largest number of languages as their largest number of "
        f"clusters, by their defaults. {content['runs']} runs, {content['hours']} hours.\n\n"
        "Made by `python experiments/sharing_sweep.py`."
    )


def draw_curves(cells: Mapping[str, Json]) -> Figure:
    """Draw points ahead of local training by images per client, a panel per conflict, at 16 clients."""
    figure, axes = theme.make_figure(10.4, 4.2, len(CONFLICTS), 1, sharey=True)
    usual = [cell for cell in cells.values() if cell["clients"] == USUAL_CLIENTS]
    methods = list(dict.fromkeys(method for cell in usual for method in cell["methods"]))
    methods = [method for method in methods if method not in ("zero-shot", "local", "fedavg-lora")]
    for ax, (conflict, words) in zip(axes, CONFLICTS.items(), strict=True):
        chosen = sorted((cell for cell in usual if cell["conflict"] == conflict), key=lambda cell: cell["images"])
        for place, method in enumerate(methods):
            _draw_series(ax, chosen, method, place, (place - (len(methods) - 1) / 2) * 0.02)
        ax.axhline(0, color=theme.MUTED, linewidth=1)
        ax.set_xscale("log")
        images = sorted({cell["images"] for cell in usual})
        ax.set_xticks(images, list(map(str, images)))
        ax.minorticks_off()
        ax.set_title(f"answers in {words}", fontsize=9, loc="left", color=theme.INK)
        ax.set_xlabel("images per client")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(low, -FAR), high)
    axes[0].set_ylabel("points ahead of local")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw_series(ax: Any, cells: Sequence[Json], method: str, place: int, shift: float) -> None:
    found = [
        (cell["images"], cell["methods"][method]["against"]["local"]) for cell in cells if method in cell["methods"]
    ]
    found = [(images, one) for images, one in found if one is not None]
    at = [images * (1 + shift) for images, _ in found]
    means = [100 * one["mean"] for _, one in found]
    reach = [100 * (one["high"] - one["mean"]) for _, one in found]
    look = {"color": theme.SERIES[place % len(theme.SERIES)], "marker": theme.MARKERS[place % len(theme.MARKERS)]}
    ax.errorbar(at, means, yerr=reach, label=method, markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8, **look)


def draw_regions(bases: Mapping[str, Mapping[str, Json]]) -> Figure:
    """Draw who has the highest mean where: a row of panels per base; bold where its interval is ahead of local."""
    figure, axes = theme.make_figure(10.4, 2.7 * len(bases), 2, len(bases))
    for row, (base, cells) in enumerate(bases.items()):
        usual = {(one["images"], one["conflict"]): one for one in cells.values() if one["clients"] == USUAL_CLIENTS}
        scaled = {(one["clients"], one["conflict"]): one for one in cells.values() if one["images"] == USUAL_IMAGES}
        _draw_tiles(axes[2 * row], usual, f"{base}, {USUAL_CLIENTS} clients: images per client")
        _draw_tiles(axes[2 * row + 1], scaled, f"{base}, {USUAL_IMAGES} images: clients")
    return figure


def _draw_tiles(ax: Any, cells: Mapping[tuple[int, str], Json], title: str) -> None:
    if not cells:
        ax.set_axis_off()
        return
    across = sorted({level for level, _ in cells})
    for column, level in enumerate(across):
        for row, conflict in enumerate(CONFLICTS):
            if (level, conflict) not in cells:
                ax.text(column, row, "not run", ha="center", va="center", fontsize=8, color=theme.MUTED)
                continue
            best, one = pick_winner(cells[level, conflict])
            against = one["against"].get("local")
            sure = against is not None and against["low"] > 0
            text = best if against is None else f"{best}\n{points(against['mean'])}"
            look = {"weight": "bold", "color": theme.INK} if sure else {"color": theme.MUTED}
            ax.text(column, row, text, ha="center", va="center", fontsize=8, **look)
    ax.set_xticks(range(len(across)), list(map(str, across)))
    ax.set_yticks(range(len(CONFLICTS)), list(CONFLICTS.values()))
    ax.set(xlim=(-0.5, len(across) - 0.5), ylim=(len(CONFLICTS) - 0.5, -0.5))
    ax.grid(visible=False)
    ax.set_title(title, fontsize=9, loc="left", color=theme.INK)
