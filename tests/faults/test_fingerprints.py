"""Data, models and options that are not what they were: another content is noticed, whatever its name and time."""

import hashlib
import os

import numpy as np
import pytest
from make_parquet import make_rows, write_rows

from fedvlm_jax import contents
from fedvlm_jax.contents import digest_file, digest_files
from fedvlm_jax.data.images import digest_rows
from fedvlm_jax.data.table import read_parquet
from fedvlm_jax.errors import UserError

# --- Contents of files ---


def rewrite(file, content):
    """Another content, as long, under the same time stamp."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(file, content):
    """The same by a new file in the place of the old one, as a copy that keeps times does."""
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """Files of 100 bytes are large, and settled at once; the digests that were computed."""
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "LARGE", 100)
    monkeypatch.setattr(contents, "SETTLED", -1.0)
    read = []

    def count(file, kind):
        read.append(file.name)
        return original(file, kind)

    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", count)
    return read


def test_a_large_file_is_read_once(remembering, tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(200))
    small.write_bytes(bytes(99))
    assert len({digest_file(large) for _ in range(3)}) == 1
    assert len(remembering) == 1
    digest_file(small)
    digest_file(small)
    assert len(remembering) == 3


@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_change_under_the_same_name_size_and_time_is_noticed(remembering, tmp_path, change):
    file = tmp_path / "large"
    file.write_bytes(b"a" * 200)
    before = digest_file(file)
    change(file, b"b" * 200)
    assert digest_file(file) != before
    change(file, b"a" * 200)
    assert digest_file(file) == before


def test_what_was_just_written_is_not_remembered(remembering, tmp_path, monkeypatch):
    """A change within the same tick of the clock would not show."""
    monkeypatch.setattr(contents, "SETTLED", 10.0)
    (tmp_path / "large").write_bytes(bytes(200))
    digest_file(tmp_path / "large")
    digest_file(tmp_path / "large")
    assert len(remembering) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"file": 3}', b"\xff"])
def test_a_damaged_memory_costs_time_alone(remembering, tmp_path, content):
    file = tmp_path / "large"
    file.write_bytes(bytes(200))
    before = digest_file(file)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_bytes(content)
    assert digest_file(file) == before


def test_order_counts_and_places_do_not(tmp_path):
    for name, content in (("a/one", b"1"), ("a/two", b"2"), ("b/other", b"1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    one, two, same = (tmp_path / name for name in ("a/one", "a/two", "b/other"))
    assert digest_files([one, two]) == digest_files([same, two]) != digest_files([two, one])
    assert digest_files([one]) != digest_files([one, one])


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"gone cannot be read \(No such file or directory\)"):
        digest_file(tmp_path / "gone")


# --- Tables ---


def read_all(table):
    digests, _ = digest_rows(table, np.arange(len(table)))
    return table.read_text("question"), table.read_text("chosen"), digests


@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_table_replaced_under_the_same_name_and_time_gives_the_new_rows(tmp_path, change):
    """`datasets` goes by name and time stamp and gave the old rows; so did the digests of images beside them."""
    file, other = (write_rows(tmp_path / name, make_rows(6)[part:][:3]) for name, part in (("a", 0), ("b", 3)))
    first = read_all(read_parquet(file))
    change(file, other.read_bytes())
    second = read_all(read_parquet(file))
    assert second == read_all(read_parquet(other))
    assert second != first
    assert read_parquet(file).digest == read_parquet(other).digest


def test_a_table_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from fedvlm_jax.data import table

    file, other = (write_rows(tmp_path / name, make_rows(6)[part:][:3]) for name, part in (("a", 0), ("b", 3)))
    convert = table.convert_shards

    def disturb(files, columns, digest):
        file.write_bytes(other.read_bytes())
        return convert(files, columns, digest)

    monkeypatch.setattr(table, "convert_shards", disturb)
    with pytest.raises(UserError, match="was changed while it was read"):
        read_parquet(file)
