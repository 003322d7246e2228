"""Every block that the README shows runs: Python is executed, command lines are parsed with their options."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from fedvlm_jax.cli import main
from fedvlm_jax.training.config import Compare, Run
from fedvlm_jax.training.validation import validate, validate_comparison

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
STANDS_FOR = {"RUN": "runs/x", "./Florence-2-base": "microsoft/Florence-2-base"}
"""Words that a reader replaces."""


def list_commands():
    """Every `fedvlm` command of the README's blocks, as words."""
    for kind, text in BLOCKS:
        if kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                for command in re.findall(r"(?<![\w/.])fedvlm ([a-z]+[^&|]*)", line.partition(" #")[0]):
                    command += '"' * (command.count('"') % 2)  # a command inside of another's quotes
                    yield [STANDS_FOR.get(word, word) for word in shlex.split(command) if word not in ("...", "")]


COMMANDS = list(list_commands())


def test_there_is_something_to_check():
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("text", PYTHON, ids=lambda text: text.strip().splitlines()[0][:40])
def test_python_runs_as_it_stands(text):
    exec(compile(text, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_name_options_that_there_are(words, monkeypatch):
    """Parsed and judged as the command line does; nothing is run."""
    asked = []
    monkeypatch.setattr(main, "_defer", lambda command, chosen: _note(command, asked))
    main._dispatch(words)
    ((args, kwargs),) = asked
    for value in (*args, *kwargs.values()):
        if isinstance(value, Run):
            validate(value)
        elif isinstance(value, Compare):
            validate_comparison(value)


def _note(command, asked):
    @functools.wraps(command)
    def note(*args, **kwargs):
        asked.append((args, kwargs))

    return note
