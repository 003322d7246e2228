"""Terminals as they are, and texts of others that would play with them."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import write_many, write_run
from rich.console import Console

from fedvlm_jax.cli._process.signals import say
from fedvlm_jax.reporting.tables import Table, show, to_markdown
from fedvlm_jax.utils.console import Terminal
from fedvlm_jax.utils.progress_display import PlainProgress
from fedvlm_jax.utils.standard_streams import PIPE_GONE, to_ascii
from fedvlm_jax.utils.untrusted_text import clean, escape_markdown

HOSTILE = "\x1b[2J\x1b]0;owned\x07a\u202eb\u200b\r\n| x [red]y[/red] `z` <b>w</b> [u](http://v) \x9b31m"
"""A client's name that clears the screen, names the window, turns the line round, and more."""

SHOW = """
import sys
from pathlib import Path
from fedvlm_jax.cli.main import main
from fedvlm_jax.reporting import score_tables, tables
from fedvlm_jax.run_dir import reader
from fedvlm_jax.utils.console import Terminal
def show(*args, **kwargs):
    console = Terminal()
    for table in score_tables.tabulate_comparison(reader.read_comparison(Path(sys.argv[1]))):
        tables.show(console, table)
    console.say("\\u2026 \\xb1 1 \\u2013 \\u4e2d")
import fedvlm_jax.cli.main as commands
commands.commands_available = lambda: {"explain": lambda: show(), "report": lambda: None}
main(["explain"])
"""
"""The tables of a comparison, as a command prints them, without jax."""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", SHOW, str(folder)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("made-up") / "comparison")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1", "COLUMNS": "40"},
    ],
)
def test_an_output_that_knows_only_ascii(environment: dict[str, str], comparison: Path) -> None:
    done = run(comparison, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    text = done.stdout.decode("latin-1")
    assert "fedavg-lora+ft" in text
    assert text.endswith("... +- 1 - \\u4e2d\n") or "latin-1" in environment.values()


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}, {"COLUMNS": "80"}])
def test_what_is_no_terminal_gets_no_codes(environment: dict[str, str], comparison: Path) -> None:
    done = run(comparison, PYTHONIOENCODING="utf-8", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout


def test_a_reader_that_leaves_ends_the_command_quietly(comparison: Path) -> None:
    for words in (["-c", SHOW, str(comparison)], ["-m", "fedvlm_jax", "train", "--help"]):
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.close()
        said = process.communicate()[1]
        assert process.returncode == PIPE_GONE
        assert said == b""


def test_others_texts_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=400, force_terminal=True, color_system=None)
    show(console, Table(HOSTILE, ("client", HOSTILE), ((HOSTILE, "1"), ("plain", HOSTILE)), note=HOSTILE))
    PlainProgress(console).note(HOSTILE)
    say(HOSTILE.replace("\n", " "), 2)
    Terminal().say(HOSTILE.replace("\n", " "))
    shown = out.getvalue() + "".join(capsys.readouterr())
    for letter in ("\x1b]", "\x1b[2", "\x07", "\u202e", "\u200b", "\x9b", "\r"):
        assert letter not in shown
    assert "[red]y[/red]" in shown, "markup in a name is text"
    assert r"\x1b[2J" in shown
    assert r"\u202e" in shown


def test_names_with_marks_of_their_scripts_stay_as_they_are() -> None:
    for name in ("Zürich", "中文", "می‌خواهم", "👩‍⚕️", "क्षेत्र", "a b", "עברית"):
        assert clean(name) == name
    assert clean("a\nb", "\n") == "a\nb"
    assert clean("\udc80\u2028") == r"\udc80\u2028"
    assert to_ascii("é → 中") == "\\xe9 -> \\u4e2d"


def test_markdown_shows_texts_and_does_nothing_with_them(tmp_path: Path) -> None:
    from fedvlm_jax.reporting.report import write_report

    table = to_markdown(Table("t", ("client", "score"), ((HOSTILE, "1"),)))
    assert table.count("\n") == 4, "one row is one line"
    for raw in ("<b>", "](http", "://", "`z`", "\x1b"):
        assert raw not in table.splitlines()[-1]
    assert r"\| x" in table
    assert escape_markdown("a_b *c* _d_") == r"a_b \*c\* \_d\_"
    name = HOSTILE[HOSTILE.index("| x") :].rpartition(" ")[0]
    write_report([write_run(tmp_path / "run", {name: 0.1, "b": 0.2}, {name: 0.3, "b": 0.4})])
    text = re.sub(r"^```$.*?^```$", "", (tmp_path / "run" / "report.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    for raw in ("<b>", "](http", "\x1b", "\u202e", "`z`"):
        assert raw not in text
