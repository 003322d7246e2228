"""Folders that are there whole or not at all, and places where none can be."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.export.new_folder import check_free, write_beside


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_gets_its_name_at_the_end(here):
    (here / "empty").mkdir()
    for out in (Path("a/b/c"), Path("empty"), Path("x" * 240)):
        with write_beside(out) as place:
            (place / "file").write_text("x")
            assert not out.is_dir() or not list(out.iterdir())
        assert [file.name for file in out.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_fails_leaves_nothing(here, error):
    """Nor the folders above it, but for one that was there."""
    (here / "a").mkdir()

    def fail():
        with write_beside(Path("a/b/c")) as place:
            (place / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in here.rglob("*")] == ["a"]


def test_of_two_one_gets_the_name(here):

    def write_late():
        with write_beside(Path("out")) as late:
            (late / "file").write_text("late")
            with write_beside(Path("out")) as early:
                (early / "file").write_text("early")

    with pytest.raises(UserError, match="out is not empty"):
        write_late()
    assert [path.name for path in here.iterdir()] == ["out"]
    assert Path("out/file").read_text() == "early"


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        (".", "is the working folder, which cannot be replaced"),
        ("full", "is not empty"),
        ("full/file", "is no folder"),
        ("full/file/x/y", "file is a file, so there is no folder in it"),
        ("link", "or a link to one"),
        ("dangling", "or a link to one"),
        ("/dev/null/x", "/dev/null is a file"),
    ],
)
def test_places_where_no_folder_can_be(here, monkeypatch, out, reason):
    for name in ("full", "empty"):
        (here / name).mkdir()
    (here / "full" / "file").touch()
    Path("link").symlink_to("empty")
    Path("dangling").symlink_to("nowhere")
    if out == ".":
        monkeypatch.chdir("empty")
    with pytest.raises(UserError, match=reason):
        check_free(Path(out))


def test_the_top_of_a_disk_is_no_place(here, monkeypatch):
    (here / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(UserError, match=r"disk is the top of a disk, .*: name a folder in it"):
        check_free(Path("disk"))


def test_what_a_kill_left_goes_and_what_another_writes_stays(tmp_path):
    """Hidden folders as large as a model had stayed beside the export."""
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom fedvlm_jax.export.new_folder import write_beside\n"
        "with write_beside(Path(sys.argv[1])) as place:\n"
        "    (place / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(out)], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "half").is_file()
    (tmp_path / ".out.mine.tmp").mkdir()
    (tmp_path / ".other.01234567.tmp").mkdir()
    with write_beside(out) as place:
        assert not left.exists()
        (place / "file").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.01234567.tmp", ".out.mine.tmp", "out"]
