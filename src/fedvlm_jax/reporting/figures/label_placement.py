"""Names beside lines and points, moved apart until all can be read: five methods or thirty, without a legend."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["Label", "label_ends", "label_points", "spread_apart"]

DIRECTIONS = np.radians([30, -30, 0, 180, 150, -150, 90, -90, 60, -60, 120, -120, 15, -15, 165, -165])
"""Where a point's name is tried, in this order."""

DISTANCES = (7, 12, 18, 26, 36, 48, 62, 78, 96)
"""How far off, in points (1/72 inch)."""

LEADER = 10
"""A name farther off than this is joined to its point by a line."""


Point = tuple[float, float]


class Label(NamedTuple):
    """A name for the point (x, y) in data units."""

    name: str
    x: float
    y: float
    colour: str
    strong: bool = False


def spread_apart(places: Sequence[float], gap: float, low: float, high: float) -> Float[np.ndarray, " places"]:
    """Move places, as little as possible in the square, until neighbours are `gap` apart and all lie in `low` … `high`.

    With x_i = y_i + i·gap the task is an isotonic regression, which is pooled here. Where there is no room for all, the
    gap shrinks.
    """
    if not places:
        return np.empty(0)
    given = np.asarray(places, np.float64)
    gap = min(gap, (high - low) / max(len(given) - 1, 1))
    order = np.argsort(given, kind="stable")
    steps = gap * np.arange(len(given))
    pools: list[tuple[float, int]] = []  # mean and size, with rising means
    for value in given[order] - steps:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    moved = np.clip(np.repeat(*map(np.asarray, zip(*pools, strict=True))), low, max(low, high - steps[-1])) + steps
    result = np.empty_like(given)
    result[order] = moved
    return result


def label_ends(figure: Any, groups: Sequence[tuple[Any, Sequence[Label]]], size: float, quiet: str) -> None:
    """Write names in a column to the right of axes, each joined to its line's end by a thin line of colour `quiet`.

    The limits of y have to be final.
    """
    figure.draw_without_rendering()  # only then is it known how high the axes are
    for ax, labels in groups:
        _label_axes(ax, labels, size, quiet)


def _label_axes(ax: Any, labels: Sequence[Label], size: float, quiet: str) -> None:
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    ends = [float(ax.transAxes.inverted().transform(ax.transData.transform((one.x, one.y)))[1]) for one in labels]
    places = spread_apart(ends, 1.2 * size / height, 0.0, 1.0)
    for one, place in zip(labels, places, strict=True):
        ax.annotate(
            one.name,
            (one.x, one.y),
            xytext=(1.1, place),
            textcoords="axes fraction",
            va="center",
            color=one.colour,
            fontsize=size,
            weight="bold" if one.strong else "normal",
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": quiet,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def label_points(
    ax: Any, labels: Sequence[Label], size: float, quiet: str, lines: Sequence[tuple[Point, Point]] = ()
) -> None:
    """Write names beside their points, where they cover neither each other nor a point nor one of `lines`.

    A name takes the nearest free place, the strong ones first; one that finds none takes the place where it covers
    least. The limits have to be final.
    """
    figure = ax.figure
    figure.draw_without_rendering()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    room = ax.get_window_extent()
    points = np.asarray([ax.transData.transform((one.x, one.y)) for one in labels])
    radius = 3.5 * scale
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    for ends in lines:  # which run along the axes
        (x, y), (other_x, other_y) = ax.transData.transform(ends)
        taken.append((min(x, other_x) - 1, min(y, other_y) - 1, max(x, other_x) + 1, max(y, other_y) + 1))
    for number in sorted(range(len(labels)), key=lambda number: not labels[number].strong):
        one, (x, y) = labels[number], points[number]
        weight = "bold" if one.strong else "normal"
        text = ax.text(0, 0, one.name, fontsize=size, weight=weight, parse_math=False)
        extent = text.get_window_extent(renderer)
        text.remove()
        best: tuple[float, float, float] = (np.inf, 0, 0)
        for distance in DISTANCES:
            for direction in DIRECTIONS:
                shift = distance * scale * np.asarray([np.cos(direction), np.sin(direction)])
                box = _place(x + shift[0], y + shift[1], extent.width, 0.8 * extent.height, np.cos(direction))
                covered = sum(_overlap(box, other) for other in taken) + _outside(box, room)
                if covered < best[0] - 1e-9:
                    best = (covered, distance, float(direction))
            if best[0] <= 0:
                break
        _, distance, direction = best
        shift = distance * np.asarray([np.cos(direction), np.sin(direction)])
        taken.append(
            _place(x + scale * shift[0], y + scale * shift[1], extent.width, 0.8 * extent.height, np.cos(direction))
        )
        line = {"arrowstyle": "-", "color": quiet, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(
            one.name,
            (one.x, one.y),
            xytext=tuple(shift),
            textcoords="offset points",
            ha=_align(np.cos(direction)),
            va="center",
            color=one.colour,
            fontsize=size,
            weight=weight,
            parse_math=False,
            arrowprops=line if distance > LEADER else None,
        ).set_in_layout(False)


Box = tuple[float, float, float, float]


def _align(cosine: float) -> str:
    return "left" if cosine > 0.3 else "right" if cosine < -0.3 else "center"


def _place(x: float, y: float, width: float, height: float, cosine: float) -> Box:
    """The box of a text that hangs on (x, y) as `_align` says, centred in y."""
    left = {"left": x, "center": x - width / 2, "right": x - width}[_align(cosine)]
    return left, y - height / 2, left + width, y + height / 2


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box, room: Any) -> float:
    """How much of a box leaves the axes; it weighs as much as covering another text."""
    inside = _overlap(box, (room.x0, room.y0, room.x1, room.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - inside
