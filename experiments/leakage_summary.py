"""Tables and picture of `message_leakage.py`, from the lines that its cells leave; trains nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.evaluation.statistics.over_seeds import BySeed, compare_paired, spread
from fedvlm_jax.reporting.audit_report import KNOWN
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, format_paired, to_markdown
from fedvlm_jax.run_dir.artifacts import describe_environment

Line = dict[str, Any]
NAMES = {
    "usual": "Usual: 4 local steps of AdamW on 16 of 40 rows",
    "few": "Few rows: a local step of SGD on 2 of 40 rows",
}
TESTS = ("loss", "projection", "span")
WHO = ("start", "others", "own")
FIRST = "plora"
"""The variant that the others are compared with: B alone, with a private A."""


def without_curve(tested: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a test what a table does not need."""
    kept = ("test", "knows", "auroc", "tpr", "members", "others")
    return {
        **{name: tested[name] for name in kept},
        "clients": {name: one["auroc"][0] for name, one in tested["clients"].items()},
    }


def pick(line: Line, part: str, **wanted: str) -> dict[str, Any] | None:
    """Find an entry of a part of a line by its test and attacker."""
    return next((one for one in line[part] if all(one[name] == value for name, value in wanted.items())), None)


def collect(lines: Sequence[Line], part: str, read: Any, **wanted: str) -> list[float]:
    """Collect a number of all seeds that have it."""
    found = [pick(line, part, **wanted) for line in lines]
    return [read(one) for one in found if one is not None]


def list_attackers(lines: Sequence[Line]) -> list[str]:
    """List who attacks in these lines."""
    return [who for who in WHO if any(pick(line, "membership", test="loss", knows=who) for line in lines)]


def of_seeds(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Write a mean with its standard deviation over seeds."""
    if not values:
        return "–"
    found = spread([scale * value for value in values])
    around = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:.{digits}f}{around}"


def tabulate_setting(setting: str, variants: Sequence[str], lines: Sequence[Line]) -> Table:
    """Tabulate a setting: a row for every variant and attacker."""
    rows = []
    for variant in variants:
        own = [line for line in lines if line["setting"] == setting and line["variant"] == variant]
        attackers = list_attackers(own)
        for who in attackers:
            named = "all is known" if attackers == ["start"] else KNOWN[who]
            tested = {test: {"test": test, "knows": who} for test in ("loss", "projection", "span")}
            rows.append(
                (
                    f"{variant} ({own[0]['shares']})",
                    named,
                    of_seeds(collect(own, "membership", lambda one: one["auroc"][0], **tested["loss"])),
                    of_seeds(collect(own, "membership", lambda one: one["auroc"][0], **tested["projection"])),
                    of_seeds(collect(own, "membership", lambda one: one["auroc"][0], **tested["span"])),
                    of_seeds(collect(own, "membership", lambda one: one["tpr"][0], **tested["projection"]), 100, 1),
                    of_seeds(collect(own, "attribution", lambda one: one["top"][0], **tested["projection"]), 100, 1),
                    of_seeds(collect(own, "attribution", lambda one: one["top"][0], **tested["span"]), 100, 1),
                    of_seeds(collect(own, "reconstruction", lambda one: one["batch"], knows=who), 100, 1),
                    of_seeds(collect(own, "reconstruction", lambda one: one["unrelated"], knows=who), 100, 1),
                )
            )
    of_setting = [line for line in lines if line["setting"] == setting]
    control = collect(of_setting, "membership", lambda one: one["auroc"][0], test="base")
    chances = collect(of_setting, "attribution", lambda one: one["chance"], test="projection")
    randoms = collect(of_setting, "reconstruction", lambda one: one["random"])
    note = (
        f"Mean ± standard deviation over {len({line['seed'] for line in of_setting})} seeds; AUROC 0.5 is chance, the "
        f"bare base's loss has {of_seeds(control)}. By chance the first row is in the batch in "
        f"{of_seeds(chances, 100, 1)} %; a random span holds {of_seeds(randoms, 100, 1)} % of the inputs."
    )
    columns = (
        "what is shared", "private factor", "AUROC, loss", "AUROC, projection", "AUROC, span",
        "TPR at 1 % FPR by projection, %",
        "batch by projection, %", "batch by span, %", "inputs in span, %", "unrelated in span, %",
    )  # fmt: skip
    return Table(NAMES[setting], columns, tuple(rows), note=note)


def score_clients(lines: Sequence[Line], setting: str, variant: str, test: str, who: str) -> BySeed:
    """Return the AUROC of every client by seed."""
    found = {
        line["seed"]: pick(line, "membership", test=test, knows=who)
        for line in lines
        if line["setting"] == setting and line["variant"] == variant
    }
    return {seed: one["clients"] for seed, one in found.items() if one is not None}


def tabulate_differences(settings: Sequence[str], variants: Sequence[str], lines: Sequence[Line]) -> Table:
    """Tabulate plora's AUROC minus the others', as the server attacks, paired by client and seed."""
    rows = []
    for setting in settings:
        for variant in variants:
            if variant == FIRST:
                continue
            differences = [
                compare_paired(
                    score_clients(lines, setting, FIRST, test, "start"),
                    score_clients(lines, setting, variant, test, "start"),
                )
                for test in TESTS
            ]
            rows.append((f"{setting}: {FIRST} − {variant}", *map(format_paired, differences)))
    note = (
        "AUROC of a client times 100, the server alone attacking, on the same clients and seeds; 95 % t-interval over "
        "seeds. Below zero: B alone, with a private A, tells less."
    )
    return Table("Does B alone leak less?", ("difference", *(f"by {test}" for test in TESTS)), tuple(rows), note=note)


def draw(settings: Sequence[str], variants: Sequence[str], lines: Sequence[Line]) -> Figure:
    """Draw the AUROC of both tests for every variant and attacker: dots are seeds, bars their means."""
    with theme.style():
        figure, axes = theme.make_figure(
            9.5, 1.0 + 0.9 * len(variants) * len(settings) / 2, len(TESTS), len(settings), sharex=True, sharey=True
        )
        for number, setting in enumerate(settings):
            for place, test in enumerate(TESTS):
                ax = axes[len(TESTS) * number + place]
                _draw_panel(ax, variants, [line for line in lines if line["setting"] == setting], test)
                ax.set_title(f"{setting}, by {test}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        axes[0].set_ylim(len(variants) - 0.5, -0.5)
        for ax in axes[-len(TESTS) :]:
            ax.set_xlabel("AUROC of membership")
        return figure


def _draw_panel(ax: Any, variants: Sequence[str], lines: Sequence[Line], test: str) -> None:
    for row, variant in enumerate(variants):
        own = [line for line in lines if line["variant"] == variant]
        for shift, who in enumerate(WHO):
            values = collect(own, "membership", lambda one: one["auroc"][0], test=test, knows=who)
            height = row + 0.22 * (shift - 1)
            look = {"color": theme.SERIES[shift], "marker": theme.MARKERS[shift]}
            name = {"start": "server alone", "others": "with other clients", "own": "with the private factor"}[who]
            ax.scatter(values, [height] * len(values), s=14, label=name if row == 0 else None, **look)
            if values:
                ax.plot([np.mean(values)] * 2, [height - 0.1, height + 0.1], color=theme.SERIES[shift])
    control = collect(lines, "membership", lambda one: one["auroc"][0], test="base")
    ax.axvline(0.5, color=theme.MUTED, linewidth=1, linestyle=theme.DOTTED)
    if control:
        ax.axvline(float(np.mean(control)), color=theme.MUTED, linewidth=1, linestyle=theme.LEVEL)
    theme.name_rows(ax, variants)


def write(lines: Sequence[Line], folder: Path, settings: Sequence[str], variants: Sequence[str], command: str) -> None:
    """Write `message_leakage.json`, `.md` and `.png` into a folder, and print the tables."""
    if not lines:
        raise SystemExit("nothing has been measured yet")
    folder.mkdir(parents=True, exist_ok=True)
    settings = [setting for setting in settings if any(line["setting"] == setting for line in lines)]
    environment = {key: value for key, value in describe_environment().items() if key != "time"}
    content = {"command": command, **environment, "lines": lines}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "message_leakage.json").write_text(text + "\n", encoding="utf-8")
    tables = [tabulate_setting(setting, variants, lines) for setting in settings]
    tables.append(tabulate_differences(settings, variants, lines))
    words = "\n\n".join([*map(to_markdown, tables), f"Made by `{command}`."]) + "\n"
    (folder / "message_leakage.md").write_text(words, encoding="utf-8")
    theme.save_png(draw(settings, variants, lines), folder / "message_leakage.png")
    print(words)
