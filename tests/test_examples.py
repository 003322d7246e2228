"""The scripts in examples/, which the docs show as notebooks, run to their end."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LONG = "02_first_federation"  # a minute; building the site runs all of them

CASES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == LONG else pytest.mark.broad)
    for path in EXAMPLES
]


@pytest.mark.parametrize("path", CASES)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path))
    assert len(names) > 10  # its cells were run, not skipped
