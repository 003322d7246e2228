"""Pictures: they show the numbers they are given, and their SVG follows the page's colours."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_up import CLIENTS, write_comparison, write_run
from PIL import Image
from rich.cells import cell_len

from fedvlm_jax.reporting.figures import (
    comparison_figures,
    cost_pareto_figures,
    cross_client_heatmap,
    diagnostics_figures,
    run_figures,
    theme,
)
from fedvlm_jax.reporting.figures.round_lines import read_rounds
from fedvlm_jax.reporting.figures.run_figures import draw_run
from fedvlm_jax.reporting.figures.theme import choose_series, save_png, to_svg
from fedvlm_jax.run_dir.reader import read_comparison, read_run


def test_clients_are_sorted_and_stand_at_their_scores(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 0.9, "b": 0.4, "c": 0.5}))
    (ax,) = run_figures.draw_clients(record).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c", "a"]
    rings, dots = (np.asarray(collection.get_offsets()) for collection in ax.collections[-2:])
    assert rings[:, 0] == pytest.approx([20, 30, 10])
    assert dots[:, 0] == pytest.approx([40, 50, 90])
    assert {text.get_text() for text in ax.texts} == {"zero-shot 20.0", "personal 60.0"}


def test_rounds_show_validation_before_and_after_redistribution(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}, curve=(0.2, 0.3)))
    left = run_figures.draw_rounds(record).axes[0]
    assert list(left.lines[0].get_xdata()) == [2, 4]
    assert left.lines[0].get_ydata() == pytest.approx([20, 30])
    assert left.lines[1].get_ydata() == pytest.approx([18, 28])


def test_what_was_before_redistribution_has_one_style_in_all_pictures(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}, curve=(0.2, 0.3)))
    after, before = run_figures.draw_rounds(record).axes[0].lines[:2]
    (panel,) = [
        ax for ax in diagnostics_figures.draw_health(record).axes if ax.get_title(loc="left").startswith("Validation")
    ]
    assert list(panel.lines[0].get_ydata()) == pytest.approx([20, 30])  # after, then before
    for theirs, ours in zip(panel.lines, (after, before), strict=True):
        assert (theirs.get_linestyle(), theirs.get_color()) == (ours.get_linestyle(), ours.get_color())
    assert after.get_linestyle() == "-"
    assert before.get_linestyle() == "--"


def test_rounds_are_whole_numbers_on_every_axis(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}, curve=(0.3,)))
    for figure in (run_figures.draw_rounds(record), diagnostics_figures.draw_health(record)):
        figure.canvas.draw()
        for ax in figure.axes:
            if ax.get_xlabel() == "round":
                assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_a_png_has_an_opaque_paper(tmp_path: Path) -> None:
    """Ink is near black, so a transparent page would be unreadable on a dark one."""
    record = read_run(write_run(tmp_path / "r", {"a": 0.1, "b": 0.2}, {"a": 0.5, "b": 0.4}))
    (picture, *_) = draw_run(record, tmp_path, "")
    with Image.open(tmp_path / "figures" / f"{picture.name}.png") as png:
        pixels = np.asarray(png.convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert pixels[0, 0].tolist() == [255, 255, 255, 255]
    assert "fill: #ffffff" not in picture.svg  # the page's own paper shows through the SVG


def test_names_in_scripts_without_a_font_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theme, "_has_glyph", str.isascii)
    record = read_run(write_run(tmp_path / "r", {"東京": 0.1, "京都": 0.2}, {"東京": 0.5, "京都": 0.4}))
    figure = run_figures.draw_clients(record)
    theme.replace_missing(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["<4EAC><90FD>", "<6771><4EAC>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (picture, *_) = draw_run(record, tmp_path, "")
    assert "東京" in picture.svg


@pytest.mark.parametrize("name", ["\x1b[2Ja\u202eb | x\n" * 20, "W" * 250, "東" * 80, "a" * 30 + " " + "京" * 40])
def test_long_names_leave_room_for_the_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theme, "_has_glyph", str.isascii)
    monkeypatch.setattr(theme, "_list_families", lambda: ("DejaVu Sans",))
    others = {f"{name}{number}": 0.1 * number for number in range(3)}
    record = read_run(write_run(tmp_path / "r", others, dict.fromkeys(others, 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = draw_run(record, tmp_path, "")
    for picture in pictures:
        assert "\x1b" not in picture.svg
    shown = [label.get_text() for label in run_figures.draw_clients(record).axes[0].get_yticklabels()]
    assert len(set(shown)) == 3, "names differ at their ends"
    assert max(map(cell_len, shown)) <= 41


def test_curves_average_seeds_and_add_up_bytes(tmp_path: Path) -> None:
    # Accuracies of a made-up run end at its mean over clients: .4 and .6, so .5.
    scores = {"plora": {0: {"a": 0.4}, 1: {"a": 0.6}}, "local": {0: {"a": 0.5}, 1: {"a": 0.5}}}
    record = read_comparison(write_comparison(tmp_path / "c", scores, {0: {"a": 0.1}, 1: {"a": 0.1}}))
    curves = cost_pareto_figures.read_curves(record, read_rounds(record))
    left, right = cost_pareto_figures.draw_curves(curves, "exact_match").axes
    assert left.lines[0].get_ydata()[-1] == pytest.approx(50)
    assert right.lines[0].get_xdata()[-1] == pytest.approx(8 * 360_000 / 2**20)
    assert [text.get_text() for text in right.texts] == ["local: nothing sent"]


def test_methods_show_the_paired_difference(tmp_path: Path) -> None:
    scores = {
        "local": {0: {"a": 0.4, "b": 0.6}, 1: {"a": 0.5, "b": 0.7}},
        "plora": {0: {"a": 0.3, "b": 0.5}, 1: {"a": 0.4, "b": 0.6}},
    }
    record = read_comparison(write_comparison(tmp_path / "c", scores, {s: {"a": 0.1, "b": 0.1} for s in (0, 1)}))
    left, right = comparison_figures.draw_methods(record).axes
    assert {"45.0", "55.0", "10.0"} == {text.get_text() for text in left.texts}
    assert {"−10.0", "the yardstick", "−45.0, not drawn"} == {text.get_text() for text in right.texts}


def test_gains_stand_beside_their_mean_and_losses_are_square(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1, "b": 0.6, "c": 0.3}, {"a": 0.9, "b": 0.4, "c": 0.5}))
    (ax,) = run_figures.draw_gains(record).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c", "a"]
    _, dots, squares = ax.collections
    assert np.asarray(dots.get_offsets())[:, 0] == pytest.approx([20, 80])
    assert np.asarray(squares.get_offsets())[:, 0] == pytest.approx([-20])
    (label,) = (text.get_text() for text in ax.texts)
    assert label.startswith("mean +26.7 [")


def test_gains_of_a_run_show_each_client_s_interval(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1, "b": 0.6, "c": 0.3}, {"a": 0.9, "b": 0.4, "c": 0.5})
    results = json.loads((folder / "results.json").read_text())
    results["gain_intervals"] = {"exact_match": {"a": [0.7, 0.9], "c": [0.1, 0.3]}}
    (folder / "results.json").write_text(json.dumps(results))
    (ax,) = run_figures.draw_gains(read_run(folder)).axes
    lines = ax.collections[1].get_segments()  # rows are b, c, a
    assert [line[0].tolist() + line[1].tolist() for line in lines] == [
        pytest.approx([10, 1, 30, 1]), pytest.approx([70, 2, 90, 2])
    ]  # fmt: skip


def test_hundreds_of_clients_stay_a_picture_of_one_page(tmp_path: Path) -> None:
    many = {f"client-{number}": number / 300 for number in range(300)}
    record = read_run(write_run(tmp_path / "r", many, many))
    comparison = read_comparison(write_comparison(tmp_path / "c", {"local": {0: many}}, {0: many}))
    for figure in (run_figures.draw_clients(record), comparison_figures.draw_heatmap(comparison)):
        assert figure.get_size_inches()[1] < 8
        assert figure.axes[0].get_yticklabels() == []


def test_svg_takes_its_colours_and_size_from_the_page(tmp_path: Path) -> None:
    personal = dict.fromkeys(CLIENTS, 0.5)
    record = read_run(write_run(tmp_path / "r", dict.fromkeys(CLIENTS, 0.1), personal))
    svg, again, other = (to_svg(run_figures.draw_rounds(record), name, '<"') for name in "xxy")
    assert "var(--ink)" in svg
    assert "var(--s3)" in svg
    assert "http" not in svg
    assert svg.startswith('<svg viewBox="0 0 547.2 208.8" role="img" aria-label="&lt;&#34;">')
    ids, used = set(re.findall(r'id="([^"]*)"', svg)), set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg))
    assert used
    assert used <= ids
    assert svg == again
    assert not ids & set(re.findall(r'id="([^"]*)"', other)), "figures of one page share no ids"


@pytest.mark.broad
def test_black_and_other_fixed_colours_do_not_reach_the_page(tmp_path: Path) -> None:
    # What matplotlib draws in its own black would vanish on a dark page.
    scores = {"local": {0: dict.fromkeys(CLIENTS, 0.5)}, "plora": {0: dict.fromkeys(CLIENTS, 0.6)}}
    record = read_comparison(write_comparison(tmp_path / "c", scores, {0: dict.fromkeys(CLIENTS, 0.1)}))
    run = read_run(record.folder_of(record.runs[1]))
    pictures = [
        *run_figures.draw_run(run, tmp_path),
        *diagnostics_figures.draw_run_health(run, tmp_path),
        *comparison_figures.draw_comparison(record, tmp_path),
        *cost_pareto_figures.draw_costs(record, tmp_path),
        *diagnostics_figures.draw_comparison_health(record, tmp_path),
    ]
    assert len(pictures) == 10
    for picture in pictures:
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture.svg)) == set()
        texts = re.findall(r"<text[^>]*>", picture.svg)
        assert texts
        assert all("var(--" in text for text in texts)


def test_png(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}))
    save_png(run_figures.draw_clients(record), tmp_path / "deep" / "p.png")
    assert (tmp_path / "deep" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_methods_keep_their_colour() -> None:
    assert choose_series(["plora", "local"]) == {"plora": 3, "local": 0}
    assert choose_series(["other", "plora"]) == {"other": 0, "plora": 3}
    assert len(set(choose_series(["local", "x", "y", "plora"]).values())) == 4


def test_the_matrix_has_data_down_and_models_across(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1, "b": 0.1}, {"a": 0.5, "b": 0.4})
    results = json.loads((folder / "results.json").read_text())
    results["cross_clients"] = {"clients": ["a", "b"], "exact_match": [[0.5, 0.2], [0.3, 0.4]]}  # [model, data]
    (folder / "results.json").write_text(json.dumps(results))
    (ax,) = cross_client_heatmap.draw_matrix(read_run(folder)).axes
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(0, 1): "50", (1, 1): "30", (0, 0): "20", (1, 0): "40"}  # the first client's data on top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
