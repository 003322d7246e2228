"""Examples in docstrings, run module by module: what a reader copies out of them is true."""

import doctest
import importlib
import pkgutil

import pytest

import fedvlm_jax

MODULES = [
    module.name
    for module in pkgutil.walk_packages(fedvlm_jax.__path__, "fedvlm_jax.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0
