"""Made-up folders are those of the tests of `runs`; what `datasets` keeps goes where the tests do."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "runs"))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """`datasets` writes its Arrow files here and not into the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield
