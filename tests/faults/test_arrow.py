"""Tables in our cache that were damaged are written again, and nobody's data is blamed."""

import json

import numpy as np
import pytest
from make_parquet import make_rows, write_rows

from fedvlm_jax.caches import FOLDER, Hold
from fedvlm_jax.data.table import read_parquet
from fedvlm_jax.errors import UserError

ROWS = 12


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A table that was read once: the parquet file, and what is kept of it."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    file = tmp_path / "rows.parquet"
    write_rows(file, make_rows(ROWS))
    read_parquet(file)
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    return file, arrow


def read_all(file):
    table = read_parquet(file)
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
        read_parquet(file)
    hold.let_go()
    assert len(read_parquet(file)) == ROWS
