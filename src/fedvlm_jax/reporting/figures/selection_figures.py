"""How much of each client's updates a pool took, against how unlike the others' its data are."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.run_dir.reader import RunRecord

NAMED = 3
"""Clients that are no attackers and are named, those of whom least was taken; of equals the most unlike the others."""
LETTERS = 22


def draw_selection(record: RunRecord, target: Path, prefix: str = "") -> list[theme.Picture]:
    """Draw and save the selection of a run's clients; nothing where its pool does not choose, or data are unknown."""
    taken, apart = average_selection(record), record.answer_distances
    if not set(taken) & set(apart):
        return []
    caption = theme.CAPTIONS["run"]["selection"].format(pool=record.pool)
    return [theme.save_picture(draw(record), target, f"{prefix}selection", caption)]


def average_selection(record: RunRecord) -> dict[str, float]:
    """Average each client's selection over the rounds in which it counted."""
    found: dict[str, list[float]] = {}
    for line in record.rounds:
        for name, value in (line.get("selection") or {}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


@theme.style()
def draw(record: RunRecord) -> Figure:
    """Draw a dot for every client and a cross for every attacker, these and the least taken with their names."""
    taken, apart, attackers = average_selection(record), record.answer_distances, set(record.attackers)
    names = [name for name in taken if name in apart]
    figure, (ax,) = theme.make_figure(theme.WIDE, 3.6)
    honest = sorted((name for name in names if name not in attackers), key=lambda name: (taken[name], -apart[name]))
    hostile = [name for name in names if name in attackers]
    _scatter(ax, honest, taken, apart, color=theme.SERIES[0], marker="o", s=42, alpha=0.8)
    _scatter(ax, hostile, taken, apart, color=theme.SERIES[3], marker="X", s=80)
    ax.set(ylim=(-6, 106), xlabel="distance of the client's answers to the others', %", xlim=_find_limits(names, apart))
    ax.set_title("Taken of a client's updates, %")
    ax.grid(axis="y")
    ax.grid(visible=False, axis="x")
    ax.tick_params(labelsize=9)
    named = [*((name, True) for name in hostile), *((name, False) for name in honest[:NAMED])]
    texts = [
        theme.Name(theme.fit_name(name, LETTERS), 100 * apart[name], 100 * taken[name], strong)
        for name, strong in (named if len(named) <= theme.MANY + NAMED else named[-NAMED:])
    ]
    theme.name_beside(figure, [(ax, texts)], 9)
    return figure


def _find_limits(names: list[str], apart: Mapping[str, float]) -> tuple[float, float]:
    values = [100 * apart[name] for name in names]
    room = max(2.0, 0.08 * (max(values) - min(values)))
    return max(-2.0, min(values) - room), min(102.0, max(values) + room)


def _scatter(
    ax: object, names: list[str], taken: Mapping[str, float], apart: Mapping[str, float], **look: object
) -> None:
    ax.scatter(  # type: ignore[attr-defined]
        [100 * apart[name] for name in names], [100 * taken[name] for name in names], zorder=3, clip_on=False, **look
    )
