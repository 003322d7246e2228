"""Malformed rows and files, by name: what `test_malformed.py` throws at the data path.

A row case is (changes to a good row, reason with which it is skipped, or None where the row is odd and yet good). A
file case is a function that fills a folder and returns what the error's message must hold.
"""

import base64
import gzip
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
from make_parquet import IMAGE, RLAIF_V, draw_image, make_rows, write_rows
from PIL import Image

BROKEN, NONE, LOST = "broken or truncated image", "no image", "image file cannot be read"
OUTSIDE = "image file outside of the data's folder (--data.image-root allows another)"
LARGE, LONG = "image of more than 89,478,485 pixels (--data.max-image-pixels)", "prompt too long"


def _put(encoded: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"image": {"bytes": encoded, "path": path}}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG by hand, whose header may promise anything."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _promise(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size; FF C0, two bytes of length, one of depth, then height and width."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _make_truncated() -> dict[str, tuple[dict[str, Any], str | None]]:
    cases: dict[str, tuple[dict[str, Any], str | None]] = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = draw_image(3, (120, 90), kind)
        for share in (0.02, 0.2, 0.5, 0.8):
            cases[f"{kind} cut at {share:.0%}"] = (_put(whole[: int(share * len(whole))]), BROKEN)
        # The tail stays, so that lengths are right and only the content is not.
        cases[f"{kind} with a hole"] = (_put(bytes(30) + whole[30:]), BROKEN)
    return cases


SMALL = draw_image(1, (9, 7))
FOUR_BY_FOUR = (b"\0" + bytes(12)) * 4
ROW_CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "image null": ({"image": None}, NONE),
    "image struct of nulls": (_put(None), NONE),
    "image of no bytes": (_put(b""), NONE),
    "image of no bytes, path empty": (_put(b"", ""), NONE),
    "path to nothing": (_put(None, "gone.png"), LOST),
    "no bytes, path to nothing": (_put(b"", "gone.png"), LOST),
    "path to a folder": (_put(None, "."), LOST),
    "path upwards": (_put(None, "../../../../.."), OUTSIDE),
    "path with NUL": (_put(None, "a\0b.png"), LOST),
    "path of 5000 characters": (_put(None, "x" * 5000), LOST),
    "path that is a URL": (_put(None, "http://127.0.0.1:9/x.png"), LOST),
    "path to an endless device": (_put(None, "/dev/zero"), OUTSIDE),
    "path to a pipe": (_put(None, "pipe"), LOST),
    "path to an empty file": (_put(None, "empty.png"), NONE),
    "path to a text": (_put(None, "text.png"), BROKEN),
    "path to an image": (_put(None, "good.png"), None),
    "bytes count before the path": (_put(SMALL, "gone.png"), None),
    **_make_truncated(),
    "one byte": (_put(b"x"), BROKEN),
    "zeros": (_put(bytes(1000)), BROKEN),
    "noise": (_put(np.random.default_rng(0).bytes(2000)), BROKEN),
    "text": (_put(b"no image at all"), BROKEN),
    "HTML": (_put(b"<!doctype html><title>404</title>"), BROKEN),
    "SVG": (_put(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), BROKEN),
    "PDF": (_put(b"%PDF-1.4\n1 0 obj\n"), BROKEN),
    "ZIP": (_put(b"PK\x03\x04" + bytes(60)), BROKEN),
    "PostScript that never ends": (
        _put(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{} loop\n%%EOF\n"),
        "image of a kind that is not read",
    ),
    "base64 instead of bytes": (_put(b"iVBORw0KGgoAAAANSUhEUgAAAAUA"), BROKEN),
    "PNG signature alone": (_put(SMALL[:8]), BROKEN),
    "PNG with a wrong checksum": (_put(SMALL[:20] + b"\xff" + SMALL[21:]), BROKEN),
    "PNG of no pixels": (_put(make_png(0, 0)), BROKEN),
    "PNG of no data": (_put(make_png(40, 40)), BROKEN),
    "PNG of an impossible depth": (_put(make_png(4, 4, 7, 2, FOUR_BY_FOUR)), BROKEN),
    "PNG of a negative width": (_put(make_png(2**32 - 1, 4, data=FOUR_BY_FOUR)), LARGE),
    "PNG that promises 2.5 gigapixels": (_put(make_png(50_000, 50_000)), LARGE),
    "PNG of 169 megapixels in 20 kB": (_put(make_png(13_000, 13_000, 1, 0, bytes(1626) * 13_000)), LARGE),
    "PNG with 100 MB of text": (
        _put(make_png(4, 4, 8, 2, FOUR_BY_FOUR, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))))),
        BROKEN,
    ),
    "JPEG that promises 65500 squared": (_put(_promise(draw_image(1, kind="JPEG"), 65500, 65500)), LARGE),
    "JPEG after a line of text": (_put(b"Content-Type: image/jpeg\r\n\r\n" + draw_image(1, kind="JPEG")), BROKEN),
    "JPEG with trailing junk": (_put(draw_image(1, kind="JPEG") + b"junk" * 50), None),
    "GIF that moves": (
        _put(_save(Image.new("P", (9, 9)), "GIF", save_all=True, append_images=[Image.new("P", (9, 9), 1)] * 3)),
        None,
    ),
    "one pixel": (_put(_save(Image.new("RGB", (1, 1)), "PNG")), None),
    "16-bit grey": (_put(_save(Image.fromarray(np.full((4, 5), 60_000, np.uint16)), "PNG")), None),
    "question null": ({"question": None}, "empty question"),
    "question empty": ({"question": ""}, "empty question"),
    "question of spaces": ({"question": " \t\r\n "}, "empty question"),
    "question of no-break spaces": ({"question": "\u00a0\u2003\u3000"}, "empty question"),
    "question of control characters": ({"question": "\x1c\x1d\x1e\x1f\x85"}, "empty question"),
    "question of 2000 words": ({"question": "why " * 2000}, LONG),
    "question of 3 million letters": ({"question": "w" * 3_000_000}, LONG),
    "question with NUL": ({"question": "what\0is it"}, None),
    "question of a zero-width space": ({"question": "\u200b"}, None),
    "question in reverse direction": ({"question": "\u202eما هذا؟"}, None),
    "question of one combining mark": ({"question": "\u0301"}, None),
    "question with the image token": ({"question": "<image><image> what is it"}, None),
    "answer null": ({"chosen": None}, "empty answer"),
    "answer empty": ({"chosen": ""}, "empty answer"),
    "answer of spaces": ({"chosen": "\n"}, "empty answer"),
    "answer of 2 million letters": ({"chosen": "w " * 1_000_000}, None),
    "answer with NUL": ({"chosen": "a\0b"}, None),
    "rejected null": ({"rejected": None}, None),
    "rejected empty": ({"rejected": ""}, None),
    "rejected equal": ({"rejected": "It is rectangle 4"}, None),
    "source null": ({"origin_dataset": None}, "no origin_dataset"),
    "source empty": ({"origin_dataset": ""}, "no origin_dataset"),
    "source of spaces": ({"origin_dataset": "  "}, "no origin_dataset"),
    "source with a path and NUL": ({"origin_dataset": "../../etc/\0passwd"}, None),
    "source of 3000 letters": ({"origin_dataset": "s" * 3000}, None),
    "idx null": ({"idx": None}, None),
    "idx twice": ({"idx": "3"}, None),
    "idx of a huge number": ({"idx": "9" * 400}, None),
    "image_path null": ({"image_path": None}, None),
    "origin_split null": ({"origin_split": None}, None),
    "origin_split cut": ({"origin_split": '{"type": "quest'}, None),
    "origin_split a list": ({"origin_split": "[1, 2]"}, None),
    "origin_split nested 100000 deep": ({"origin_split": '{"a":' * 100_000}, None),
    "origin_split with half a surrogate": ({"origin_split": '{"type": "\\ud800"}'}, None),
    "origin_split that is code": ({"origin_split": "{__import__('os').abort()}"}, None),
    "all null": (dict.fromkeys(RLAIF_V.names), "no origin_dataset"),
}

UNREADABLE_COLUMNS = {
    "question": "question is not UTF-8",
    "chosen": "answer is not UTF-8",
    "rejected": None,
    "idx": None,
}
"""Text column whose bytes are no UTF-8 -> the reason; a rejected answer matters to pairs only."""


def write_side_files(folder: Path) -> None:
    """Files beside the parquet that image paths of `ROW_CASES` name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "good.png").write_bytes(draw_image(77))
    os.mkfifo(folder / "pipe")


def replace_column(column: str, values: pa.Array, rows: int = 4) -> pa.Table:
    """Good rows with one column of another kind."""
    table = pa.Table.from_pylist(make_rows(rows), RLAIF_V)
    if column in table.column_names:
        return table.set_column(table.column_names.index(column), column, values)
    return table.append_column(column, values)


def _write(content: bytes) -> Callable[[Path], str]:
    def fill(folder: Path) -> str:
        (folder / "a.parquet").write_bytes(content)
        return r"a\.parquet"

    return fill


def _write_two(second: Callable[[Path], object], expected: str = r"b\.parquet") -> Callable[[Path], str]:
    def fill(folder: Path) -> str:
        write_rows(folder / "a.parquet", make_rows(6))
        second(folder / "b.parquet")
        return expected

    return fill


def _write_table(table: pa.Table, expected: str, **options: Any) -> Callable[[Path], str]:
    def fill(folder: Path) -> str:
        pq.write_table(table, folder / "a.parquet", **options)
        return expected

    return fill


def _make_bytes(rows: int = 60) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(make_rows(rows), RLAIF_V), out, row_group_size=20)
    return out.getvalue()


def spoil_middle(file: Path) -> None:
    """A file whose footer is whole and whose pages are not."""
    content = bytearray(_make_bytes())
    content[400:6000] = b"\xff" * 5600
    file.write_bytes(content)


GOOD = pa.Table.from_pylist(make_rows(4), RLAIF_V)
WHOLE = _make_bytes()


def _write_groups(file: Path, groups: list[pa.Table]) -> None:
    with pq.ParquetWriter(file, GOOD.schema) as writer:
        for group in groups:
            writer.write_table(group)


def _make_whole(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


GOOD_ROWS = make_rows(4)
WHOLE_OF_GOOD = _make_whole(GOOD)


def _make_arrow() -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, GOOD.schema) as writer:
        writer.write_table(GOOD)
    return out.getvalue()


def _cut_footer(count: int) -> bytes:
    """The footer shorter at its end, and its length as it then is."""
    length = struct.unpack("<I", WHOLE[-8:-4])[0]
    return WHOLE[: -8 - count] + struct.pack("<I", length - count) + b"PAR1"


def _encode_count(count: int) -> bytes:
    """A number as thrift's compact protocol writes it: zigzag, seven bits a byte, the lowest first."""
    rest, out = (count << 1) ^ (count >> 63), bytearray()
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest])


def _replace_in_footer(old: bytes, new: bytes) -> bytes:
    length = struct.unpack("<I", WHOLE[-8:-4])[0]
    footer = WHOLE[-8 - length : -8]
    assert old in footer
    footer = footer.replace(old, new, 1)
    return WHOLE[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def _promise_rows(count: int) -> bytes:
    """Field 3 of the footer (i64), before the list of row groups; 60 rows are there."""
    return _replace_in_footer(b"\x16" + _encode_count(60) + b"\x19", b"\x16" + _encode_count(count) + b"\x19")


def _promise_group(count: int) -> bytes:
    """Field 3 of a row group (i64), before its offset; 20 rows are there."""
    return _replace_in_footer(b"\x16" + _encode_count(20) + b"\x26", b"\x16" + _encode_count(count) + b"\x26")


def _link_in_a_circle(folder: Path) -> str:
    (folder / "a.parquet").symlink_to("b.parquet")
    (folder / "b.parquet").symlink_to("a.parquet")
    return r"a\.parquet"


class _Keys(encryption.KmsClient):
    """Keeps no secret: it is for files that must be refused."""

    def __init__(self, config: Any) -> None:
        encryption.KmsClient.__init__(self)

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, name: str) -> bytes:
        return base64.b64decode(wrapped)


def _write_encrypted(file: Path, plaintext_footer: bool) -> None:
    config = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["question", "chosen"]}, plaintext_footer=plaintext_footer
    )
    properties = encryption.CryptoFactory(_Keys).file_encryption_properties(encryption.KmsConnectionConfig(), config)
    with pq.ParquetWriter(file, GOOD.schema, encryption_properties=properties) as writer:
        writer.write_table(GOOD)


FILE_CASES: dict[str, Callable[[Path], str]] = {
    "no bytes": _write(b""),
    "one byte": _write(b"P"),
    "magic alone": _write(b"PAR1"),
    "magic twice": _write(b"PAR1PAR1"),
    "text": _write(b"image,question,chosen\n"),
    "JSON lines": _write(b'{"question": "what"}\n' * 40),
    "a Git LFS pointer": _write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "an HTML page": _write(b"<!doctype html><title>Sign in</title>" * 9),
    "zeros": _write(bytes(4096)),
    "no footer": _write(WHOLE[:-8]),
    "half": _write(WHOLE[: len(WHOLE) // 2]),
    "nine tenths": _write(WHOLE[: len(WHOLE) * 9 // 10]),
    "the last byte missing": _write(WHOLE[:-1]),
    "the first half missing": _write(WHOLE[len(WHOLE) // 2 :]),
    "wrong magic at the end": _write(WHOLE[:-4] + b"PARX"),
    "an encrypted footer's magic": _write(WHOLE[:-4] + b"PARE"),
    "footer longer than the file": _write(WHOLE[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1"),
    "footer of no length": _write(WHOLE[:-8] + struct.pack("<I", 0) + b"PAR1"),
    "footer of noise": _write(WHOLE[:-1200] + np.random.default_rng(1).bytes(1192) + WHOLE[-8:]),
    "twice over": _write(WHOLE[: len(WHOLE) // 3] + WHOLE[: len(WHOLE) // 2]),
    "pages of ones": lambda folder: (spoil_middle(folder / "a.parquet"), r"a\.parquet")[1],
    "the second shard empty": _write_two(lambda file: file.write_bytes(b"")),
    "the second shard cut": _write_two(lambda file: file.write_bytes(WHOLE[:-100])),
    "the second shard's pages spoilt": _write_two(spoil_middle),
    "the second shard a pipe": _write_two(lambda file: os.mkfifo(file), r"b\.parquet is no regular file"),
    "the second shard a link to nowhere": _write_two(lambda file: file.symlink_to("/nowhere/at/all.parquet")),
    "the second shard without rejected": _write_two(
        lambda file: write_rows(file, make_rows(3), drop=["rejected"]),
        r"b\.parquet and .*a\.parquet disagree.*'rejected'",
    ),
    "the second shard without image": _write_two(
        lambda file: write_rows(file, make_rows(3), drop=["image"]), r"b\.parquet lacks 'image'"
    ),
    "the second shard with numbers for images": _write_two(
        lambda file: pq.write_table(replace_column("image", pa.array([1, 2, 3, 4])), file),
        r"b\.parquet.*'image' is int64",
    ),
    "a folder alone": lambda folder: ((folder / "x.parquet").mkdir(), "is of no form that is read")[1],
    "no file": lambda folder: "is of no form that is read",
    "no rows": _write_table(GOOD.slice(0, 0), "has no rows"),
    "no columns": _write_table(pa.table({}), "lacks 'image', 'question', 'chosen'"),
    "one column twice": _write_table(GOOD.append_column("question", pa.array(["x"] * 4)), "question"),
    "columns in capitals": _write_table(GOOD.rename_columns([name.upper() for name in GOOD.column_names]), "lacks"),
    "columns of blanks": _write_table(GOOD.rename_columns([f" {name}" for name in GOOD.column_names]), "lacks"),
    "no image in any row": _write_table(replace_column("image", pa.array([None] * 4, IMAGE)), "4 × no image"),
    "bytes as numbers": _write_table(
        replace_column("image", pa.array([{"bytes": 3, "path": ""}] * 4)), "'image' is struct"
    ),
    "bytes as lists": _write_table(
        replace_column("image", pa.array([{"bytes": [1, 2], "path": ""}] * 4)), "'image' is struct"
    ),
    "images as lists of numbers": _write_table(replace_column("image", pa.array([[1]] * 4)), "'image' is list"),
    "images as lists of lists": _write_table(replace_column("image", pa.array([[[b"x"]]] * 4)), "'image' is list"),
    "images as numbers in a dictionary": _write_table(
        replace_column("image", pa.array([3] * 4).dictionary_encode()), "'image' is int64"
    ),
    "images as maps": _write_table(
        replace_column("image", pa.array([[("bytes", b"x")]] * 4, pa.map_(pa.string(), pa.binary()))), "'image' is map"
    ),
    "images as decimals": _write_table(
        replace_column("image", pa.array([None] * 4, pa.decimal128(9, 2))), "'image' is decimal"
    ),
    "images as moments": _write_table(
        replace_column("image", pa.array([1] * 4, pa.timestamp("us"))), "'image' is timestamp"
    ),
    "images of no type": _write_table(replace_column("image", pa.nulls(4)), "'image' is null"),
    "images of a fixed size": _write_table(
        replace_column("image", pa.array([b"abc"] * 4, pa.binary(3))), "'image' is fixed_size_binary"
    ),
    "answers as lists of lists": _write_table(replace_column("chosen", pa.array([[["a"]]] * 4)), "'chosen' is list"),
    "answers as lists of numbers": _write_table(replace_column("chosen", pa.array([[1]] * 4)), "'chosen' is list"),
    "answers as structs of others": _write_table(
        replace_column("chosen", pa.array([[{"text": "a"}]] * 4)), "'chosen' is list.*of structs with a text 'answer'"
    ),
    "answers as structs of numbers": _write_table(
        replace_column("chosen", pa.array([[{"answer": 1}]] * 4)), "'chosen' is list"
    ),
    "answers as moments": _write_table(
        replace_column("chosen", pa.array([1] * 4, pa.timestamp("ns"))), "'chosen' is timestamp"
    ),
    "answers as spans of time": _write_table(
        replace_column("chosen", pa.array([1] * 4, pa.duration("s"))), "'chosen' is duration"
    ),
    "questions as maps": _write_table(
        replace_column("question", pa.array([[("a", "b")]] * 4, pa.map_(pa.string(), pa.string()))), "'question' is map"
    ),
    "the image twice": _write_table(GOOD.append_column("image", GOOD.column("image")), "more than one column 'image'"),
    "the client twice": _write_table(
        GOOD.append_column("client", pa.array(["a"] * 4)).append_column("client", pa.array(["b"] * 4)),
        "more than one column 'client'",
    ),
    "another column twice": _write_table(
        GOOD.append_column("x", pa.array(["a"] * 4)).append_column("x", pa.array(["b"] * 4)),
        "more than one column 'x'",
    ),
    "a CSV": _write(b"image,question,chosen\n" + b"a.png,what,that\n" * 1000),
    "a CSV in UTF-16": _write("image,question,chosen\n".encode("utf-16")),
    "a JSON array": _write(b'[{"image": "a.png", "question": "what", "chosen": "that"}]'),
    "an Arrow file": _write(_make_arrow()),
    "a parquet file in gzip": _write(gzip.compress(WHOLE)),
    "a ZIP": _write(b"PK\x03\x04" + WHOLE),
    "a database": _write(b"SQLite format 3\0" + bytes(4096)),
    "an ORC file": _write(b"ORC" + bytes(400) + b"ORC"),
    "encrypted by its magic": _write(b"PARE" + WHOLE[4:-4] + b"PARE"),
    "encrypted": lambda folder: (_write_encrypted(folder / "a.parquet", False), r"a\.parquet")[1],
    "encrypted pages": lambda folder: (_write_encrypted(folder / "a.parquet", True), r"a\.parquet")[1],
    "a footer cut by a byte": _write(_cut_footer(1)),
    "a footer cut by half": _write(_cut_footer(700)),
    "rows promised that are not there": _write(_promise_rows(2**40)),
    "rows promised below zero": _write(_promise_rows(-5)),
    "a row group that promises 2^40 rows": _write(_promise_group(2**40)),
    "a row group that promises fewer rows": _write(_promise_group(3)),
    "a link to itself": lambda folder: ((folder / "a.parquet").symlink_to("a.parquet"), r"a\.parquet")[1],
    "links in a circle": _link_in_a_circle,
    "a link to an endless device": lambda folder: (
        (folder / "a.parquet").symlink_to("/dev/zero"),
        r"a\.parquet is no regular file",
    )[1],
    "the first shard a pipe": lambda folder: (
        os.mkfifo(folder / "a.parquet"),
        write_rows(folder / "b.parquet", make_rows(3)),
        r"a\.parquet is no regular file",
    )[2],
    "images as dates": _write_table(replace_column("image", pa.array([1] * 4, pa.date32())), "'image' is date32"),
    "images as other structs": _write_table(replace_column("image", pa.array([{"url": "x"}] * 4)), "'image' is struct"),
}
"""Name -> what fills a folder; the error's message matches what it returns."""

TEXT_COLUMNS = ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "client", "split", "ds_name")
WRONG_TYPES: dict[str, pa.Array] = {
    "double": pa.array([1.5, 2.0, -0.0, float("nan")]),
    "bool": pa.array([True, False, None, True]),
    "list": pa.array([["a"], [], None, ["b", "c"]]),
    "struct": pa.array([{"x": "a"}] * 4),
    "binary": pa.array([b"a", b"\xff", b"", None]),
    "timestamp": pa.array([0, 1, 2, None], pa.timestamp("us")),
    "list of lists": pa.array([[["a"]], [], None, [["b"]]]),
    "decimal128": pa.array([None] * 4, pa.decimal128(5, 2)),
}
"""Types that are no text, which a text column must not have."""

READ_AS_TEXT: dict[str, pa.Array] = {
    "negative numbers": pa.array([-(2**63), -1, 0, 2**63 - 1]),
    "huge numbers": pa.array([0, 1, 2**63, 2**64 - 1], pa.uint64()),
    "small numbers": pa.array([1, None, -128, 127], pa.int8()),
    "large text": pa.array(["a", "b", "", None], pa.large_string()),
    "a dictionary": pa.array(["a", "b", "a", None]).dictionary_encode(),
    "nulls": pa.nulls(4),
}
"""Types that are no plain text and yet can be read as text."""

ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a column without a name": lambda file: pq.write_table(GOOD.append_column("", pa.array(["x"] * 4)), file),
    "a column with a name of 5000 letters": lambda file: pq.write_table(
        GOOD.append_column("n" * 5000, pa.array(["x"] * 4)), file
    ),
    "a column with a name of control characters": lambda file: pq.write_table(
        GOOD.append_column("a\n\x1b[31m\t", pa.array(["x"] * 4)), file
    ),
    "a column that differs by case": lambda file: pq.write_table(
        GOOD.append_column("Question", pa.array([1.5] * 4)), file
    ),
    "metadata of a megabyte": lambda file: pq.write_table(
        GOOD.replace_schema_metadata({"huggingface": "{" * 1_000_000}), file
    ),
    "no Arrow schema": lambda file: pq.write_table(GOOD, file, store_schema=False),
    "row groups of one row": lambda file: pq.write_table(GOOD, file, row_group_size=1),
    "an empty row group": lambda file: _write_groups(file, [GOOD.slice(0, 0), GOOD, GOOD.slice(0, 0)]),
    "an old version": lambda file: pq.write_table(GOOD, file, version="1.0"),
    "new pages": lambda file: pq.write_table(GOOD, file, data_page_version="2.0"),
    "checksums": lambda file: pq.write_table(GOOD, file, write_page_checksum=True),
    "no dictionary, no statistics": lambda file: pq.write_table(
        GOOD, file, use_dictionary=False, write_statistics=False
    ),
    "brotli": lambda file: pq.write_table(GOOD, file, compression="brotli"),
    "lz4": lambda file: pq.write_table(GOOD, file, compression="lz4"),
    "texts in a dictionary": lambda file: pq.write_table(
        replace_column("question", GOOD.column("question").combine_chunks().dictionary_encode()), file
    ),
    "texts as views": lambda file: pq.write_table(
        replace_column("chosen", GOOD.column("chosen").combine_chunks().cast(pa.string_view())), file
    ),
    "images in a dictionary": lambda file: pq.write_table(
        replace_column("image", pa.array([row["image"]["bytes"] for row in GOOD_ROWS]).dictionary_encode()), file
    ),
    "images in lists": lambda file: pq.write_table(
        replace_column("image", pa.array([[row["image"]] for row in GOOD_ROWS], pa.list_(IMAGE))), file
    ),
    "a link": lambda file: ((file.parent / "x.dat").write_bytes(WHOLE_OF_GOOD), file.symlink_to("x.dat")),
}
"""Files of an odd form that hold `GOOD` all the same."""

EXTRA_COLUMNS: dict[str, pa.Array] = {
    "map": pa.array([None] * 4, pa.map_(pa.string(), pa.int32())),
    "deep struct": pa.array([{"a": {"b": [1]}}] * 4),
    "time": pa.array([1] * 4, pa.time64("us")),
    "duration": pa.array([1] * 4, pa.duration("s")),
    "half": pa.array(np.zeros(4, np.float16)),
    "decimal": pa.array([None] * 4, pa.decimal128(38, 9)),
    "fixed bytes": pa.array([b"ab"] * 4, pa.binary(2)),
}
"""Types of columns that nobody asked for; they disturb nothing."""
