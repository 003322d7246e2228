"""The made-up folders: the schema to the letter, deterministic, and spoilt exactly as asked."""

import io
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from make_parquet import RLAIF_V
from PIL import Image
from rlaif_form import SOURCES, SPOILS, Form, make_form_rows, write_folder, write_stream


def test_shards_have_the_card_s_schema_and_names(tmp_path: Path) -> None:
    files = write_folder(tmp_path)
    assert [file.name for file in files] == [f"train-0000{n}-of-00003.parquet" for n in range(3)]
    for file in files:
        assert pq.read_schema(file).equals(RLAIF_V)
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [row["idx"] for row in rows] == [str(number) for number in range(60)]
    sizes = Counter(row["origin_dataset"] for row in rows)
    assert set(sizes) == set(SOURCES)
    assert max(sizes.values()) > 20 * min(sizes.values())


def test_all_pictures_decode_and_no_two_sources_share_one(tmp_path: Path) -> None:
    rows = make_form_rows(Form(rows=1500))
    owners: dict[bytes, set[str]] = {}
    for row in rows:
        owners.setdefault(row["image"]["bytes"], set()).add(row["origin_dataset"])
        assert row["chosen"].strip() != row["rejected"].strip()
    assert all(len(who) == 1 for who in owners.values())
    assert len(owners) > 500
    formats = Counter(Image.open(io.BytesIO(encoded)).format for encoded in owners)
    assert set(formats) == {"PNG", "JPEG", "WEBP"}
    for encoded in owners:
        Image.open(io.BytesIO(encoded)).load()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    form = Form(rows=80, spoil=dict.fromkeys(SPOILS, 1))
    first, second = (write_folder(tmp_path / name, form) for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    other = make_form_rows(Form(rows=80, seed=1))
    assert [row["question"] for row in other] != [row["question"] for row in make_form_rows(Form(rows=80))]


def test_exactly_the_rows_asked_for_are_spoilt() -> None:
    plain = make_form_rows(Form())
    for kind in SPOILS:
        spoilt = make_form_rows(Form(spoil={kind: 3}))
        changed = [new for old, new in zip(plain, spoilt, strict=True) if old != new]
        assert len(changed) == 3, kind
    with pytest.raises(ValueError, match="kinds are broken image"):
        make_form_rows(Form(spoil={"no such kind": 1}))


def test_columns_can_be_left_out(tmp_path: Path) -> None:
    (file,) = write_folder(tmp_path, Form(shards=1, drop=("rejected", "origin_split")))
    assert pq.read_schema(file).names == [name for name in RLAIF_V.names if name not in ("rejected", "origin_split")]


def test_a_stream_is_written_in_bounded_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = write_stream(tmp_path, 0.25, shard_bytes=2**26)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) == pytest.approx(2**28, rel=0.02)
    assert grown < 120 * 1024
    rows = pq.read_table(files[1], columns=["image", "idx"]).to_pylist()
    assert len({row["image"]["bytes"] for row in rows}) == len(rows)
    sizes = [len(row["image"]["bytes"]) for row in rows]
    assert 150_000 < min(sizes) < max(sizes) < 250_000
    Image.open(io.BytesIO(rows[-1]["image"]["bytes"])).load()


def test_it_is_a_script(tmp_path: Path) -> None:
    script = Path(__file__).parent / "rlaif_form.py"
    words = [str(tmp_path / "x"), "--rows", "70", "--shards", "2", "--spoil", "broken image=2", "--drop", "ds_name"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 files, ")
    assert sum(pq.ParquetFile(file).metadata.num_rows for file in (tmp_path / "x").iterdir()) == 70
