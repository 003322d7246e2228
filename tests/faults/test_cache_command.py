"""`fedvlm cache` removes what can be made again: no file of others, nothing in use, nothing behind a link."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import (
    BOUND,
    FOLDER,
    KINDS,
    PLACED,
    Hold,
    find_arrow,
    find_cache,
    list_entries,
    remove,
    trim,
)

NAMES = {
    "programs": ("programs/x86", "jit_round-cache"),
    "features": ("features-aa-bb", "0123.rows"),
    "reference": ("reference-aa-bb", "0123.keys"),
    "arrow": ("arrow/parquet/default-12/0.0.0/34", "parquet-train.arrow"),
    "contents": ("contents-of-files", "1f3a.json"),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty cache folder that the environment names."""
    for name in ("HF_DATASETS_CACHE", "XDG_CACHE_HOME", PLACED, BOUND):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def make(root, kind, used=10**9, size=1000, number=""):
    """An entry of a kind, last used then."""
    folder, name = NAMES[kind]
    file = root / f"{folder}{number}" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    os.utime(file, (used, used))
    return file


def clear(*kinds):
    main(["cache", "--clear", *kinds])


def test_the_environment_places_it(root, monkeypatch):
    assert find_cache() == root
    assert find_arrow() == root / "arrow"
    monkeypatch.setenv("HF_DATASETS_CACHE", "/sets")
    assert find_arrow() == root / "arrow", "ours is the more particular"
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/xdg")
    assert find_cache() == Path("/of/xdg/fedvlm-jax")
    assert find_arrow() == Path("/sets/fedvlm-jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert find_cache() == Path.home() / ".cache" / "fedvlm-jax"


def test_it_shows_every_kind_with_place_size_count_and_newest_use(root, capsys):
    for kind in KINDS:
        make(root, kind, size=3 * 2**20)
    make(root, "features", size=2**20, number=2)
    main(["cache"])
    shown = capsys.readouterr().out
    for kind, (folder, _) in NAMES.items():
        assert kind in shown
        assert str(root / folder) in shown
    assert "4.0 MiB in 2 files of 2 folders" in shown
    assert shown.count("2001-09-0") == 1 + len(KINDS)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_kind_is_cleared_alone(root, kind):
    files = {one: make(root, one) for one in KINDS}
    clear(kind)
    assert [one for one, file in files.items() if not file.exists()] == [kind]
    assert not files[kind].parent.exists()


def test_without_a_kind_all_go_and_files_of_others_stay(root):
    files = [make(root, kind) for kind in KINDS]
    own = [file.with_name("notes.md") for file in files] + [root / "mine.rows", root / "features-of-my-thesis"]
    for file in own:
        file.write_text("mine")
    clear()
    assert not any(file.exists() for file in files)
    assert all(file.read_text() == "mine" for file in own)


def test_nothing_of_a_table_is_left(root):
    """`datasets` puts locks beside and above it; another table in the same folder stays."""
    file, other = make(root, "arrow"), make(root, "arrow", number=2)
    for folder in file.parents[:4]:
        (folder / "some.lock").touch()
    remove(next(entry for entry in list_entries(["arrow"]) if entry.path == file.parent))
    assert other.exists()
    clear("arrow")
    assert [path for path in root.rglob("*") if path.is_file()] == [find_arrow() / ".in-use"], "by which one is written"


def test_links_are_not_followed(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("a.rows", "b-cache", "c.arrow", "d.keys"):
        (outside / name).write_text("dear")
    for kind in KINDS:
        folder = make(root, kind).parent
        (folder / "below").symlink_to(outside)
        for name in ("a.rows", "b-cache", "c.arrow", "d.keys"):
            (folder / name).symlink_to(outside / name)
    (root / "features-linked").symlink_to(outside)
    (root / "programs" / "linked").symlink_to(outside)
    clear()
    assert sorted(file.name for file in outside.iterdir()) == ["a.rows", "b-cache", "c.arrow", "d.keys"]
    (root / "arrow").rename(tmp_path / "tables")
    make(tmp_path, "arrow").parent.parent.parent.parent.parent.rename(tmp_path / "more")
    (root / "arrow").symlink_to(tmp_path / "more")
    assert list_entries(["arrow"]) == []


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_in_use_stays(root, kind, capsys):
    file = make(root, kind)
    hold = Hold(file.parent)
    clear()
    assert file.exists()
    assert "used by running processes stay" in capsys.readouterr().out
    hold.let_go()
    clear()
    assert not file.exists()


def test_a_killed_process_uses_nothing_any_more(root):
    file = make(root, "features")
    program = f"""
from pathlib import Path
from fedvlm_jax.utils.cache_folders import Hold
hold = Hold(Path({str(file.parent)!r}))
print(flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    (entry,) = list_entries()
    assert not remove(entry)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert remove(entry)
    assert not file.parent.exists()


def test_no_table_is_removed_while_one_is_written(root):
    """Its folder is nobody's yet."""
    file = make(root, "arrow")
    hold = Hold(find_arrow())
    assert not remove(list_entries(["arrow"])[0])
    hold.let_go()
    assert remove(list_entries(["arrow"])[0])
    assert not file.exists()


def test_what_was_used_longest_ago_goes_first_until_the_rest_fits(root):
    files = [make(root, kind, used=10**9 + number) for number, kind in enumerate(("arrow", "features", "reference"))]
    programs = make(root, "programs", used=1)
    hold = Hold(files[0].parent)  # also the newest use
    assert trim(3000) == []
    assert [entry.kind for entry in trim(2999)] == ["features"]
    assert [file.exists() for file in files] == [True, False, True]
    assert [entry.kind for entry in trim(1)] == ["reference"], "what is in use stays, however large"
    hold.let_go()
    assert [entry.kind for entry in trim(1)] == ["arrow"]
    assert programs.exists(), "jax bounds them"


@pytest.mark.parametrize("told", ["none", "-1", "0", "nan", "inf"])
def test_a_bound_that_is_none(root, monkeypatch, told):
    monkeypatch.setenv(BOUND, told)
    with pytest.raises(SystemExit) as stop:
        main(["cache"])
    assert stop.value.code == 2


def test_a_home_that_is_none(monkeypatch):
    for name in (FOLDER, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(UserError, match=FOLDER):
        find_cache()


def test_programs_that_the_environment_places_are_shown_and_cleared(root, monkeypatch, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "jit_round-cache").touch()
    (tmp_path / "own" / "letter.txt").touch()
    monkeypatch.setenv(PLACED, str(tmp_path / "own"))
    clear("programs")
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["letter.txt"]
