"""Malformed files of every form: one clear line that names the file, or a row skipped with its reason."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import LOST, OUTSIDE
from own_data import make_own_rows, make_saved
from words import WordProcessor

from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.tokenization import encode
from fedvlm_jax.errors import UserError
from fedvlm_jax.records import text_files

GOOD = [{"image": f"{n:02d}.png", "question": "What?", "chosen": f"a {n}", "client": "ab"[n % 2]} for n in range(8)]
PICTURE = make_own_rows(1)[0]["bytes"]
BAD = 3
"""Where the malformed row stands."""
DEEP = '{"a":' * 100_000


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:02d}.png").write_bytes(PICTURE + bytes([number]))
    (tmp_path / "secret.png").write_bytes(PICTURE)
    (tmp_path / "secret.jsonl").write_text(json.dumps(GOOD[0]))
    return folder


def find_skipped(path: Path, **options: Any) -> dict[int, str]:
    made = make_options(str(path), max_bad_share=1.0, **options)
    table = read_table(made)
    examples = encode(table, federate(table, made, 0), WordProcessor(), made)
    assert len(examples) + len(examples.skipped) == len(table)
    return {entry.row: entry.reason for entry in examples.skipped}


def change(**changes: Any) -> str:
    return json.dumps(GOOD[BAD] | changes)


def talk(*turns: Any, image: Any = "03.png") -> str:
    return json.dumps({"image": image, "conversations": turns, "client": "a"})


USER, SAYS = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}
SHOWS = [{"role": "assistant", "content": [{"type": "image"}]}]
ALONE = {"prompt": [{"role": "system", "content": "?"}], "chosen": "a", "client": "a"}
IN_ANSWER = "a picture in a turn of the assistant"
ASKS_TWICE = {"from": "human", "value": "<image> or <image>?"}
LINES: dict[str, tuple[str | bytes, str | None]] = {
    "cut": (change()[:-9], "line is no JSON object"),
    "a list": ("[1, 2]", "line is no JSON object"),
    "a number": ("7", "line is no JSON object"),
    "null": ("null", "line is no JSON object"),
    "nested without end": (DEEP, "line is no JSON object"),
    "an endless number": ('{"image": ' + "9" * 5000 + "}", "line is no JSON object"),
    "single quotes": (str(GOOD[BAD]), "line is no JSON object"),
    "NUL": ("\0", "line is no JSON object"),
    "nested below": (change(extra=1)[:-2] + DEEP + "1" + "}" * 100_001, "line is no JSON object"),
    "two pictures": (change(image=["00.png", "01.png"]), "2 pictures, the model takes 1"),
    "two pictures of TRL": (change(image=None, images=["00.png", "01.png"]), "2 pictures, the model takes 1"),
    "nine pictures": (change(image=[f"{n}.png" for n in range(9)]), "more than 8 pictures"),
    "a million pictures": (change(image=[0] * 10**6), "more than 8 pictures"),
    "a second picture in a column": (change(image_2="01.png"), "2 pictures, the model takes 1"),
    "a second picture alone": (change(image=None, image_2="01.png"), "a picture before others is missing"),
    "a second picture that is a number": (change(image_2=7), "image is no picture and no path"),
    "a second picture that is lost": (change(image=["03.png", "lost.png"]), LOST),
    "a second picture outside": (change(image=["03.png", "../secret.png"]), OUTSIDE),
    "one picture in a list": (change(image=["03.png"]), None),
    "no picture": (change(image=None), "no image"),
    "an empty list": (change(image=[]), "no image"),
    "a picture that is a number": (change(image=7), "image is no picture and no path"),
    "a picture that is a truth": (change(image=True), "image is no picture and no path"),
    "a path in a struct": (change(image={"bytes": None, "path": "03.png"}), None),
    "a struct of numbers": (change(image={"bytes": 1, "path": 2}), "image is no picture and no path"),
    "a lost picture": (change(image="lost.png"), LOST),
    "a picture outside": (change(image="../secret.png"), OUTSIDE),
    "a picture of the system": (change(image="/etc/hostname"), OUTSIDE),
    "a picture of the web": (change(image="https://example.org/a.png"), LOST),
    "a path with NUL": (change(image="a\0.png"), LOST),
    "half a surrogate in a path": (change(image="\ud800.png"), LOST),
    "half a surrogate": (change(question="\ud800"), "question is not UTF-8"),
    "half a surrogate in a client": (change(client="\ud800"), "no client"),
    "half a surrogate in a name": (change(**{"\ud800": 1}), None),
    "NUL for a name": (change(**{"\0": 1}), None),
    "names that are one before NUL": (change(**{"client\0": 1, "": 2, "image\0b": 3}), None),
    "no UTF-8": (change(question="X").encode().replace(b"X", b"\xff\xfe"), "question is not UTF-8"),
    "no UTF-8 in an answer": (change(chosen="X").encode().replace(b"X", b"\xff\xfe"), "answer is not UTF-8"),
    "a question that is a list": (change(question=["What?"]), "question is no text"),
    "an answer that is an object": (change(chosen={"text": "a"}), "answer is no text"),
    "answers that are lists": (change(chosen=[["a"]]), "answer is no text"),
    "several answers": (change(chosen=["a", "b", "b"]), None),
    "several answers of people": (change(chosen=[{"answer": "a"}, {"answer": "b"}]), None),
    "no answers": (change(chosen=[]), "empty answer"),
    "not a number": (change(chosen=float("nan")), "empty answer"),
    "an answer that is a number": (change(chosen=7), None),
    "no client": (change(client=None), "no client"),
    "an unknown answer's prompt": (change(rejected={"a": 1}), "rejected answer is no text"),
    "a talk": (talk(USER, SAYS), None),
    "a talk without an answer": (talk(USER), "no assistant turn"),
    "an empty talk": (talk(), "empty question"),
    "a talk that is text": (
        json.dumps({"image": "03.png", "messages": "hello", "client": "a"}),
        "messages are no list",
    ),
    "a talk of texts": (talk("hello"), "a message is no object"),
    "a talk of strangers": (
        talk({"from": "tool", "value": "?"}, SAYS),
        "a message of another role than system, user and assistant",
    ),
    "a talk with a list for a role": (
        talk({"from": ["human"], "value": "?"}, SAYS),
        "a message of another role than system, user and assistant",
    ),
    "a talk with sound": (
        talk({"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, SAYS),
        "a message with something else than text and pictures",
    ),
    "a talk with an empty answer": (talk(USER, {"from": "gpt", "value": ""}), "empty answer"),
    "a talk without end": (talk(*[USER, SAYS] * 501), "more than 1000 messages"),
    "a talk that nobody begins": (talk(SAYS), "empty question"),
    "a talk with half a surrogate": (talk({"from": "human", "value": "\ud800"}, SAYS), "question is not UTF-8"),
    "a talk over several pictures": (talk(USER, SAYS, image=["00.png", "01.png"]), "2 pictures, the model takes 1"),
    "a picture less than its marks": (talk(ASKS_TWICE, SAYS), "1 picture for 2 places"),
    "a picture more than its marks": (talk(ASKS_TWICE, SAYS, image=["03.png"] * 3), "3 pictures for 2 places"),
    "marks without a picture": (talk(ASKS_TWICE, SAYS, image=None), "no image"),
    "marks without end": (talk({"from": "human", "value": "<image>" * 10**6}, SAYS), "1 picture for 1,000,000 places"),
    "a picture in an answer": (talk(USER, {"from": "gpt", "value": "<image> a"}), IN_ANSWER),
    "a picture in an answer of TRL": (change(chosen=SHOWS), IN_ANSWER),
    "a picture in a rejected answer": (change(rejected=SHOWS), IN_ANSWER),
    "a picture in the system's turn": (
        talk({"from": "system", "value": "<image>"}, USER, SAYS),
        "a picture in a turn of the system",
    ),
    "pictures that nobody asks about": (
        json.dumps({"images": ["00.png", "01.png"], **ALONE}),
        "no turn of the user in which its pictures could stand",
    ),
    "code": (change(image="__import__('os').abort()"), LOST),
}


@pytest.mark.parametrize("name", list(LINES))
def test_a_malformed_line_costs_itself_only(name: str, place: Path) -> None:
    line, reason = LINES[name]
    lines: list[str | bytes] = [json.dumps(row) for row in GOOD]
    lines[BAD] = line
    encoded = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (place / "rows.jsonl").write_bytes(encoded)
    assert find_skipped(place) == ({} if reason is None else {BAD: reason})


def test_odd_lines_are_no_rows(place: Path) -> None:
    text = "\ufeff\n" + "\r\n\r\n".join(json.dumps(row) for row in GOOD) + "\n \n"
    (place / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    assert find_skipped(place) == {}


@pytest.mark.parametrize(
    ("items", "reasons"),
    [
        ([1], {0: "record is no JSON object"}),
        (
            [GOOD[0], [], "a", None],
            {1: "record is no JSON object", 2: "record is no JSON object", 3: "record is no JSON object"},
        ),
    ],
)
def test_what_is_no_record_in_a_list_costs_itself_only(items: list[Any], reasons: dict[int, str], place: Path) -> None:
    good = GOOD if len(items) == 1 else GOOD[1:]
    (place / "rows.json").write_text(json.dumps([*items, *good]))
    assert find_skipped(place) == reasons


CSV_ROWS = "\n".join(f"{row['image']},What?,{row['chosen']},{row['client']}" for row in GOOD[:3])
CSV_HEAD = "image,question,chosen,client\n"
CSV: dict[str, tuple[str, dict[int, str]]] = {
    "a cell too many": ("03.png,What?,a,b,c", {3: "row has more or fewer cells than the first row"}),
    "a cell too few": ("03.png,What?,a", {3: "row has more or fewer cells than the first row"}),
    "an empty line": ("", {}),
    "empty cells": (",,,a", {3: "no image"}),
    "a quote inside": ('03.png,"What"?,a,b', {3: "row is no CSV"}),
    "a line break": ('03.png,"What\nis it?",a,b', {}),
    "NUL": ("03.png,What\0?,a,b", {}),
    "NA": ("03.png,What?,NA,a", {}),
    "a picture outside": ("../secret.png,What?,a,b", {3: OUTSIDE}),
}


@pytest.mark.parametrize("name", list(CSV))
def test_a_malformed_row_of_csv_costs_itself_only(name: str, place: Path) -> None:
    row, reasons = CSV[name]
    (place / "rows.csv").write_text(f"{CSV_HEAD}{CSV_ROWS}\n{row}\n04.png,What?,a,a\n")
    assert find_skipped(place) == reasons


def write(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def fill(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return fill


def save(spoil: Callable[[Path], object]) -> Callable[[Path], Path]:
    def fill(folder: Path) -> Path:
        datasets.DatasetDict({"train": make_saved(make_own_rows(4))}).save_to_disk(folder / "saved")
        spoil(folder / "saved")
        return folder / "saved"

    return fill


def set_state(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = folder / "train" / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def spoil_offsets(folder: Path) -> None:
    """Offsets of texts that lead far outside of the file."""
    (file,) = (folder / "train").glob("*.arrow")
    table = pa.table({"image": ["a.png"] * 2, "question": ["What?"] * 2, "chosen": ["x" * 71, "y" * 82]})
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    whole, wild = (np.asarray(offsets, np.int32).tobytes() for offsets in ([0, 71, 153], [0, 2**30, 2**30 + 9]))
    assert whole in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(whole, wild))


def _link_out(folder: Path) -> Path:
    (folder / "metadata.jsonl").symlink_to(folder.parent / "secret.jsonl")
    return folder


def _make_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder


def _write_both_metadata(folder: Path) -> Path:
    write("metadata.csv", "file_name,chosen\n00.png,a\n")(folder)
    write("metadata.jsonl", '{"file_name": "00.png", "chosen": "a"}')(folder)
    return folder


def _write_two(folder: Path) -> Path:
    write("a.csv", CSV_HEAD)(folder)
    write("b.jsonl", "{}")(folder)
    return folder


COCO = '{"images": [{"id": 1, "file_name": "00.png"}], "annotations": [{"image_id": 1, "caption": "a"}'
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no bytes of JSON": (write("a.json", ""), "has no rows"),
    "no bytes of lines": (write("a.jsonl", ""), "has no rows"),
    "no bytes of CSV": (write("a.csv", ""), "has no rows"),
    "names alone": (write("a.csv", CSV_HEAD), "has no rows"),
    "an empty list": (write("a.json", "[]"), "has no rows"),
    "empty objects": (write("a.jsonl", "{}\n{}"), "cannot be read as json"),
    "a picture": (write("a.jsonl", PICTURE), "cannot be read as json: .*line is no JSON object"),
    "a list that is cut": (
        write("a.json", json.dumps(GOOD)[:-20]),
        r"a\.json is no JSON, or cut short, from char",
    ),
    "a list without commas": (write("a.json", "[{} {}]"), r"a\.json is no JSON"),
    "a list with a comma": (write("a.json", "[{},]"), r"a\.json is no JSON"),
    "two lists": (write("a.json", "[{}][{}]"), r"a\.json is no JSON"),
    "a nested list": (write("a.json", "[" + DEEP), r"a\.json is no JSON"),
    "an object of something": (write("a.json", '{\n"data": [{}]}'), "has no annotations and no images"),
    "COCO without images": (write("a.json", '{"annotations": [{"caption": "a"}],\n"x": 1}'), "has no images"),
    "COCO's boxes": (write("a.json", COCO.replace("caption", "bbox") + "]}"), "annotations without 'caption'"),
    "COCO that is cut": (write("a.json", COCO), r"a\.json is no JSON"),
    "COCO with bad pictures alone": (
        write("a.json", COCO.replace('"id": 1', '"id": [1]') + "]}"),
        "cannot be read as coco",
    ),
    "one column twice": (write("a.csv", "image,image\n1,2"), "more than one column 'image'"),
    "quotes that never end": (write("a.csv", f'{CSV_HEAD}a.png,"What?,a,b\n'), "ends inside of quotes"),
    "too many columns": (
        write("a.jsonl", "".join(json.dumps({f"c{n}": 1}) + "\n" for n in range(600))),
        "more than 500 columns",
    ),
    "another file": (write("a.txt", "hello"), "is of no form that is read. Forms are parquet"),
    "two forms": (_write_two, "may be csv or json. Forms are parquet"),
    "pictures of no class": (lambda folder: folder, "least two classes"),
    "metadata that leads out": (_link_out, "leads out of the folder"),
    "metadata of two kinds": (_write_both_metadata, r"metadata\.csv and metadata\.jsonl, of which only one"),
    "CSV in UTF-16": (write("a.csv", CSV_HEAD.encode("utf-16")), r"a\.csv is in UTF-16"),
    "lines in UTF-16": (write("a.jsonl", json.dumps(GOOD[0]).encode("utf-16")), r"a\.jsonl is in UTF-16"),
    "COCO in UTF-16": (write("a.json", (COCO + "]}").encode("utf-16")), r"a\.json is in UTF-16"),
    "talks without an answer": (write("a.json", f"[{talk(USER)}, {talk(USER)}]"), "all 2 rows: no assistant turn"),
    "a pipe": (_make_pipe, "is no regular file"),
    "saved, no state": (
        save(lambda folder: (folder / "train" / "state.json").unlink()),
        "no folder of datasets.save",
    ),
    "saved, state of noise": (
        save(lambda folder: (folder / "train" / "state.json").write_bytes(b"\xff{")),
        "no folder of datasets.save",
    ),
    "saved, no files": (save(set_state(_data_files=[])), "has no rows"),
    "saved, files that are numbers": (save(set_state(_data_files=[{"filename": 7}])), "no folder of datasets.save"),
    "saved, a file that leads out": (save(set_state(_data_files=[{"filename": "../../../secret.jsonl"}])), "leads out"),
    "saved, a file with NUL": (save(set_state(_data_files=[{"filename": "a\0"}])), "leads out"),
    "saved, splits that lead out": (
        save(lambda folder: (folder / "dataset_dict.json").write_text('{"splits": ["../../../../etc"]}')),
        "no folder of datasets.save",
    ),
    "saved, splits of lists": (
        save(lambda folder: (folder / "dataset_dict.json").write_text('{"splits": [[1]]}')),
        "no folder of datasets.save",
    ),
    "saved, Arrow that is cut": (
        save(lambda folder: [file.write_bytes(file.read_bytes()[:900]) for file in folder.glob("train/*.arrow")]),
        r"\.arrow cannot be read to its end",
    ),
    "saved, no Arrow": (
        save(lambda folder: [file.write_bytes(b"hello") for file in folder.glob("train/*.arrow")]),
        r"\.arrow cannot be read to its end",
    ),
    "saved, wild offsets": (save(spoil_offsets), r"\.arrow cannot be read to its end"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_malformed_file_is_one_clear_error(name: str, place: Path) -> None:
    fill, expected = FILES[name]
    path = fill(place)
    with pytest.raises(UserError, match=expected) as caught:
        read_table(make_options(str(path)))
    assert str(place) in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert "\n" not in str(caught.value)


def test_a_column_that_has_another_use_is_not_offered(place: Path) -> None:
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, GOOD)))
    with pytest.raises(
        UserError, match=r"'image' beside those that --data\.columns names; it has 'question', 'chosen', 'c"
    ):
        read_table(make_options(str(place), columns=("rejected=image",)))


def test_a_saved_folder_without_its_description_is_read(place: Path) -> None:
    folder = save(lambda saved: (saved / "train" / "dataset_info.json").unlink())(place) / "train"
    assert len(read_table(make_options(str(folder)))) == 4


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_record_without_end_is_refused_and_not_read_whole(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LONGEST", 10_000)
    monkeypatch.setattr(text_files, "CHUNK", 1000)
    start = "" if name == "rows.jsonl" else "["
    (place / name).write_text(f"{start}{json.dumps(GOOD[0])}{',' if start else ''}\n" + '{"image": "' + "x" * 100_000)
    with pytest.raises(UserError, match=r"has a line of more than 10000 characters|is no JSON, or cut short"):
        read_table(str(place))


@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 10_000])
def test_lists_are_read_whatever_the_parts(chunk: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    rows = [{"n": 12345, "text": 'ä"\\u00e9\\n[{', "nested": {"a": [1, {}]}}, {}, {"n": 1.5e3}]
    (place / "a.json").write_text(f" \n{json.dumps(rows, indent=3)}\n ")
    assert list(text_files.read_json(place / "a.json")) == rows
    (place / "b.json").write_text(
        json.dumps(
            {"a": 1234, "images": [{"id": 12}, {"id": "x"}], "annotations": [{"image_id": 12, "caption": "a"}], "z": {}}
        )
    )
    assert [row["idx"] for row in text_files.read_coco(place / "b.json")] == [12, "x"]


def test_nothing_is_loaded_whole(tmp_path: Path) -> None:
    import tracemalloc

    text = "word " * 400
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",".join(json.dumps({"n": n, "text": text}) for n in range(8000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in text_files.read_json(tmp_path / "a.json")) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20 < (tmp_path / "a.json").stat().st_size


def test_files_that_change_while_they_are_read_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedvlm_jax.data import records_to_arrow

    write("rows.jsonl", "\n".join(map(json.dumps, GOOD)))(place)
    opened = records_to_arrow.open_cached

    def disturb(*content: Any) -> Any:
        (place / "rows.jsonl").write_text(json.dumps(GOOD[0]))
        return opened(*content)

    monkeypatch.setattr(records_to_arrow, "open_cached", disturb)
    with pytest.raises(UserError, match="was changed while it was read"):
        read_table(str(place))


def test_a_folder_may_be_moved(place: Path) -> None:
    write("rows.jsonl", "\n".join(map(json.dumps, GOOD)))(place)
    first = read_table(str(place))
    shutil.move(place, place.parent / "moved")
    second = read_table(str(place.parent / "moved"))
    assert second.read_image(3) == PICTURE + b"\x03"
    assert first.digest == second.digest


NAMES = "image images file_name prompt question chosen rejected messages conversations client role from content value"
WORDS = st.sampled_from([*NAMES.split(), "type", "text", "user", "assistant", "human", "gpt", "bytes", "path"])
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), WORDS)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4)
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.dictionaries(WORDS | st.text(max_size=4), VALUES, max_size=7), min_size=1, max_size=6))
def test_any_records_are_rows_or_skipped_with_a_reason(
    place: Path, records: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, [*GOOD, *records])))
    options = make_options(str(folder), max_bad_share=1.0, turns="each", image_root=place)
    table = read_table(options)
    assert len(table) >= len(GOOD) + len(records)
    examples = encode(table, federate(table, options, 0), WordProcessor(), options)
    assert set(range(len(GOOD))) <= {*examples.rows.tolist()}
    assert len(examples) + len(examples.skipped) == len(table)
    assert all(entry.reason for entry in examples.skipped)
