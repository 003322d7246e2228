"""Which pictures a report has, and what their captions say; each becomes a PNG file and two SVGs for the page."""

import warnings
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.reporting.figures import client_gains, comparison_figures, diagnostics, heatmaps, pareto, run_figures
from fedvlm_jax.reporting.figures.fonts import replace_missing, scripts
from fedvlm_jax.reporting.figures.theme import MANY, PAPER, PLACEHOLDERS, save_png, to_svg
from fedvlm_jax.reporting.html import Picture
from fedvlm_jax.training.run_dir.reader import ComparisonRecord, RunRecord

__all__ = ["draw_comparison", "draw_comparison_health", "draw_costs", "draw_run", "draw_run_health"]


def draw_run(record: RunRecord, target: Path, prefix: str) -> list[Picture]:
    """Draw what a run came to: clients, their gains, the cross-client matrix, and the way there."""
    clients = "Every client from zero-shot (ring) to its personal model (dot); dashed: means."
    pictures = [_draw(target, f"{prefix}clients", clients, lambda *how: run_figures.draw_clients(record, *how))]
    if set(record.scores("zero_shot")) & set(record.scores("personal")):
        gained = (
            "What every client gains with its personal model; squares lose. Dashed: the mean of clients; shaded: its "
            "95 % bootstrap interval over clients, which says nothing about other seeds. A client's own line is its "
            "95 % paired bootstrap interval over its test examples."
        )
        pictures.append(_draw(target, f"{prefix}gains", gained, lambda *how: run_figures.draw_gains(record, *how)))
    if record.metric in (record.results.get("cross_clients") or {}):
        cells = f"{find_measure(record.metric).label} of every client's model (across) on every client's test data, %."
        pictures.append(_draw(target, f"{prefix}matrix", cells, lambda *how: heatmaps.draw_matrix(record, *how)))
    if record.rounds:
        rounds = "Validation after each evaluated round; dashed: before redistribution; ring: the selected round."
        pictures.append(_draw(target, f"{prefix}rounds", rounds, lambda *how: run_figures.draw_rounds(record, *how)))
    return pictures


def draw_run_health(record: RunRecord, target: Path, prefix: str) -> list[Picture]:
    """Draw the health of a run's aggregation; nothing where its lines have none."""
    panels = diagnostics.list_panels([record.rounds], record.metric)
    if not panels:
        return []
    more = "Mean over the round's clients or their pairs. Encoder, decoder: the model's halves by themselves."
    caption = diagnostics.explain(panels, more)
    return [_draw(target, f"{prefix}health", caption, lambda *how: diagnostics.draw_health(record, *how))]


def draw_comparison(record: ComparisonRecord, target: Path) -> list[Picture]:
    """Draw what a comparison came to: all methods, method × client, and the gains of clients."""
    label = find_measure(record.metric).label
    clients = f"Test {label} per client, %, mean over seeds; bold, or a dot: the best of a client."
    pictures = [
        _draw(
            target,
            "methods",
            "Dots are clients, mean over seeds. First: accuracy, the bar is the mean of all. Then: differences to "
            "local training, with their mean and its 95 % interval.",
            lambda *how: comparison_figures.draw_methods(record, *how),
        ),
        _draw(target, "clients", clients, lambda *how: heatmaps.draw_heatmap(record, *how)),
    ]
    gained = client_gains.read_gains(record)
    if gained:
        intervals = (
            "lines: 95 % t-intervals over seeds, where they go beyond the axis they are cut; filled dots: the interval "
            "leaves out zero, which of twenty clients without any gain one does by chance"
            if len(record.seeds) > 1
            else "one seed only, so without intervals"
        )
        caption = (
            f"What every client gains over local training, mean over seeds; {intervals}. Triangle and figure: the mean "
            "of all clients."
        )
        pictures.append(
            _draw(target, "gains", caption, lambda *how: client_gains.draw_method_gains(gained, record.metric, *how))
        )
    return pictures


def draw_costs(record: ComparisonRecord, target: Path) -> list[Picture]:
    """Draw accuracy against rounds and bytes; nothing where no run's folder is there."""
    pictures = []
    costs = pareto.read_costs(record, comparison_figures.read_rounds(record))
    if any(cost.method != "zero-shot" for cost in costs):
        missing = sorted(set(record.methods) - {cost.method for cost in costs})
        caption = (
            "Test score against all bytes that a client sends and receives if it takes part in every round; mean over "
            "seeds, the line is ± one standard deviation over seeds. Methods that send nothing stand at the left. On "
            "the dashed stair, the Pareto front, are those that no other method matches for fewer bytes; it goes by "
            "the means, so small steps of it may be noise."
            + (f" Without their runs' folders: {', '.join(missing)}." if missing else "")
        )
        pictures.append(_draw(target, "pareto", caption, lambda *how: pareto.draw_pareto(costs, record.metric, *how)))
    curves = comparison_figures.read_curves(record)
    if curves:
        caption = (
            "Validation score on the way, mean over seeds; one panel per method, the others grey behind it, best on "
            "test first."
            if len(curves) > MANY
            else "Validation score on the way, over rounds and over bytes; mean over seeds."
        )
        pictures.append(
            _draw(target, "curves", caption, lambda *how: comparison_figures.draw_curves(curves, record.metric, *how))
        )
    return pictures


def draw_comparison_health(record: ComparisonRecord, target: Path) -> list[Picture]:
    """Draw the health of all methods' aggregation; nothing where no run's lines have any."""
    curves = comparison_figures.read_rounds(record)
    panels = diagnostics.list_panels([lines for runs in curves.values() for lines in runs], record.metric)
    if not panels:
        return []
    more = "One line per method, mean over seeds; with +ft or +knn after its name it has its federation's line."
    caption = diagnostics.explain(panels, more)
    return [_draw(target, "health", caption, lambda *how: diagnostics.draw_method_health(curves, record.metric, *how))]


def _draw(target: Path, name: str, caption: str, draw: Callable[..., Figure]) -> Picture:
    """Draw a picture three times: as a PNG file, and as wide and narrow SVG for the page."""
    with scripts():
        figure = draw(PAPER, False)
        replace_missing(figure)
        save_png(figure, target / "figures" / f"{name}.png")
        # A browser has fonts of its own, so the page keeps names as they are: matplotlib only measures them here.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            wide, narrow = (to_svg(draw(PLACEHOLDERS, slim), f"{name}-{slim:d}", caption) for slim in (False, True))
    return Picture(name, caption, wide, narrow)
