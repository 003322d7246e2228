"""Twenty-five methods and sixteen clients in every picture: no two names cover each other, and none is missing."""

import itertools
from typing import Any

import numpy as np
import pytest
from made_up import CLIENTS, METHODS, write_many
from matplotlib.text import Text

from fedvlm_jax.reporting.figures import comparison_figures, cost_pareto_figures, diagnostics_figures
from fedvlm_jax.reporting.figures.round_lines import read_rounds
from fedvlm_jax.reporting.figures.theme import spread_apart
from fedvlm_jax.run_dir.reader import ComparisonRecord, read_comparison


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> ComparisonRecord:
    return read_comparison(write_many(tmp_path_factory.mktemp("many") / "c"))


def check_apart(figure: Any, ax: Any, names: set[str]) -> None:
    """All names are there, inside the picture, and cover each other by less than a pixel."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    # Of the text alone: an annotation's own extent has its line in it.
    boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in ax.texts if text.get_text() in names}
    assert set(boxes) == names
    width, height = figure.get_size_inches() * figure.dpi
    for name, box in boxes.items():
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1, name
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        slack = 0.2 * min(a.height, b.height)  # a text's box has room above its letters
        assert wide <= 1 or high <= 1 + slack, f"{one} covers {other}"


def test_names_beside_points_are_apart(record: ComparisonRecord) -> None:
    costs = cost_pareto_figures.read_costs(record, read_rounds(record))
    figure = cost_pareto_figures.draw_pareto(costs, "exact_match")
    check_apart(figure, figure.axes[0], set(METHODS))


@pytest.mark.broad
def test_names_at_the_ends_of_lines_are_apart(record: ComparisonRecord) -> None:
    figure = diagnostics_figures.draw_method_health(read_rounds(record))
    assert len(figure.axes) == 4
    for ax in figure.axes[:3]:
        check_apart(figure, ax, set(METHODS) - {"fedavg-lora+ft"})


def test_rows_and_panels_have_all_methods_the_best_first(record: ComparisonRecord) -> None:
    left, right = comparison_figures.draw_methods(record).axes
    rows = [label.get_text() for label in left.get_yticklabels()][::-1]
    assert set(rows) == {"zero-shot", *METHODS}
    assert rows[-1] == "zero-shot"
    figures = [float(text.get_text()) for text in left.texts][::-1]
    assert figures == sorted(figures, reverse=True)
    assert len(right.texts) == 26
    curves = cost_pareto_figures.read_curves(record, read_rounds(record))
    panels = cost_pareto_figures.draw_curves(curves, "exact_match").axes
    assert [ax.get_title(loc="left") for ax in panels] == rows[:-1]
    cells = comparison_figures.draw_heatmap(record).axes[0]
    assert [label.get_text() for label in cells.get_yticklabels()][::-1] == rows
    assert [label.get_text() for label in cells.get_xticklabels()] == sorted(CLIENTS)
    assert len(cells.texts) == 26 * 16


def test_gains_by_hand(record: ComparisonRecord) -> None:
    found = comparison_figures.read_gains(record)
    assert "local" not in found
    own = found["plora"]  # .004 · 3 above local in every seed, on the same pattern
    assert own.mean == pytest.approx(np.full(16, 1.2))
    assert own.low == pytest.approx(own.mean)
    figure = comparison_figures.draw_method_gains(found, "exact_match")
    assert len([ax for ax in figure.axes if ax.get_title(loc="left")]) == 24


def test_heights_are_moved_apart() -> None:
    # Three at .5 must be .2 apart: .3, .5, .7. The fourth gives way to the third, which may be pushed as far as .9.
    assert spread_apart([0.5, 0.5, 0.5, 0.95], 0.2) == pytest.approx([0.3, 0.5, 0.7, 1.0])
    assert spread_apart([0.1, 0.4, 0.9], 0.2) == pytest.approx([0.1, 0.4, 0.9]), "far enough from each other already"
    assert spread_apart([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1]), "not below the axis"
    assert spread_apart([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0]), "nor above"
    assert spread_apart([0.1, 0.2, 0.9], 0.9) == pytest.approx([0.0, 0.5, 1.0]), "no room: what gap there is"
    assert spread_apart([], 0.1).size == 0
