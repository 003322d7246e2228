"""Reports: honest sentences, one page that stands alone, and the same in Markdown."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import CLIENTS, METHODS, write_comparison, write_many, write_run

from fedvlm_jax.errors import UserError
from fedvlm_jax.runs.config import Run
from fedvlm_jax.runs.folders import read_comparison
from fedvlm_jax.runs.report import write_report
from fedvlm_jax.runs.tables import tabulate_comparison
from fedvlm_jax.runs.wording import describe_comparison

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Balance(HTMLParser):
    """Checks that tags are closed in order, and that ids differ."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: Path) -> str:
    """Read a page after checking that it is well formed and asks nothing of the network."""
    text = page.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert len(set(balance.ids)) == len(balance.ids)
    for outside in ("http:", "https:", "@import", "<script", "<link", "url(/"):
        assert outside not in text
    assert all(source.startswith('"data:image/png;base64,') for source in text.split("src=")[1:])
    assert "prefers-color-scheme" in text
    return text


def make_scores(difference: float, wobble: float = 0.0) -> dict[int, dict[str, float]]:
    """Give three seeds of 16 clients, all `difference` from .5, with the seeds `wobble` apart."""
    return {seed: dict.fromkeys(CLIENTS, 0.5 + difference + (seed - 1) * wobble) for seed in range(3)}


def say_against_local(folder: Path, difference: float, wobble: float) -> list[str]:
    """Say what a comparison of plora with local came to."""
    scores = {"local": make_scores(0.0), "plora": make_scores(difference, wobble)}
    return describe_comparison(read_comparison(write_comparison(folder, scores, make_scores(-0.4))))


def test_a_run_s_page_tells_how_it_was_made(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5}, curve=(0.2, 0.3))
    (folder / "adapters" / "clients").mkdir(parents=True)
    (folder / "adapters" / "shared.safetensors").touch()
    page = check_page(write_report([folder]))
    for told in (
        "florence2-nano on emoji, seed 0",
        "plora: pLoRA, the method of FedVLM (arXiv 2507.17088): B is averaged at the server, A stays with its client.",
        "Rows of all clients: 1,960 for training, 320 for validation, 640 for test.",
        "On 2 × TPU v5e; Linux, 2 cores.",
        "Started 2026-11-28 23:10:00+00:00; its rounds took 6.0 s in all.",  # four rounds of 1.5 s
        f"<code>{folder}/adapters</code>",
        "<code>shared.safetensors</code>",
        "<pre>fedvlm train --seed 3</pre>",
    ):
        assert told in page, told


def test_a_comparison_s_page_names_model_and_data(tmp_path: Path) -> None:
    scores = {"local": make_scores(0.0), "plora": make_scores(0.1)}
    page = check_page(write_report([write_comparison(tmp_path / "c", scores, make_scores(-0.4))]))
    assert '<p class="sub">florence2-nano on emoji, 16 clients, seeds 0, 1, 2; ' in page


def test_nobody_is_fair_who_gives_nothing(tmp_path: Path) -> None:
    page = check_page(write_report([write_run(tmp_path / "r", {"a": 0.0, "b": 0.0}, {"a": 0.2, "b": 0.2})]))
    assert '<td data-label="Jain">–</td>' in page
    assert page.count('<td data-label="Jain">1.000</td>') == 1  # of the personal models, which are alike


def test_a_losing_method_is_said_to_lose(tmp_path: Path) -> None:
    # Differences of the seeds: −.06, −.05, −.04: mean −.05, standard error .00577, t(2) 4.303: −.0748 to −.0252.
    said = say_against_local(tmp_path / "c", -0.05, 0.01)
    expected = "plora loses to local by 5.0 points (95 % interval −7.5 to −2.5; ahead in 0 of 3 seeds)."
    assert expected in said
    assert "The highest mean on test is that of local, 50.0 %, ahead of plora with 45.0 %." in said


def test_a_difference_inside_its_interval_is_said_to_be_noise(tmp_path: Path) -> None:
    # −.01, .02, .05: mean .02, standard error .01732, so ± .0745.
    said = say_against_local(tmp_path / "c", 0.02, 0.03)
    assert said[0].endswith("its lead over local (50.0 %) is within the noise.")
    assert said[1] == (
        "plora and local cannot be told apart: the difference of +2.0 points lies inside the noise "
        "(95 % interval −5.5 to +9.5; ahead in 2 of 3 seeds)."
    )


def test_a_clear_lead_is_said_to_be_one(tmp_path: Path) -> None:
    said = say_against_local(tmp_path / "c", 0.05, 0.01)
    assert "plora is ahead of local by 5.0 points (95 % interval +2.5 to +7.5; ahead in 3 of 3 seeds)." in said


def test_few_seeds_are_told(tmp_path: Path) -> None:
    one = {0: make_scores(0.0)[0]}
    record = read_comparison(write_comparison(tmp_path / "c", {"local": one, "plora": one}, one))
    assert describe_comparison(record)[-1].startswith("There is one seed")
    assert "over clients (one seed only)" in tabulate_comparison(record)[0].note


def test_the_report_of_a_comparison_has_everything(tmp_path: Path) -> None:
    names = ("local", "fedavg-lora", "fedavg-lora+ft", "plora")
    scores = {name: make_scores(0.01 * number, 0.01) for number, name in enumerate(names)}
    folder = write_comparison(tmp_path / "c", scores, make_scores(-0.4))
    text = check_page(write_report([folder]))
    assert "fedvlm compare --seeds 2 --data.prompt client-language" in text
    assert "abc1234" in text
    assert "against fedavg-lora+ft" in text
    assert text.count("<svg") == 12
    for name in ("methods", "clients", "gains", "pareto", "curves", "health"):
        assert (folder / "figures" / f"{name}.png").is_file()
        assert f"figures/{name}.png" in (folder / "report.md").read_text()


@pytest.mark.slow  # it draws every picture of 25 methods; test_many_methods.py looks at each
def test_a_loss_within_the_noise_is_no_verdict(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.5})
    text = check_page(write_report([folder]))
    assert "So plora lost here" not in text
    assert "That is inside the noise" in text
    text = check_page(write_report([write_run(tmp_path / "one", {"a": 0.5}, {"a": 0.25})]))
    assert "That is inside the noise" not in text
    assert "From one client, so without an interval." in text


def test_a_run_that_was_trained_longer_does_not_say_that_test_was_read_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", {"a": 0.2, "b": 0.3}, {"a": 0.5, "b": 0.5})
    assert "test was read once." in check_page(write_report([folder]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "longer": [{"from": 4, "to": 6}]}))
    assert "test was read then, and after round 4 before." in check_page(write_report([folder]))


@pytest.mark.broad
def test_many_methods_are_summed_up_on_a_page_that_can_be_sent(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "c")
    page = write_report([folder])
    text = check_page(page)
    assert page.stat().st_size < 3_000_000
    said = describe_comparison(read_comparison(folder))
    assert len(said) == 4
    assert said[1].startswith(
        "Against local, in points, by 95 % intervals without a correction for their number; ahead"
    )
    names = [row[0] for row in tabulate_comparison(read_comparison(folder))[0].rows]
    assert set(names) == {"zero-shot", *METHODS}
    assert names[-1] == "zero-shot", "the best comes first"
    assert text.count("<div><b>") == 6, "the five best, and local"


def test_a_run_that_made_things_worse_says_so(tmp_path: Path) -> None:
    run = Run(seed=7, method="plora")
    folder = write_run(tmp_path / "r", {"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 0.25, "b": 0.26, "c": 0.24}, run)
    text = check_page(write_report([folder]))
    assert "So plora lost here" in text
    assert "0 of 3 clients gained, 3 lost." in text
    assert "<code>fedvlm compare</code>" in text
    assert "<dd class=marked>7</dd>" in text
    assert "0.10.2" in text


@pytest.mark.broad
def test_several_runs_stand_side_by_side_without_a_verdict(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "x", {"a": 0.1}, {"a": 0.5}),
        write_run(tmp_path / "y", {"a": 0.1}, {"a": 0.6}, Run(method="local")),
    ]
    page = write_report(folders)
    assert page == tmp_path / "report-x-and-1-more" / "report.html"
    text = check_page(page)
    assert "The highest mean is that of y (local): 60.0 %." in text
    assert "no interval is given" in text


def test_client_names_cannot_break_the_page(tmp_path: Path) -> None:
    name = '<script>"&$x_{$'
    check_page(write_report([write_run(tmp_path / "r", {name: 0.1}, {name: 0.5})]))


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", {"a": 0.1}, {"a": 0.5})
    comparison = write_comparison(tmp_path / "c", {"local": {0: {"a": 0.5}}}, {0: {"a": 0.1}})
    with pytest.raises(UserError, match="by itself"):
        write_report([run, comparison])
    with pytest.raises(UserError, match="given twice"):
        write_report([run, run.parent / ".." / run.parent.name / run.name])
    with pytest.raises(UserError, match="needs the folder"):
        write_report([])
    with pytest.raises(UserError, match="no such folder"):
        write_report([tmp_path / "nowhere"])
    (comparison / "comparison.json").write_text(json.dumps({"methods": []}))
    with pytest.raises(UserError, match="'seeds' is missing"):
        write_report([comparison])
