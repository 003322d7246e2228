"""Programs that a command finds again without tracing them: when it may, when it must not, and that results stay."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from tiny_run import assert_same_adapters, tiny_run

import fedvlm_jax
from fedvlm_jax.runs import loop, shelf
from fedvlm_jax.runs.frozen import Session
from fedvlm_jax.runs.kept_programs import SHELF, SWITCH, keep_programs
from fedvlm_jax.runs.shelf import Shelf, open_shelf


@pytest.fixture(autouse=True)
def fresh_makers():
    """What is known of sources and settings is asked once per process; tests change it."""
    shelf._describe_makers.cache_clear()
    yield
    shelf._describe_makers.cache_clear()


class Program:
    """A function that counts how often it is compiled."""

    def __init__(self):
        self.made = 0
        self.function = jax.jit(lambda tree, x: {"out": jnp.tanh(x @ tree["w"]), "sum": x.sum()})

    def compile(self, arguments):
        self.made += 1
        return self.function.lower(*arguments).compile()

    def ask(self, shelf, arguments, name="program"):
        return shelf(name, arguments, lambda: self.compile(arguments))


def make_arguments(rows=4, dtype=jnp.float32):
    return {"w": jnp.linspace(-1, 1, 64).reshape(8, 8).astype(dtype)}, jnp.ones((rows, 8), dtype)


def test_a_program_is_made_once_and_is_the_same_ever_after(tmp_path):
    program, arguments = Program(), make_arguments()
    first = program.ask(Shelf(tmp_path), arguments)
    again = program.ask(Shelf(tmp_path), arguments)
    assert program.made == 1
    assert jax.tree.map(lambda x: x.tobytes(), jax.device_get(first(*arguments))) == jax.tree.map(
        lambda x: x.tobytes(), jax.device_get(again(*arguments))
    )
    assert again.as_text() == first.as_text(), "profiles read the parts' names in it"
    assert again.memory_analysis().temp_size_in_bytes == first.memory_analysis().temp_size_in_bytes
    assert again.input_shardings == first.input_shardings


def test_shapes_serve_as_well_as_arrays(tmp_path):
    program = Program()
    program.ask(Shelf(tmp_path), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_arguments()))
    program.ask(Shelf(tmp_path), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_arguments()))
    assert program.made == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"arguments": make_arguments(rows=5)}, id="shape"),
        pytest.param({"arguments": make_arguments(dtype=jnp.bfloat16)}, id="dtype"),
        pytest.param({"arguments": ({"v": jnp.ones((8, 8))}, jnp.ones((4, 8)))}, id="structure"),
        pytest.param({"name": "other"}, id="name"),
        pytest.param({"about": ("rank", 8)}, id="about"),
        pytest.param({"setting": ("jax_default_matmul_precision", "float32")}, id="setting"),
        pytest.param({"environment": ("XLA_FLAGS_OF_TOMORROW", "--fast")}, id="environment"),
        pytest.param({"versions": {"jax": "0.0.1"}}, id="versions"),
        pytest.param({"sources": "edited"}, id="sources"),
    ],
)
def test_whatever_decides_a_program_tells_it_from_others(tmp_path, monkeypatch, other):
    made = []

    def ask(arguments, name="program", about=()):
        shelf._describe_makers.cache_clear()
        given = Program()
        if "v" in arguments[0]:
            given.function = jax.jit(lambda tree, x: x @ tree["v"])
        Shelf(tmp_path).of(*about)(name, arguments, lambda: made.append(name) or given.compile(arguments))

    usual = {"arguments": make_arguments()}
    ask(**usual)
    before = jax.config.values.get(other.get("setting", [""])[0])
    if "setting" in other:
        jax.config.update(*other["setting"])
    if "environment" in other:
        monkeypatch.setenv(*other["environment"])
    if "versions" in other:
        monkeypatch.setattr(shelf, "describe_versions", lambda: other["versions"])
    if "sources" in other:
        monkeypatch.setattr(shelf, "_hash_sources", lambda: other["sources"])
    try:
        ask(**usual | {key: other[key] for key in ("arguments", "name", "about") if key in other})
    finally:
        if "setting" in other:
            jax.config.update(other["setting"][0], before)
    assert len(made) == 2
    monkeypatch.undo()
    ask(**usual)
    assert len(made) == 2, "and the first is found again"


def test_an_edited_or_renamed_source_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(fedvlm_jax, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "methods").mkdir()
    (tmp_path / "__init__.py").write_text("")
    hashes = [shelf._hash_sources()]
    own = tmp_path / "methods" / "own.py"
    for step in (
        lambda: own.write_text("STEPS = 1"),
        lambda: own.write_text("STEPS = 2"),
        lambda: own.rename(own.with_name("mine.py")),
    ):
        step()
        hashes.append(shelf._hash_sources())
    assert len(set(hashes)) == 4
    (tmp_path / "methods" / "mine.py").unlink()
    assert shelf._hash_sources() == hashes[0]


def test_a_broken_file_is_written_again(tmp_path):
    program, arguments = Program(), make_arguments()
    program.ask(Shelf(tmp_path), arguments)
    (file,) = tmp_path.iterdir()
    whole = file.stat().st_size
    for content in (b"", b"no pickle", file.read_bytes()[: whole // 2]):
        file.write_bytes(content)
        program.ask(Shelf(tmp_path), arguments)
        assert file.stat().st_size > whole // 2
    assert program.made == 4
    program.ask(Shelf(tmp_path), arguments)
    assert program.made == 4


def test_what_cannot_be_kept_runs_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    program, arguments = Program(), make_arguments()
    assert program.ask(Shelf(tmp_path / "file" / "below"), arguments)(*arguments)["sum"] == 32
    assert Shelf(tmp_path / "own")("a plain function", arguments, lambda: len)([1, 2]) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "file"]


def test_what_compiling_raises_is_raised(tmp_path):
    def fail():
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        Shelf(tmp_path)("program", make_arguments(), fail)


def draw_and_gather():
    """A program that XLA splits into functions; each is jax's first sight of it in this process."""
    return jax.jit(lambda x, rows: jnp.tanh(x[rows] @ x.T).sum(0) + jax.random.normal(jax.random.key(3), (64,)))


@pytest.fixture
def cache_hits():
    """Names of the events by which jax says that a program came from its own cache."""
    hits = []

    def listen(event, **_):
        if event == shelf.FOUND_BY_JAX:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    yield hits
    jax.monitoring.unregister_event_listener(listen)


def test_what_jax_s_own_cache_has_is_compiled_for_the_shelf_and_runs_when_found_there(tmp_path, cache_hits):
    arguments = jnp.linspace(-1, 1, 4096).reshape(64, 64), jnp.arange(5)
    expected = draw_and_gather().lower(*arguments).compile()(*arguments)  # which puts it into jax's cache
    cache_hits.clear()
    for _ in range(2):
        program = Shelf(tmp_path)("program", arguments, lambda: draw_and_gather().lower(*arguments).compile())
        assert program(*arguments).tobytes() == expected.tobytes()
    assert not cache_hits
    assert len(list(tmp_path.iterdir())) == 1
    assert jax.config.values[shelf.KEPT_BY_JAX], "its cache is on again"
    draw_and_gather().lower(*arguments).compile()
    assert cache_hits, "jax's cache is on in these tests, and had it"


def test_what_came_from_jax_s_cache_after_all_is_run_and_not_kept(tmp_path, monkeypatch, cache_hits):
    """As when another thread compiles at the moment at which the cache is switched off."""
    monkeypatch.setattr(shelf, "_use_cache_of_jax", lambda used: None)
    arguments = jnp.linspace(-1, 2, 4096).reshape(64, 64), jnp.arange(5)
    expected = draw_and_gather().lower(*arguments).compile()(*arguments)
    cache_hits.clear()
    for _ in range(2):
        program = Shelf(tmp_path)("program", arguments, lambda: draw_and_gather().lower(*arguments).compile())
        assert program(*arguments).tobytes() == expected.tobytes()
    assert len(cache_hits) == 2
    assert not list(tmp_path.iterdir())


def test_only_commands_have_one(tmp_path, monkeypatch, undecided):
    monkeypatch.setattr("fedvlm_jax.runs.kept_programs.sys.modules", {})  # this process's jax is left alone
    assert open_shelf().folder is None
    assert Session.__dataclass_fields__["shelf"].default_factory().folder is None
    monkeypatch.setenv(SWITCH, str(tmp_path))
    keep_programs()
    assert open_shelf().folder == tmp_path / "ready"


@pytest.fixture
def short_run(model, tmp_path):
    """A run that ends after a round, of this name."""

    def make(name):
        run = tiny_run(model, tmp_path / name)
        return dataclasses.replace(run, train=dataclasses.replace(run.train, rounds=1))

    return make


def test_a_second_run_finds_its_round_and_features_and_ends_the_same(short_run, tmp_path, monkeypatch):
    monkeypatch.setenv(SHELF, str(tmp_path / "ready"))
    found = []
    load = shelf._load
    monkeypatch.setattr(shelf, "_load", lambda file: found.append(load(file)) or found[-1])
    described = []
    of = Shelf.of
    monkeypatch.setattr(Shelf, "of", lambda self, *about: described.append(repr(about)) or of(self, *about))
    first = loop.train(short_run("first"))
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "ready").iterdir()}
    assert len(files) == len(found) >= 2, "the round, and what makes image features"
    assert found == [None] * len(found)
    second = loop.train(short_run("second"))
    again = found[len(files) :]
    assert len(again) == len(files)
    assert None not in again
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "ready").iterdir()} == files
    assert_same_adapters(first, second)
    assert len(described) >= 4
    addressed = [text for text in (*described, shelf._describe_makers()) if re.search(r"\bat 0x[0-9a-f]+", text)]
    assert not addressed, "the hash is of text: an address in it makes every command's another"
