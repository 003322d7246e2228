"""Folders of parquet shards in exactly RLAIF-V's schema, made up: few rows, many, or gigabytes.

    python tests/rlaif_form.py DIR --rows 5000 --spoil "broken image=5" "duplicate image=9"
    python tests/rlaif_form.py DIR --gigabytes 6

Nothing here pretends to be RLAIF-V: the columns and types are those of its card (openbmb/RLAIF-V-Dataset), the sources
are invented, and the pictures are drawn, noise, or emoji of the set that ships. Sources are as unequal as natural ones
are, prefer different colours and shapes, and answer in different words, so that clients differ in what they see and in
what is right to say. The same arguments give the same rows, byte for byte.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from make_parquet import RLAIF_V, UNICODE
from rlaif_pictures import COLOURS, SHAPES, Picture, Question, draw_noise, draw_odd, draw_scene, draw_sign, read_emoji

Row = dict[str, Any]

SOURCES = {
    "made-up-street": 0.42,
    "made-up-kitchen": 0.25,
    "made-up-harbour": 0.15,
    "made-up-museum": 0.09,
    "made-up-signs": 0.06,
    "made-up-garden": 0.025,
    "made-up-attic": 0.005,
}
"""Source -> share of the rows: the natural clients, the largest 84 times the smallest."""

WORDINGS = ("{}", "It is {}.", "The answer is {}.", "I see: {}")
"""How a source puts its answers."""

FORM_STREAM = 977
"""First integer of the random streams, which keeps them apart from the package's own."""

SPOILS: dict[str, Callable[[Row, int, Row], Row]] = {
    # Unusable; `REASONS` says how each is told.
    "broken image": lambda row, number, other: _put_bytes(row, b"not an image" + row["image"]["bytes"][:40]),
    "truncated image": lambda row, number, other: _put_bytes(row, row["image"]["bytes"][: -len(_bytes(row)) // 2]),
    "empty image": lambda row, number, other: row | {"image": {"bytes": b"", "path": None}},
    "no image": lambda row, number, other: row | {"image": None},
    "lost file": lambda row, number, other: row | {"image": {"bytes": None, "path": f"lost/{number}.png"}},
    "empty question": lambda row, number, other: row | {"question": ("", " \n", None)[number % 3]},
    "empty answer": lambda row, number, other: row | {"chosen": (None, "", "\t")[number % 3]},
    "long question": lambda row, number, other: row | {"question": f"{row['question']} " * 1000},
    # Of no use as a pair.
    "empty rejected": lambda row, number, other: row | {"rejected": (None, "", " ")[number % 3]},
    "equal answers": lambda row, number, other: row | {"rejected": row["chosen"]},
    # Unusual, and as good as any other row.
    "long answer": lambda row, number, other: row | {"chosen": f"{row['chosen']} and so on, " * 300},
    "unicode": lambda row, number, other: row | {"question": f"{UNICODE[number % len(UNICODE)]} {row['question']}"},
    "odd image": lambda row, number, other: _show(row, draw_odd(number), "odd", number),
    "odd origin_split": lambda row, number, other: row | {"origin_split": (None, "", "{", "[1]", "text")[number % 5]},
    "duplicate image": lambda row, number, other: _put_bytes(row, _bytes(other)),
}
"""Kind -> (row, running number, row of another source) -> the spoilt row."""

REASONS = {
    "broken image": "broken or truncated image",
    "truncated image": "broken or truncated image",
    "empty image": "no image",
    "no image": "no image",
    "lost file": "image file cannot be read",
    "empty question": "empty question",
    "empty answer": "empty answer",
    "long question": "prompt too long",
}
"""Kind -> the reason with which such a row is skipped, whatever the objective."""


@dataclass(frozen=True)
class Form:
    """What a folder holds.

    Attributes:
        rows: how many.
        shards: in how many files.
        seed: decides everything drawn.
        sources: origin_dataset -> share of the rows; every source gets one row at least.
        questions_per_image: rows that share a picture, as far as there are questions about it.
        emoji: share of the pictures that are emoji instead of drawn.
        spoil: kind of `SPOILS` -> number of rows it is done to; no row is spoilt twice.
        drop: columns to leave out.
    """

    rows: int = 60
    shards: int = 3
    seed: int = 0
    sources: Mapping[str, float] = field(default_factory=lambda: dict(SOURCES))
    questions_per_image: int = 2
    emoji: float = 0.2
    spoil: Mapping[str, int] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


def write_folder(folder: Path, form: Form | None = None) -> list[Path]:
    """Write `train-00000-of-0000N.parquet` …: 60 rows unless told otherwise, 5,000 in a few seconds."""
    form = form or Form()
    rows = make_form_rows(form)
    cuts = np.linspace(0, len(rows), form.shards + 1).astype(int)
    return [
        _write_shard(_name_shard(folder, number, form.shards), rows[start:end], form.drop)
        for number, (start, end) in enumerate(itertools.pairwise(cuts))
    ]


def write_stream(
    folder: Path, gigabytes: float, seed: int = 0, shard_bytes: int = 2**28, image_bytes: int = 200_000
) -> list[Path]:
    """Write synthetic shards of that many GB (2^30 bytes) in all; memory holds one row group of 64 rows at a time.

    Pictures are JPEG noise of about `image_bytes`. A few are drawn and made unlike each other by a comment inside the
    file: encoding 30,000 would take minutes, and for memory and cache keys only the bytes count.
    """
    pool = _draw_pool(seed, image_bytes)
    size = float(np.mean([len(encoded) for encoded in pool])) + 300
    total = max(1, round(gigabytes * 2**30 / size))
    shards = max(1, round(gigabytes * 2**30 / shard_bytes))
    cuts = np.linspace(0, total, shards + 1).astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    files = [_name_shard(folder, number, shards) for number in range(shards)]
    for file, (start, end) in zip(files, itertools.pairwise(cuts), strict=True):
        with pq.ParquetWriter(file, RLAIF_V, compression="none", use_dictionary=False) as writer:
            for first in range(start, end, 64):
                group = [_make_noise_row(pool, number, seed) for number in range(first, min(first + 64, end))]
                writer.write_table(pa.Table.from_pylist(group, RLAIF_V))
    return files


def make_form_rows(form: Form) -> list[Row]:
    """All rows of a folder, sources mixed; `idx` counts them in the order of the files."""
    rng = np.random.default_rng([FORM_STREAM, form.seed])
    drawn: list[Row] = []
    for number, (source, count) in enumerate(_count_rows(form).items()):
        drawn += _make_source(form, number, source, count)
    rows = [drawn[place] | {"idx": str(number)} for number, place in enumerate(rng.permutation(len(drawn)))]
    unknown = sorted(set(form.spoil) - set(SPOILS))
    if unknown or sum(form.spoil.values()) > len(rows):
        raise ValueError(f"cannot spoil {form.spoil} of {len(rows)} rows; kinds are {', '.join(SPOILS)}")
    whole, places = list(rows), iter(rng.permutation(len(rows)).tolist())
    for kind, count in form.spoil.items():
        for number in range(count):
            place = next(places)
            row = rows[place]
            others = [one for one in whole if one["origin_dataset"] != row["origin_dataset"]] or whole
            rows[place] = SPOILS[kind](row, number, others[(31 * number) % len(others)])
    return rows


def _count_rows(form: Form) -> dict[str, int]:
    """Rows per source: by share, at least one; the largest source takes what rounding leaves."""
    counts = {name: max(1, round(share * form.rows)) for name, share in form.sources.items()}
    largest = max(counts, key=lambda name: counts[name])
    counts[largest] += form.rows - sum(counts.values())
    if counts[largest] < 1:
        raise ValueError(f"{form.rows} rows are too few for {len(counts)} sources")
    return counts


def _make_source(form: Form, number: int, source: str, count: int) -> list[Row]:
    """One source's rows. Every picture has its own random stream, so fewer rows are the first of more."""
    taste = np.random.default_rng([FORM_STREAM, form.seed, number])
    colours, shapes = taste.dirichlet(np.full(len(COLOURS), 0.7)), taste.dirichlet(np.full(len(SHAPES), 0.9))
    # Every source has emoji of its own, each once: no picture is at two clients unless `duplicate image` puts it there.
    emoji = list(read_emoji()[number :: len(form.sources)]) if form.emoji else []
    rows: list[Row] = []
    for place in range(count):
        if len(rows) >= count:
            break
        rng = np.random.default_rng([FORM_STREAM, form.seed, number, place])
        kind, chance = float(rng.random()), float(rng.random())
        if kind < form.emoji and emoji:
            picture = emoji.pop()
        elif chance < 0.75:
            picture = draw_scene(rng, colours, shapes, number)
        elif chance < 0.95:
            picture = draw_sign(rng, number)
        else:
            picture = draw_noise(rng)
        asked = rng.permutation(len(picture.questions))[: form.questions_per_image]
        wording = WORDINGS[number % len(WORDINGS)]
        rows += [_make_row(source, place, picture, picture.questions[which], wording) for which in asked]
    return rows[:count]


def _make_row(source: str, place: int, picture: Picture, question: Question, wording: str) -> Row:
    about = {"model": "none: made up", "labeller": "none: made up", "type": question.kind}
    name = f"{source}-{place:06d}{picture.suffix}"
    short = question.kind == "question answering"
    return {
        "ds_name": "made-up",
        "image": {"bytes": picture.encoded, "path": name},
        "question": question.text,
        "chosen": wording.format(question.chosen) if short else question.chosen,
        "rejected": wording.format(question.rejected) if short else question.rejected,
        "origin_dataset": source,
        # The card calls the column JSON; "like" it is also Python's own way of writing a dictionary.
        "origin_split": str(about) if place % 4 == 3 else json.dumps(about),
        "idx": "",
        "image_path": f"{source}/{name}",
    }


def _make_noise_row(pool: Sequence[bytes], number: int, seed: int) -> Row:
    source = list(SOURCES)[number % len(SOURCES)]
    comment = f"row {number} of seed {seed}".encode()
    whole = pool[number % len(pool)]
    # A JPEG may hold a comment segment right after its first two bytes: FF FE, length (itself included), text.
    encoded = whole[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + whole[2:]
    question = Question(f"What can be seen here, in picture {number % 97}?", "noise", "a quiet street")
    return _make_row(source, number, Picture(encoded, ".jpg", (question,)), question, "{}") | {"idx": str(number)}


def _draw_pool(seed: int, image_bytes: int) -> list[bytes]:
    """Sixteen pictures of noise, 4:3, whose files have about the wanted size."""
    trial = len(draw_noise(np.random.default_rng(0), 128, 96).encoded)
    side = 32 * (image_bytes / trial) ** 0.5
    return [
        draw_noise(np.random.default_rng([FORM_STREAM, seed, number]), round(4 * side), round(3 * side)).encoded
        for number in range(16)
    ]


def _bytes(row: Row) -> bytes:
    return (row["image"] or {}).get("bytes") or b""


def _put_bytes(row: Row, encoded: bytes) -> Row:
    return row | {"image": {**row["image"], "bytes": encoded}}


def _show(row: Row, picture: Picture, folder: str, number: int) -> Row:
    (asked,) = picture.questions
    name = f"{folder}-{number}{picture.suffix}"
    shown = {"image": {"bytes": picture.encoded, "path": name}, "image_path": f"{folder}/{name}"}
    return row | shown | {"question": asked.text, "chosen": asked.chosen, "rejected": asked.rejected}


def _name_shard(folder: Path, number: int, shards: int) -> Path:
    return folder / f"train-{number:05d}-of-{shards:05d}.parquet"


def _write_shard(file: Path, rows: Sequence[Row], drop: Iterable[str]) -> Path:
    schema = pa.schema([column for column in RLAIF_V if column.name not in set(drop)])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), file, row_group_size=256)
    return file


def _read_spoil(word: str) -> tuple[str, int]:
    kind, _, count = word.partition("=")
    if kind not in SPOILS or not (count or "1").isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r}: expected KIND=COUNT, KIND one of {', '.join(SPOILS)}")
    return kind, int(count or 1)


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spoil", type=_read_spoil, nargs="*", default=[], metavar="KIND=COUNT")
    parser.add_argument("--drop", nargs="*", default=[], metavar="COLUMN")
    parser.add_argument("--gigabytes", type=float, help="write so many GB of noise pictures instead")
    words = parser.parse_args()
    if words.gigabytes:
        files = write_stream(words.folder, words.gigabytes, words.seed)
    else:
        form = Form(words.rows, words.shards, words.seed, spoil=dict(words.spoil), drop=tuple(words.drop))
        files = write_folder(words.folder, form)
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes in {words.folder}")  # noqa: T201


if __name__ == "__main__":
    main()
