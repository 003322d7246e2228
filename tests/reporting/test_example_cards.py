"""Cards of examples: every answer with a sign, pictures inside the page, nothing that breaks it."""

import json
from pathlib import Path

import pytest
from made_up import write_comparison, write_run
from PIL import Image
from test_report import check_page

from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting.example_cards import read_cards
from fedvlm_jax.reporting.pages import render
from fedvlm_jax.reporting.report import write_report


def write_examples(folder: Path, question: str = "What is this?") -> None:
    said = {
        "zero_shot": {"text": "a dog", "exact_match": 0.0, "token_f1": 0.0},
        "global": {"text": "the cat", "exact_match": 0.0, "token_f1": 0.5},
        "personal": {"text": "Cat.", "exact_match": 1.0, "token_f1": 1.0},
    }
    entry = {"client": "a", "row": 3, "picture": "examples/00.png", "question": question, "answer": "cat"}
    (folder / "examples").mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "examples" / "00.png")
    (folder / "examples.json").write_text(json.dumps({"looked_at": {"a": 4}, "examples": [{**entry, "answers": said}]}))


@pytest.mark.broad
def test_the_report_of_a_run_shows_its_examples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5})
    write_examples(folder)
    text = check_page(write_report([folder]))
    assert text.count("data:image/png;base64,") == 1
    assert 'alt="Test picture of a"' in text
    for said in ("a dog", "the cat", "Cat.", "wrong", "token F1 50 %", "right", "✗", "≈", "✓"):
        assert said in text
    assert "from the first 4 test pictures of one client:" in text
    markdown = (folder / "report.md").read_text()
    assert "![Test picture of a](examples/00.png)" in markdown
    assert "personal model: Cat. (✓ right)" in markdown


@pytest.mark.broad
def test_a_comparison_shows_those_of_its_best_method(tmp_path: Path) -> None:
    scores = {"local": {0: {"a": 0.4}}, "plora": {0: {"a": 0.6}}}
    folder = write_comparison(tmp_path / "c", scores, {0: {"a": 0.1}})
    for run in ("local-0", "plora-0"):
        write_examples(folder / run)
    text = check_page(write_report([folder]))
    assert "Models of plora, seed 0." in text
    assert "(plora-0/examples/00.png)" in (folder / "report.md").read_text()


@pytest.mark.broad
def test_what_data_say_cannot_break_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5})
    write_examples(folder, '</dl><script>"' + "long " * 100)
    text = check_page(write_report([folder]))
    assert "&lt;/dl&gt;" in text
    assert "…" in render("cards.html.j2", cards=read_cards(folder)[0], note="")


def test_damaged_examples_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5})
    (folder / "examples.json").write_text('{"examples": [{}]}')
    with pytest.raises(UserError, match="the entry 'looked_at' is missing; is it damaged"):
        read_cards(folder)
