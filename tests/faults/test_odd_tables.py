"""Tables of odd types: read where they say the same in another way, one clear line otherwise."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_parquet import IMAGE, draw_image, make_row, make_rows, write_rows
from malformed import GOOD, LOST, replace_column
from words import WordProcessor

import fedvlm_jax
from fedvlm_jax.data.config import FAULT
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.image_decoding import BrokenImageError
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.table import UNREADABLE, Table
from fedvlm_jax.data.tokenization import Examples, encode
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError

PICTURES = [draw_image(number) for number in range(4)]
STRUCTS = [{"bytes": picture, "path": None} for picture in PICTURES]
VIEWS = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
LARGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])


def write(folder: Path, table: pa.Table) -> Path:
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def read(folder: Path, column: str, values: pa.Array) -> Table:
    return read_table(str(write(folder, replace_column(column, values))))


def encode_file(path: Path, **choices: Any) -> Examples:
    options = make_options(source=str(path), **choices)
    table = read_table(options)
    return encode(table, federate(table, options, 0), WordProcessor(), options)


IMAGE_TYPES: dict[str, Callable[[], pa.Array]] = {
    "bytes": lambda: pa.array(PICTURES),
    "large bytes": lambda: pa.array(PICTURES, pa.large_binary()),
    "views of bytes": lambda: pa.array(PICTURES, pa.binary_view()),
    "a struct of views": lambda: pa.array(STRUCTS, VIEWS),
    "a struct of large ones": lambda: pa.array(STRUCTS, LARGE),
    "a struct of more": lambda: pa.array([{**struct, "size": 3} for struct in STRUCTS]),
    "a list of one": lambda: pa.array([[struct] for struct in STRUCTS], pa.list_(IMAGE)),
    "a large list of one": lambda: pa.array([[struct] for struct in STRUCTS], pa.large_list(IMAGE)),
    "a fixed list of one": lambda: pa.array([[picture] for picture in PICTURES], pa.list_(pa.binary(), 1)),
    "a list of one's bytes": lambda: pa.array([[picture] for picture in PICTURES]),
    "a dictionary": lambda: pa.array(PICTURES).dictionary_encode(),
}


@pytest.mark.parametrize("name", list(IMAGE_TYPES))
def test_pictures_are_read_from_every_layout(tmp_path: Path, name: str) -> None:
    table = read(tmp_path, "image", IMAGE_TYPES[name]())
    assert [table.read_image(row) for row in range(4)] == PICTURES


def test_lists_of_no_picture_and_of_several(tmp_path: Path) -> None:
    lists = [[STRUCTS[0]], [], None, [STRUCTS[3]]]
    table = read(tmp_path, "image", pa.array(lists, pa.list_(IMAGE)))
    assert [table.read_image(0), table.read_image(3)] == [PICTURES[0], PICTURES[3]]
    for row in (1, 2):
        with pytest.raises(BrokenImageError, match="no image"):
            table.read_image(row)
    (tmp_path / "b").mkdir()
    lists = [[STRUCTS[0]], STRUCTS[:2], [None, STRUCTS[1]], [STRUCTS[2], None, STRUCTS[3]]]
    several = read(tmp_path / "b", "image", pa.array(lists, pa.list_(IMAGE)))
    assert several.read_text(FAULT) == [None, None, None, "a picture before others is missing"]
    assert several.most_pictures == 2
    assert [several.read_image(row, place) for row, place in ((0, 0), (1, 0), (1, 1), (2, 0))] == [
        PICTURES[number] for number in (0, 0, 1, 1)
    ]


TEXTS = ["What is it?", "Où ?", "", None]
TEXT_TYPES: dict[str, Callable[[], pa.Array]] = {
    "views": lambda: pa.array(TEXTS, pa.string_view()),
    "large": lambda: pa.array(TEXTS, pa.large_string()),
    "a dictionary": lambda: pa.array(TEXTS).dictionary_encode(),
    "a dictionary of large": lambda: pa.array(TEXTS, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("column", ["question", "chosen", "client", "idx", "unheard_of"])
@pytest.mark.parametrize("name", list(TEXT_TYPES))
def test_texts_are_read_from_every_layout(tmp_path: Path, name: str, column: str) -> None:
    assert read(tmp_path, column, TEXT_TYPES[name]()).read_text(column) == TEXTS


def test_no_number_makes_no_client(tmp_path: Path) -> None:
    """Polars and numpy write NaN where pandas writes null."""
    table = read(tmp_path, "site", pa.array([1.5, float("nan"), None, 2.5]))
    assert table.read_text("site") == ["1.5", None, None, "2.5"]
    options = make_options(source=table.name, partition_by="site", validation_share=0, test_share=0)
    federation = federate(table, options, 0)
    assert federation.names == ("1.5", "2.5")
    assert [(entry.row, entry.reason) for entry in federation.skipped] == [(1, "no site"), (2, "no site")]


ANSWERS = [["a", "b", " b "], ["c"], [], None]
ANSWER_TYPES: dict[str, Callable[[], pa.Array]] = {
    "texts": lambda: pa.array(ANSWERS, pa.list_(pa.string())),
    "views": lambda: pa.array(ANSWERS, pa.list_(pa.string_view())),
    "a large list": lambda: pa.array(ANSWERS, pa.large_list(pa.large_string())),
    "structs": lambda: pa.array(
        [None if row is None else [{"answer": text, "answer_id": 3, "answer_confidence": "yes"} for text in row]
         for row in ANSWERS]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ANSWER_TYPES))
def test_several_answers_are_all_read_and_most_people_s_trains(tmp_path: Path, name: str) -> None:
    table = read(tmp_path, "chosen", ANSWER_TYPES[name]())
    assert table.has_several_answers
    assert table.read_text("chosen") == ["b", "c", None, None]
    assert table.read_text("chosen", [1, 0]) == ["c", "b"]
    assert table.read_answers() == [("a", "b", "b"), ("c",), (), ()]
    assert table.read_answers([2, 0]) == [(), ("a", "b", "b")]


def test_ten_answers_of_which_two_are_as_frequent_train_the_first(tmp_path: Path) -> None:
    said = ["no", "yes", "yes", "no", "maybe", "", None, "a", "b", "c"]
    table = read(tmp_path, "chosen", pa.array([said] * 4))
    assert set(table.read_text("chosen")) == {"no"}
    assert table.read_answers([0]) == [("no", "yes", "yes", "no", "maybe", "a", "b", "c")]


@pytest.mark.parametrize("kind", ["texts", "large", "views", "structs"])
def test_an_answer_of_several_that_is_no_utf_8_costs_its_row_only(tmp_path: Path, kind: str) -> None:
    """As one does in a column of single answers."""
    said = [[b"a", b"b", b"b"], [b"caf\xe9", b"c", b"c"], [b"d"], None]
    offsets = pa.array([0, 3, 6, 7, 7], pa.int32())
    texts = pa.array([text for row in said for text in row or []]).view(pa.string())
    if kind == "structs":
        texts = pa.StructArray.from_arrays([texts, pa.array(range(7))], ["answer", "answer_id"])
    elif kind != "texts":
        texts = texts.cast(pa.large_string() if kind == "large" else pa.string_view())
    column = pa.ListArray.from_arrays(offsets, texts, mask=pa.array([False, False, False, True]))
    table = read(tmp_path, "chosen", column)
    assert table.read_text("chosen") == ["b", UNREADABLE, "d", None]
    path = write(tmp_path, replace_column("chosen", column))
    examples = encode_file(path, partition="iid", clients=1, max_bad_share=0.6, test_share=0, validation_share=0)
    assert examples.rows.tolist() == [0, 2]
    assert {(entry.row, entry.reason) for entry in examples.skipped} == {
        (1, "answer is not UTF-8"), (3, "empty answer"),
    }  # fmt: skip


def test_one_answer_is_a_list_of_one(tmp_path: Path) -> None:
    table = read_table(str(write_rows(tmp_path / "a.parquet", [make_row(0, chosen=" x "), make_row(1, chosen=None)])))
    assert not table.has_several_answers
    assert table.read_answers() == [("x",), ()]


def label(names: Any, **more: Any) -> dict[str, str]:
    features = {
        "client": {"_type": "ClassLabel", "names": names},
        "kind": {"_type": "ClassLabel", "names": names},
    } | more
    return {"huggingface": json.dumps({"info": {"features": features}})}


def make_labelled(codes: list[int | None], names: Any) -> pa.Table:
    table = replace_column("client", pa.array(codes, pa.int64())).append_column("kind", pa.array(codes, pa.int32()))
    return table.replace_schema_metadata(label(names))


def test_classes_keep_their_names(tmp_path: Path) -> None:
    table = read_table(str(write(tmp_path, make_labelled([1, 0, -1, None], ["Ward 3", "東京"]))))
    assert table.read_text("client") == ["東京", "Ward 3", None, None]
    assert table.read_text("kind") == ["東京", "Ward 3", None, None]
    options = make_options(source=str(tmp_path), validation_share=0, test_share=0)
    assert federate(table, options, 0).names == ("Ward 3", "東京")


@pytest.mark.parametrize("names", [None, [], "ab", [1, 2], {"a": 1}])
def test_names_of_classes_that_are_none_are_not_believed(tmp_path: Path, names: Any) -> None:
    assert read_table(str(write(tmp_path, make_labelled([1, 0, 1, None], names)))).read_text("client") == [
        "1", "0", "1", None,
    ]  # fmt: skip


def test_classes_without_a_name_and_shards_that_name_them_differently_are_told(tmp_path: Path) -> None:
    write(tmp_path, make_labelled([1, 0, 2, None], ["a", "b"]))
    with pytest.raises(UserError, match=r"a\.parquet .*column 'client' has the class 2, and names for 2 classes"):
        read_table(str(tmp_path))
    write(tmp_path, make_labelled([1, 0, 0, None], ["a", "b"]))
    pq.write_table(make_labelled([1, 0, 0, None], ["b", "a"]), tmp_path / "b.parquet")
    assert read_table(str(tmp_path)).read_text("client") == ["b", "a", "a", None, "a", "b", "b", None]
    pq.write_table(make_labelled([1, 0, 0, None], None), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"disagree: only one of them has names for the classes of 'client'"):
        read_table(str(tmp_path))


def test_pictures_in_texts_are_read(tmp_path: Path) -> None:
    whole = draw_image(3, (60, 50))
    text = base64.b64encode(whole).decode()
    jpeg = draw_image(3, (60, 50), "JPEG")
    paths = [f"data:image/png;base64,{text}", text, base64.b64encode(jpeg).decode(), "data:image/png;base64,?!"]
    table = read(tmp_path, "image", pa.array(paths))
    assert [table.read_image(row) for row in range(3)] == [whole, whole, jpeg]
    with pytest.raises(BrokenImageError, match=LOST):
        table.read_image(3)


def test_pictures_in_texts_may_be_broken_into_lines(tmp_path: Path) -> None:
    whole = draw_image(3, (60, 50))
    lines = base64.encodebytes(whole).decode()
    assert lines.count("\n") > 2
    paths = [f"data:image/png;base64,{lines}", lines, lines.replace("\n", "\r\n"), f"data:image/png;base64,\n{lines} "]
    table = read(tmp_path, "image", pa.array(paths))
    assert [table.read_image(row) for row in range(4)] == [whole] * 4


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("coco/1.png", r"For row 2 it looked for 'coco/1\.png' in .*data"),
        ("x" * 300, r"For row 2 it looked for 'x{80}…' in .*data"),
        ("/9j/" + "?" * 200, r"For row 2 it looked for '/9j/\?+…' in .*data"),
        ("/etc/hostname", r"For row 2 it looked for '/etc/hostname' in .*data"),
    ],
)
def test_a_picture_that_is_not_found_is_told_by_name_and_place(tmp_path: Path, path: str, told: str) -> None:
    rows = [*make_rows(2), make_row(2, image={"bytes": None, "path": path})]
    with pytest.raises(UserError, match=told):
        encode_file(write_rows(tmp_path / "data" / "a.parquet", rows))


ABSENT = [make_row(row, image={"bytes": None, "path": f"coco/{row}.png"}) for row in range(40)]


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({}, r"none of the \d clients has a training row\. "),
        ({"min_examples": 2}, r"no client is left of \d; .* 0 training rows\. "),
        ({"partition": "iid", "clients": 2}, r"--data\.clients is 2, and there are 0 images to share out\. "),
    ],
)
def test_where_all_pictures_are_absent_it_is_told_what_was_looked_for(
    tmp_path: Path, choices: dict[str, Any], told: str
) -> None:
    path = write_rows(tmp_path / "data" / "a.parquet", ABSENT)
    expected = r"Rows left out: 40 × image file cannot be read\. For row 0 it looked for 'coco/0\.png' in '.*data'\."
    with pytest.raises(UserError, match=told + expected) as caught:
        encode_file(path, **choices)
    assert "Choose fewer" not in str(caught.value)


def test_fewer_pictures_than_clients_says_why_there_are_so_few(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data" / "a.parquet", [*make_rows(3), *ABSENT])
    with pytest.raises(
        UserError, match=r"there are 3 images to share out\. Rows left out: 40 × .*Choose fewer clients\."
    ):
        encode_file(path, partition="iid", clients=5)
    with pytest.raises(
        UserError, match=r"shared out evenly, .* Rows left out: 40 × image file cannot be read\. For row"
    ):
        encode_file(path, partition="iid", clients=2, min_examples=9)


def test_a_picture_that_is_removed_after_it_was_checked_is_told_by_row_and_file(tmp_path: Path) -> None:
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(PICTURES[row])
    table = read(tmp_path, "image", pa.array([f"{row}.png" for row in (0, 1, 2, 2)]))
    images = unique_images(table, range(4))[0]
    assert images.find_broken() == {}
    (tmp_path / "1.png").unlink()
    with pytest.raises(
        UserError, match=r"row 1 of .*: image file cannot be read .it looked for '1\.png' in '.*put it back"
    ):
        images.decode(1)
    assert images.number_pictures()[1] == {1: LOST}


NEEDED_TYPES = {
    "question": pa.array([["a"]] * 4),
    "chosen": pa.array([1.5] * 4),
    "image": pa.array([True] * 4),
}


@pytest.mark.parametrize("column", list(NEEDED_TYPES))
def test_nobody_is_told_to_leave_out_what_is_needed(tmp_path: Path, column: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, column, NEEDED_TYPES[column])
    assert "eave it out" not in str(caught.value)
    assert f"column {column!r} is" in str(caught.value)
    with pytest.raises(UserError, match=r"'split' is double; expected text\. Write it as text, or leave it out\."):
        read(tmp_path, "split", pa.array([1.5] * 4))


def test_all_answers_are_compared_and_the_most_frequent_trains(tmp_path: Path) -> None:
    from fedvlm_jax.evaluation.gold_answers import read_gold
    from fedvlm_jax.evaluation.metrics.text_metrics import METRICS, exact_match
    from fedvlm_jax.models import read_vlm
    from fedvlm_jax.models.florence2 import Processor

    people = [["yes"] * 3 + ["no"] * 7, ["2", "two", "2"], ["a"], ["b", "c"]]
    write(tmp_path, replace_column("chosen", pa.array(people)))
    examples = encode_file(tmp_path)
    assert examples.answers == [["no", "2", "a", "b"][row] for row in examples.rows]
    assert examples.all_answers == [tuple(people[row]) for row in examples.rows]
    vlm = read_vlm("florence2-nano")
    processor = Processor.from_folder(Path(fedvlm_jax.__file__).parent / "assets" / "florence2-nano")
    settings = vlm.settings()
    gold = read_gold(examples.answers, range(4), processor, 16, settings, examples.all_answers)
    assert gold.texts == examples.answers
    assert gold.all == [list(own) for own in examples.all_answers]
    said = [["yes", "two", "a", "d"][row] for row in examples.rows]
    scores = dict(zip(examples.rows.tolist(), METRICS["vqa_accuracy"](said, gold.all), strict=True))
    # The official rule: 3 of 10 said "yes", and the mean over the ten subsets of nine is 0.9. Of three who say "2",
    # "two" and "2" all agree once numbers are digits: 2 others at most.
    assert scores == pytest.approx({0: 0.9, 1: 2 / 3, 2: 1.0, 3: 0.0})
    assert sorted(exact_match(said, gold.all)) == [0, 1, 1, 1]
    lone = read_gold(["a"], [0], processor, 16, settings)
    assert (lone.texts, lone.all) == (["a"], [["a"]])


def test_a_pipe_a_circle_and_a_device_as_the_data_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "circle.parquet").symlink_to("circle.parquet")
    for name in (str(tmp_path / "pipe.parquet"), "/dev/zero"):
        with pytest.raises(UserError, match=r"is no regular file"):
            read_table(name)
    with pytest.raises(UserError, match=r"neither a named data set nor a path that exists"):
        read_table(str(tmp_path / "circle.parquet"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, GOOD).chmod(0)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        read_table(str(tmp_path))


class _Refusing(WordProcessor):
    """Raises at odd texts, as transformers' processor does at a task token beside other text."""

    def prompts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if any("<OD>" in text for text in texts):
            raise ValueError("Task token <OD> should be the only token in the text.")
        return super().prompts(texts)


def test_a_question_that_the_processor_refuses_costs_its_own_row(tmp_path: Path) -> None:
    rows = [*make_rows(20), make_row(20, question="<OD> find the car")]
    options = make_options(source=str(write_rows(tmp_path / "a.parquet", rows)), max_bad_share=0.1)
    table = read_table(options)
    examples = encode(table, federate(table, options, 0), _Refusing(), options)
    (skipped,) = examples.skipped
    assert (skipped.row, len(examples)) == (20, 20)
    assert "Task token <OD> should be the only token in the text" in skipped.reason
