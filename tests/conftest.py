"""Compiling quickly matters more to tests than running quickly: they run each program once, on little data.

Many files of tests compile the same small programs, in every worker. A folder that lasts as long as the test run keeps
them: the first process makes it, and its workers and the processes that tests start find it in their environment.
"""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that a change is refused for what it changed; CONTRIBUTING.md says how to look on.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

FOLDER = "JAX_COMPILATION_CACHE_DIR"
FULL = 2 * 2**30
"""Resident bytes beyond which a worker drops its compiled programs: a thousand tests fill a machine otherwise."""

QUICKLY = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",  # with the next, a third off the time of a compilation
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *QUICKLY))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
_own = None if FOLDER in os.environ else os.environ.setdefault(FOLDER, tempfile.mkdtemp(prefix="fedvlm-tests-"))


@pytest.fixture(autouse=True, scope="session")
def _datasets_cache(tmp_path_factory):
    """What is kept of tests lies here and not in the home of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of the tiny model; whoever changes one changes a copy."""
    from tiny_run import make_folder

    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP; whoever changes one changes a copy."""
    from models import clip_cases
    from models.causal_cases import write_model

    folder = tmp_path_factory.mktemp("clip")
    write_model("clip", folder, cases=clip_cases.CASES)
    return folder


@pytest.fixture(scope="session")
def toy_decoder(tmp_path_factory):
    """The folder of a model of a second family, whose package stands beside the others while tests run."""
    import jax
    from families.toy_decoder.model import Config, build

    from fedvlm_jax import models

    models.__path__.append(str(Path(__file__).parent / "families"))
    vlm = build(Config())
    folder = tmp_path_factory.mktemp("model") / "toy"
    models.save_checkpoint(vlm, jax.jit(vlm.init)(jax.random.key(5)), folder)
    yield folder
    models.__path__.pop()


@pytest.fixture(scope="session")
def loaded(model, tmp_path_factory):
    """The tiny model and its data: runs of many files share their programs."""
    from tiny_run import tiny_run

    from fedvlm_jax.training.loaded_model import load_model

    return load_model(tiny_run(model, tmp_path_factory.mktemp("unused")))


@pytest.fixture
def undecided(monkeypatch):
    """An environment that says nothing of compiled programs; what a test has written there is gone after it."""
    from fedvlm_jax.utils.compilation_cache import FOLDER as KEPT
    from fedvlm_jax.utils.compilation_cache import SETTINGS, SWITCH

    for name in ("FEDVLM_CACHE", KEPT, SWITCH, *map(str.upper, SETTINGS)):
        monkeypatch.setenv(name, "set so that it is put back")
        monkeypatch.delenv(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays with one worker: many begin with a fixture that takes longer than their tests."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """The limit of one test's time is there for those that hang; slow ones may take as long as they do."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last test of a file; what is dropped is read from the folder of programs when it is asked for again."""
    if (nextitem is None or nextitem.path != item.path) and _resident() > FULL:
        sys.modules["jax"].clear_caches()
        gc.collect()  # traced functions and what they close over refer to each other
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which else keeps most of what was freed
        if trim is not None:
            trim(0)


def _resident() -> int:
    """-> bytes in memory, or 0 where nothing has been compiled or the system has no such file."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1] if "jax" in sys.modules else 0
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def pytest_unconfigure() -> None:
    """The process that made the folder takes it away."""
    if _own is not None:
        shutil.rmtree(_own, ignore_errors=True)
