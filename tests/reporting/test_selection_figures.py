"""The picture of whose updates a rule took: what it shows, in the page's colours, with names of any kind."""

import json
import re
import warnings

import numpy as np
import pytest
from made_up import write_run

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.answer_distances import measure_answer_distances
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.reporting.figures import selection_figures
from fedvlm_jax.reporting.sentences import describe_attack
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.run_dir.stored_baseline import read_baseline


def write(folder, selections, attackers=("c",), distances=None, names=("a", "b", "c", "d", "e")):
    run = Run(messages=MessageOptions(pool="krum"))
    write_run(folder, dict.fromkeys(names, 0.1), dict.fromkeys(names, 0.5), run)
    config = json.loads((folder / "config.json").read_text())
    distances = dict(zip(names, np.linspace(0.2, 0.8, len(names)), strict=True)) if distances is None else distances
    config["resolved"] |= {"attackers": list(attackers), "answer_distances": distances}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, selection in zip(lines, selections, strict=False):
        line |= {"pool": "krum", "selection": selection, "left_out": [n for n, v in selection.items() if v == 0]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_dots_stand_at_distance_and_mean_selection_and_attackers_are_crosses(tmp_path):
    selections = [{"a": 1, "b": 0, "c": 0, "d": 0.5, "e": 1}, {"a": 1, "b": 0.5, "c": 0}]
    record = read_run(write(tmp_path / "r", selections))
    assert selection_figures.average_selection(record) == {"a": 1, "b": 0.25, "c": 0, "d": 0.5, "e": 1}
    (ax,) = selection_figures.draw(record).axes
    honest, hostile = (np.asarray(part.get_offsets()).round(6).tolist() for part in ax.collections)
    assert hostile == [[50, 0]]
    assert honest == [[35, 25], [65, 50], [80, 100], [20, 100]]  # least taken, then most unlike, first
    assert {text.get_text() for text in ax.texts} == {"c", "b", "d", "e"}
    assert [text.get_text() for text in ax.texts if text.get_weight() == "bold"] == ["c"]


def test_of_equals_the_most_unlike_are_named(tmp_path):
    """Krum takes one client of a round: which of the others was first in the table says nothing."""
    record = read_run(write(tmp_path / "r", [{"a": 0, "b": 0, "c": 0, "d": 0, "e": 0}], attackers=()))
    assert {text.get_text() for text in selection_figures.draw(record).axes[0].texts} == {"c", "d", "e"}


def test_the_picture_is_in_the_page_s_colours_and_says_what_it_cannot_show(tmp_path):
    (picture,) = selection_figures.draw_selection(read_run(write(tmp_path / "r", [{"a": 1, "c": 0}])), tmp_path)
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture.svg)) == set()
    texts = re.findall(r"<text[^>]*>", picture.svg)
    assert texts
    assert all("var(--" in text for text in texts)
    # A page is 36 rem wide at the least, so a point is a pixel there: letters are of eight or more.
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*?([\d.]+)px", picture.svg)]
    assert sizes
    assert min(sizes) >= 8
    assert "cannot tell an attacker from a client whose data are unusual" in picture.caption
    assert (tmp_path / "figures" / "selection.png").is_file()


@pytest.mark.parametrize("name", ["\x1b[2Ja\u202eb\n" * 20, "W" * 250, "東" * 80])
def test_long_names_leave_room(name, tmp_path):
    names = tuple(f"{name}{number}" for number in range(3))
    record = read_run(write(tmp_path / "r", [dict.fromkeys(names, 0.5)], names[:1], names=names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (picture,) = selection_figures.draw_selection(record, tmp_path)
    assert "\x1b" not in picture.svg
    (ax,) = selection_figures.draw(record).axes
    assert ax.get_window_extent().width > 0.5 * ax.figure.bbox.width


def test_hundreds_of_clients_are_a_picture_of_one_page(tmp_path):
    names = tuple(f"client-{number}" for number in range(400))
    record = read_run(write(tmp_path / "r", [dict.fromkeys(names, 0.5)], names[:40], names=names))
    figure = selection_figures.draw(record)
    assert figure.get_size_inches()[1] < 5
    assert len(figure.axes[0].texts) <= 12


def test_a_run_of_the_mean_has_no_picture(tmp_path):
    assert selection_figures.draw_selection(read_run(write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5})), tmp_path) == []
    assert describe_attack(read_run(tmp_path / "r")) == []


def test_sentences_say_who_attacked_and_how_often_a_backdoor_opens(tmp_path):
    folder = write(tmp_path / "r", [{"a": 1, "c": 0}])
    results = json.loads((folder / "results.json").read_text())
    results["attack"] = {"kind": "backdoor", "target": "a\x1bcat", "with_mark": {"a": 0.5}, "without_mark": {"a": 0.0}}
    (folder / "results.json").write_text(json.dumps(results))
    config = json.loads((folder / "config.json").read_text())
    config["run"]["participation"] |= {"attack": "backdoor", "attackers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    attack, backdoor, rule, left = describe_attack(read_run(folder))
    assert attack.startswith("Simulated attackers (backdoor): c. No score")
    assert "50.0" in backdoor
    assert "\x1b" not in backdoor
    assert rule.endswith("the server took: krum.")
    assert left == "Of 2 clients a round 1 gave nothing to it, on average."


def test_a_baseline_without_the_attack_stands_beside_a_run_with_it(tmp_path):
    scores = {"a": 0.1, "b": 0.2}
    attacked = Run(participation=ParticipationOptions(attack="scale", attackers=1))
    folder = write_run(tmp_path / "r", scores, scores, attacked)
    alone = Run(method="local", participation=ParticipationOptions(attackers=1))
    write_run(folder / "baseline", scores, scores, alone)
    assert read_baseline(read_run(folder)).method == "local"
    config = json.loads((folder / "baseline" / "config.json").read_text())
    config["run"]["participation"]["attackers"] = 2
    (folder / "baseline" / "config.json").write_text(json.dumps(config))
    assert read_baseline(read_run(folder)) is None


@pytest.mark.parametrize(
    ("key", "value"), [("selection", {"a": "x"}), ("left_out", "a"), ("pool", 3), ("pool_withstands", "x")]
)
def test_a_damaged_line_is_named(key, value, tmp_path):
    folder = write(tmp_path / "r", [{"a": 1}])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {key: value}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=f"metrics.jsonl, line 1: {key}"):
        read_run(folder)


def test_distances_of_answers_by_hand():
    """Tokens 1 and 2 in every answer; a says 5 5, b says 5 6, c says 7 7."""
    from messages.test_attacks import make_examples

    examples = make_examples([0] * 6, [2, 2, 2])
    examples.labels = np.asarray([[1, 5, 2], [1, 5, 2], [1, 5, 2], [1, 6, 2], [1, 7, 2], [1, 7, 2]], np.int32)
    found = measure_answer_distances(examples)
    # a: (1, 0, 0) against (1/4, 1/4, 1/2); b: (1/2, 1/2, 0) against (1/2, 0, 1/2); c shares nothing.
    assert found == pytest.approx({"c0": 0.75, "c1": 0.5, "c2": 1.0})
    examples.clients = examples.clients[:1]
    assert measure_answer_distances(examples) == {}
