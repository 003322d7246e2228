"""Environments of runs."""

import pytest

from fedvlm_jax.utils.compilation_cache import FOLDER, SETTINGS, SWITCH


@pytest.fixture
def undecided(monkeypatch):
    """An environment that says nothing of compiled programs; what a test has written there is gone after it."""
    for name in ("FEDVLM_CACHE", FOLDER, SWITCH, *map(str.upper, SETTINGS)):
        monkeypatch.setenv(name, "set so that it is put back")
        monkeypatch.delenv(name)
