"""The tiny model, written once per file of tests, and a session on it."""

import pytest
from tiny_run import make_folder, tiny_run

from fedvlm_jax.runs.kept_programs import FOLDER, SETTINGS, SWITCH
from fedvlm_jax.runs.prepare import open_session


@pytest.fixture
def undecided(monkeypatch):
    """An environment that says nothing of compiled programs; what a test has written there is gone after it."""
    for name in ("FEDVLM_CACHE", FOLDER, SWITCH, *map(str.upper, SETTINGS)):
        monkeypatch.setenv(name, "set so that it is put back")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def session(model, tmp_path_factory):
    return open_session(tiny_run(model, tmp_path_factory.mktemp("unused")))
