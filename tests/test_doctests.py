"""Examples in docstrings, run module by module."""

import doctest
import importlib
from pathlib import Path

import pytest

import fedvlm_jax

PACKAGE = Path(fedvlm_jax.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert found.attempted
    assert found.failed == 0
