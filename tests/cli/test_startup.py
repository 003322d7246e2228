"""What a command chooses for its process: asked in processes of their own, because it cannot be taken back."""

import json
import os
import subprocess
import sys

import pytest

from fedvlm_jax.cli._process.startup import LINES, RARELY

PROGRAM = """
import gc, json, sys
{early}
from fedvlm_jax.cli._process.startup import start_quickly
start_quickly({arguments})
without_jax = "jax" not in sys.modules
import jax
text = jax.jit(lambda x: x + 1).lower(1.0).as_text(debug_info=True)
print(json.dumps({{"light": without_jax, "threshold": gc.get_threshold(), "lines": "<string>" in text}}))
"""


def ask(tmp_path, early="", arguments="", **environment):
    """What a process says after it started quickly: of `gc`, and whether a program knows its lines of source."""
    kept = {name: value for name, value in os.environ.items() if name != LINES.upper()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(early=early, arguments=arguments)],
        env={**kept, "XDG_CACHE_HOME": str(tmp_path), **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("early", ["", "import jax"])
def test_a_command_collects_rarely_and_its_programs_name_no_lines(tmp_path, early):
    assert ask(tmp_path, early) == {"light": not early, "threshold": list(RARELY), "lines": False}


def test_profilers_are_shown_lines_and_whoever_asks_for_them_gets_them(tmp_path):
    assert ask(tmp_path, arguments="lines=True")["lines"]
    assert ask(tmp_path, **{LINES.upper(): "10"})["lines"]
