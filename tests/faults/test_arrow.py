"""Tables in our cache that were damaged are written again, and nobody's data is blamed."""

import errno
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_parquet import IMAGE, make_rows, write_rows

from fedvlm_jax.data import arrow_cache
from fedvlm_jax.data.sources.registry import read_table
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.cache_folders import BOUND, FOLDER, Hold

ROWS = 12


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A table that was read once: the parquet file, and what is kept of it."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    file = tmp_path / "rows.parquet"
    write_rows(file, make_rows(ROWS))
    read_table(str(file))
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    return file, arrow


def read_all(file):
    table = read_table(str(file))
    return [
        table.read_text("chosen"),
        table.read_text("question"),
        [table.read_image(row) for row in range(len(table))],
    ]


def cut(content):
    return content[: len(content) // 2]


def empty(content):
    return b""


def page(content):
    return b"<html>not found</html>" * 50


def text(content):
    """A word of an answer is another."""
    word = b"answer" if b"answer" in content else b"a"
    return content.replace(word, word.upper(), 1)


def head(content):
    return bytes([content[0] ^ 255, *content[1:40], 255, 255, *content[42:]])


@pytest.mark.parametrize("damage", [cut, empty, page, text, head])
def test_damaged_arrow_files_are_written_again(kept, damage):
    file, arrow = kept
    whole, before = arrow.read_bytes(), read_all(file)
    arrow.write_bytes(damage(whole))
    assert arrow.read_bytes() != whole
    assert read_all(file) == before
    assert arrow.read_bytes() == whole


def test_an_arrow_file_that_is_gone_is_written_again(kept):
    file, arrow = kept
    before = read_all(file)
    arrow.unlink()
    assert read_all(file) == before


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", json.dumps({"features": 3})])
def test_what_is_said_of_the_files_may_be_nonsense(kept, content):
    file, arrow = kept
    before = read_all(file)
    (arrow.parent / "dataset_info.json").write_text(content)
    assert read_all(file) == before


def test_a_flipped_byte_anywhere_gives_no_other_texts(kept):
    """Images have digests of their own; damage in them is found when they are decoded."""
    file, arrow = kept
    whole, before = arrow.read_bytes(), read_all(file)
    for place in np.random.default_rng(0).integers(0, len(whole), 12).tolist():
        content = bytearray(whole)
        content[place] ^= 255
        arrow.write_bytes(content)
        assert read_all(file)[:2] == before[:2], place
        arrow.write_bytes(whole)


def test_files_that_a_process_uses_are_not_taken_from_it(kept):
    file, arrow = kept
    arrow.write_bytes(b"")
    hold = Hold(arrow.parent)
    with pytest.raises(UserError, match="damaged, and a running process uses it"):
        read_table(str(file))
    hold.let_go()
    assert len(read_table(str(file))) == ROWS


# --- What is whole stays, and is opened again as it is ---


def write_images(file, images, kind=IMAGE):
    texts = {name: pa.array([f"{name} {row}" for row in range(len(images))]) for name in ("question", "chosen")}
    pq.write_table(pa.table({"image": pa.array(images, kind)} | texts), file)


PATHS = [{"bytes": None, "path": f"{row}.png"} for row in range(40)]
BYTES = [{"bytes": b"picture %d" % row, "path": None} for row in range(1000)]
WITHOUT_BYTES = {
    "paths in structs": (PATHS, IMAGE),
    "paths": ([image["path"] for image in PATHS], pa.string()),
    "no images": ([None] * 40, IMAGE),
    "a batch of paths between two of bytes": ([*BYTES, *PATHS * 25, *BYTES], IMAGE),
    "a batch without images between two of bytes": ([*BYTES, *[None] * 1000, *BYTES], IMAGE),
    "every other row without": ([*BYTES[:20], None, *PATHS, {"bytes": b"", "path": ""}, *BYTES[:20]], IMAGE),
}


@pytest.mark.parametrize("name", list(WITHOUT_BYTES))
def test_a_table_without_some_bytes_fits_its_seal_wherever_it_is_mapped(name, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    file = tmp_path / "rows.parquet"
    write_images(file, *WITHOUT_BYTES[name])
    first = read_table(str(file))  # held, so the second mapping is at another address, and nothing may be written again
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    before = arrow.stat()
    second = read_table(str(file))
    assert (arrow.stat().st_ino, arrow.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for table in (first, second):
        assert table.read_text("chosen")[-1] == f"chosen {len(table) - 1}"
        assert table.locations.start[table.locations.length == 0].tolist() == [0] * int(
            (table.locations.length == 0).sum()
        )


def test_a_bound_that_is_no_number_costs_no_copy(kept, monkeypatch):
    file, arrow = kept
    monkeypatch.setenv(BOUND, "1O0")
    with pytest.raises(UserError, match=r"FEDVLM_CACHE_GIB is '1O0'"):
        read_table(str(file))
    assert arrow.exists()


FAULTS = [
    *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENOSPC, errno.EIO, errno.ENOMEM)),
    MemoryError(),
    pa.ArrowMemoryError("realloc of size 64 failed"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{type(fault).__name__} {fault}")
@pytest.mark.parametrize("place", ["open_arrow", "hold_table"])
def test_a_fault_of_the_machine_costs_no_copy(kept, monkeypatch, fault, place):
    """It is told as what it is, and the copy is there when the machine can open it again."""
    file, arrow = kept
    before = arrow.stat()

    def fail(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(arrow_cache, place, fail)
        with pytest.raises((OSError, MemoryError, UserError), match=fault.strerror if fault.args[1:] else None):
            read_table(str(file))
    assert arrow.stat() == before
    assert len(read_table(str(file))) == ROWS


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_does_not_make_the_shards_damaged(number, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.parquet", make_rows(ROWS))

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", refuse)
    with pytest.raises(UserError, match=f"the cache .* cannot be written .{os.strerror(number)}"):
        read_table(str(tmp_path / "rows.parquet"))


def test_one_copy_serves_files_that_were_touched_or_copied(kept):
    file, arrow = kept
    before, other = arrow.stat(), file.parent / "elsewhere" / "other.parquet"
    held = read_table(str(file))
    os.utime(file, (1, 1))
    other.parent.mkdir()
    shutil.copy(file, other)
    assert read_all(other) == read_all(file)
    assert held.read_text("chosen") == read_table(str(file)).read_text("chosen")
    assert list((file.parent / "cache").rglob("*.arrow")) == [arrow]
    assert arrow.stat() == before


def test_what_is_damaged_is_all_that_is_thrown_away(kept):
    """Other tables of the same content stay: those of another release, or of what somebody put there."""
    file, arrow = kept
    beside = arrow.parents[2] / "another form" / "0.0.0" / arrow.name
    beside.parent.mkdir(parents=True)
    shutil.copy(arrow, beside)
    arrow.write_bytes(b"")
    assert len(read_table(str(file))) == ROWS
    assert beside.exists()
