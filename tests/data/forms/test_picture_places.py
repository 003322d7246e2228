"""Several pictures in a record: every form gives the same rows, and where they stand in the prompt is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_parquet import draw_image

from fedvlm_jax.data.config import FAULT, PICTURE_COLUMNS, TURNS
from fedvlm_jax.data.forms.base import Reading
from fedvlm_jax.data.record_rows import make_rows
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.records.files import Part

ALBUMS = [(0,), (1, 2), (3, 4, 5), (2, 1)]
"""The pictures of each row."""
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "Alike?"}
FIRST = [None, *([{"role": "user", "content": [IMAGE] * len(album) + [TEXT]}] for album in ALBUMS[1:])]
"""The turns of each row where nothing says where its pictures stand."""


def name(picture: int) -> str:
    return f"{picture}.png"


def embed(picture: int) -> dict[str, Any]:
    return {"bytes": draw_image(picture), "path": None}


def make_record(album: tuple[int, ...], column: str, write: Callable[[int], Any]) -> dict[str, Any]:
    return {column: [write(picture) for picture in album], "question": "Alike?", "chosen": "no", "client": "a"}


def write_json(folder: Path) -> Path:
    rows = [make_record(album, "images", name) for album in ALBUMS]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write_metadata(folder: Path) -> Path:
    rows = [make_record(album, "file_names", name) for album in ALBUMS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_csv(folder: Path) -> Path:
    rows = [",".join([*map(name, album), *[""] * (3 - len(album)), "Alike?", "no", "a"]) for album in ALBUMS]
    (folder / "rows.csv").write_text("\n".join(["left,image_2,image_3,question,chosen,client", *rows]))
    return folder / "rows.csv"


def write_parquet(item: pa.DataType, write: Callable[[int], Any]) -> Callable[[Path], Path]:
    def fill(folder: Path) -> Path:
        rows = [make_record(album, "images", write) for album in ALBUMS]
        types = {"images": pa.list_(item), **dict.fromkeys(("question", "chosen", "client"), pa.string())}
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(types.items()))), folder / "rows.parquet")
        return folder / "rows.parquet"

    return fill


def write_columns(folder: Path) -> Path:
    """Embedded pictures in columns of their own."""
    held = {
        column: [embed(album[place]) if place < len(album) else None for album in ALBUMS]
        for place, column in enumerate(PICTURE_COLUMNS[:3])
    }
    rest = {"question": ["Alike?"] * 4, "chosen": ["no"] * 4, "client": ["a"] * 4}
    pq.write_table(pa.table({**held, **rest}), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder: Path) -> Path:
    columns = [make_record(album, "images", embed) for album in ALBUMS]
    made = datasets.Dataset.from_list(columns).cast_column("images", datasets.List(datasets.Image()))
    made.save_to_disk(folder / "saved")
    return folder / "saved"


def write_messages(folder: Path) -> Path:
    """TRL's form, with the pictures in a column of `datasets`."""
    rows = [
        {
            "images": [embed(picture) for picture in album],
            "prompt": [{"role": "user", "content": [{"type": "image", "text": None}] * len(album) + [TEXT]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
            "client": "a",
        }
        for album in ALBUMS
    ]
    made = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    made.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_inside(folder: Path) -> Path:
    """Pictures that stand in the messages, as bytes."""
    parts = [[{"type": "image", "image": embed(picture), "text": None} for picture in album] for album in ALBUMS]
    rows = [
        {
            "messages": [
                {"role": "user", "content": [*held, {"image": None, **TEXT}]},
                {"role": "assistant", "content": [{"type": "text", "text": "no", "image": None}]},
            ],
            "client": "a",
        }
        for held in parts
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FORMS: dict[str, tuple[dict[str, Any], Callable[[Path], Path]]] = {
    "JSON": ({}, write_json),
    "metadata": ({}, write_metadata),
    "CSV": ({"columns": ("image=left",)}, write_csv),
    "parquet": ({}, write_parquet(STRUCT, embed)),
    "parquet of bytes": ({}, write_parquet(pa.binary(), draw_image)),
    "parquet of paths": ({}, write_parquet(pa.string(), name)),
    "columns": ({}, write_columns),
    "saved": ({}, write_saved),
    "TRL": ({}, write_messages),
    "inside messages": ({}, write_inside),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_pictures_in_their_places(form: str, tmp_path: Path) -> None:
    for picture in range(6):
        (tmp_path / name(picture)).write_bytes(draw_image(picture))
    needed, write = FORMS[form]
    table = read_table(make_options(str(write(tmp_path)), **needed))
    assert FAULT not in table.columns
    assert table.most_pictures == 3
    assert table.count_pictures(range(4)).tolist() == list(map(len, ALBUMS))
    for row, album in enumerate(ALBUMS):
        found = [table.read_image(row, place) for place in range(len(album))]
        assert found == [draw_image(picture) for picture in album]
    assert table.read_text("question") == ["Alike?"] * 4
    assert [json.loads(turns or "null") for turns in table.read_text(TURNS)] == FIRST


def test_a_table_has_columns_for_as_many_pictures_as_a_row_has(tmp_path: Path) -> None:
    rows = [make_record(album, "images", embed) for album in ((0,), (1,))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    table = read_table(str(tmp_path / "rows.parquet"))
    assert table.most_pictures == 1
    assert not {*PICTURE_COLUMNS[1:], TURNS} & {*table.columns}
    assert table.count_pictures([1, 0]).tolist() == [1, 1]


def ask(text: str, role: str = "human") -> dict[str, str]:
    return {"from": role, "value": text}


SAYS = ask("no", "gpt")
PLACES: dict[str, tuple[int, list[Any], list[Any] | None]] = {
    "one before": (1, [ask("<image>\nAlike?"), SAYS], None),
    "one without a mark": (1, [ask("Alike?"), SAYS], None),
    "one after": (1, [ask("Alike?\n<image>"), SAYS], [[TEXT, IMAGE]]),
    "two before": (2, [ask("<image>\n<image>\nAlike?"), SAYS], [[IMAGE, IMAGE, TEXT]]),
    "two without marks": (2, [ask("Alike?"), SAYS], [[IMAGE, IMAGE, TEXT]]),
    "two between": (
        2,
        [ask("A: <image>\nB: <image>\nAlike?"), SAYS],
        [[{"type": "text", "text": "A: "}, IMAGE, {"type": "text", "text": "\nB: "}, IMAGE,
          {"type": "text", "text": "\nAlike?"}]],
    ),
    "one a turn": (
        2,
        [ask("<image>\nWhat?"), ask("a cat", "gpt"), ask("And <image>?"), SAYS],
        [[IMAGE, {"type": "text", "text": "What?"}], "a cat",
         [{"type": "text", "text": "And "}, IMAGE, {"type": "text", "text": "?"}]],
    ),
    "behind the system": (1, [ask("Be brief.", "system"), ask("Alike?"), SAYS], ["Be brief.", [IMAGE, TEXT]]),
    "a picture alone": (1, [ask("<image>"), SAYS, ask("Why?"), SAYS], [[IMAGE], "no", "Why?"]),
}  # fmt: skip


def make(record: dict[str, Any], **reading: Any) -> list[dict[str, Any]]:
    return make_rows({"client": "a", **record}, Part(Path("rows.jsonl"), "rows.jsonl"), Reading(**reading))


@pytest.mark.parametrize("case", list(PLACES))
def test_marks_of_llava_say_where_pictures_stand(case: str) -> None:
    count, talk, contents = PLACES[case]
    (row,) = make({"image": [name(n) for n in range(count)], "conversations": talk})
    assert FAULT not in row
    assert [turn["content"] for turn in json.loads(row.get(TURNS, "[]"))] == (contents or [])
    if contents is not None:  # the same as messages, whose parts say it
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        said = zip((roles[turn["from"]] for turn in talk), [*contents, "no"], strict=True)
        messages = [{"role": role, "content": content} for role, content in said]
        (other,) = make({"images": [name(n) for n in range(count)], "messages": messages})
        assert other[TURNS] == row[TURNS]


def test_marks_in_texts_that_are_not_llava_s_are_text() -> None:
    text = "Is <image> a tag?"
    for record in (
        {"question": text, "chosen": "yes"},
        {"prompt": [{"role": "user", "content": text}], "chosen": "yes"},
    ):
        (row,) = make({"images": ["0.png", "1.png"], **record})
        (turn,) = json.loads(row[TURNS])
        assert turn["content"] == [IMAGE, IMAGE, {"type": "text", "text": text}]
        assert row["question"] == text


def test_an_answer_sees_the_pictures_that_were_shown_before_it() -> None:
    talk = [ask("Hello!"), ask("Hi.", "gpt"), ask("<image> What?"), SAYS, ask("And <image>?"), SAYS]
    rows = make({"id": "r", "image": ["0.png", "1.png"], "conversations": talk}, each=True)
    shown = [[row[column]["path"] for column in PICTURE_COLUMNS if row.get(column)] for row in rows]
    assert shown == [[], ["0.png"], ["0.png", "1.png"]]
    (last,) = make({"image": ["0.png", "1.png"], "conversations": talk})
    assert last[TURNS] == rows[2][TURNS]


def test_a_question_for_all_takes_the_pictures_of_turns_without_text() -> None:
    (row,) = make({"image": ["0.png", "1.png"], "conversations": [ask("<image><image>"), SAYS]}, question="Alike?")
    assert json.loads(row[TURNS]) == FIRST[1]


def test_the_first_picture_s_folder_names_the_client() -> None:
    (row,) = make({"image": ["north/0.png", "south/1.png"], "question": "?", "chosen": "a"}, client_folder=1)
    assert row["client"] == "north"


TEXTS = st.lists(st.sampled_from(["<image>", "a", " ", "\n"]), max_size=5).map("".join)


@given(
    talk=st.lists(st.tuples(st.sampled_from(["system", "human", "gpt"]), TEXTS), max_size=5),
    count=st.integers(0, 4),
    each=st.booleans(),
    question=st.sampled_from(["", "What?"]),
)
@settings(max_examples=300, deadline=None)
def test_turns_always_have_as_many_places_as_the_row_has_pictures(
    talk: list[tuple[str, str]], count: int, each: bool, question: str
) -> None:
    messages = [ask(text, role) for role, text in talk]
    rows = make({"image": [name(n) for n in range(count)], "conversations": messages}, each=each, question=question)
    for row in rows:
        held = [column for column in PICTURE_COLUMNS if row.get(column)]
        assert held == [*PICTURE_COLUMNS[: len(held)]]
        if FAULT in row:
            assert not held
            continue
        turns = json.loads(row.get(TURNS, "[]"))
        places = sum(part == IMAGE for turn in turns for part in turn["content"] if isinstance(turn["content"], list))
        assert places == len(held) if turns else len(held) < 2
        assert "<image>" not in (row["question"] or "") + row.get(TURNS, "")
