"""Descriptions of federations made by hand: counts worked out by hand, a known leak found, none where there is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_parquet import draw_image, make_row, write_rows
from rlaif_form import REASONS, Form, write_folder

from fedvlm_jax.data.dataset_summary import describe, measure_unlikeness
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.sources.registry import make_options, read_table


def describe_rows(tmp_path: Path, rows: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
    return describe_source(write_rows(tmp_path / "a.parquet", rows), **kwargs)


def describe_source(path: Path, check_images: bool = False, **options: Any) -> dict[str, Any]:
    chosen = make_options(source=str(path), **options)
    table = read_table(chosen)
    found = describe(table, federate(table, chosen, 0), chosen, check_images=check_images)
    return json.loads(json.dumps(found))


def row(number: int, client: str, split: str, picture: int, kind: str = "question answering", **changes: Any) -> Any:
    about = {"origin_split": json.dumps({"type": kind}), "client": client, "split": split}
    return make_row(number, picture, **about) | changes


def test_counts_by_hand(tmp_path: Path) -> None:
    rows = [
        row(0, "a", "train", 0),
        row(1, "a", "train", 0, "detailed description", chosen="two words"),
        row(2, "a", "test", 1),
        row(3, "b", "train", 2, question="", rejected=""),
        row(4, "b", "validation", 3, image=None),
        row(5, "", "train", 4),
    ]
    found = describe_rows(tmp_path, rows)
    assert found["rows"] == {"in_table": 6, "in_use": 5, "without_client": 1}
    assert found["clients"] == [
        {"name": "a", "held_out": False, "train": 2, "validation": 0, "test": 1, "images": 2},
        {"name": "b", "held_out": False, "train": 1, "validation": 1, "test": 0, "images": 1},
    ]
    kinds = found["keys"]["question_type"]
    assert kinds["values"] == {"question answering": 4, "detailed description": 1}
    assert kinds["by_client"]["a"] == {"question answering": 2, "detailed description": 1}
    # a: (2/3, 1/3) against (4/5, 1/5) is 2/15 away; b: (1, 0) is 1/5 away; the mean is 1/6.
    assert kinds["unlikeness"] == pytest.approx(1 / 6)
    assert found["keys"]["client"]["values"] == {"a": 3, "b": 2}
    assert found["unusable"]["reasons"] == {"no client": 1, "empty question": 1, "no image": 1}
    assert {entry["row"]: entry["reason"] for entry in found["unusable"]["first"]} == {
        5: "no client",
        3: "empty question",
        4: "no image",
    }
    assert found["pairs"] == {"rows": 4, "reasons": {"empty rejected answer": 1}}
    assert found["images"] == {"distinct": 3, "most_rows": 2, "decoded": False}
    assert found["texts"]["question"]["filled"] == 4
    lengths = found["texts"]["chosen"]["words"]
    assert (lengths["least"], lengths["most"]) == (2, 4)


def test_a_leak_is_found_and_said_where(tmp_path: Path) -> None:
    leaking = {"bytes": draw_image(99), "path": "elsewhere.png"}
    rows = [row(n, "ab"[n % 2], ("train", "train", "test")[n % 3], n) for n in range(12)]
    rows[1] |= {"image": leaking}  # b, train
    rows[8] |= {"image": leaking}  # a, test
    found = describe_rows(tmp_path, rows)["overlap"]["images"]
    crossing = found["between_splits"]["train/test"]
    assert (crossing["distinct"], crossing["rows"], crossing["rows_of_the_same_client"]) == (1, 1, 0)
    assert crossing["examples"] == [[1, 8]]
    assert found["between_clients"] == {"distinct": 1, "rows": 2, "most": [["a", "b", 1]]}


def test_no_leak_where_there_is_none(tmp_path: Path) -> None:
    rows = [row(n, "ab"[n % 2], ("train", "validation", "test")[n % 3], n) for n in range(12)]
    found = describe_rows(tmp_path, rows)["overlap"]["images"]
    assert [line["distinct"] for line in found["between_splits"].values()] == [0, 0, 0]
    assert found["between_clients"] == {"distinct": 0, "rows": 0, "most": []}


@pytest.mark.parametrize("partition", ["natural", "dirichlet", "pathological", "quantity", "iid"])
def test_what_is_split_here_never_leaks(tmp_path: Path, partition: str) -> None:
    write_folder(tmp_path, Form(rows=300, spoil={"duplicate image": 25}))
    more = {} if partition == "natural" else {"clients": 5}
    found = describe_source(tmp_path, partition=partition, **more)
    images = found["overlap"]["images"]
    assert [line["distinct"] for line in images["between_splits"].values()] == [0, 0, 0]
    # Natural clients keep their rows, so some show the same picture; drawn ones get pictures whole.
    assert (images["between_clients"]["distinct"] > 0) == (partition == "natural")


def test_texts_that_recur_are_told(tmp_path: Path) -> None:
    same = {"question": "How many?", "chosen": "two"}
    rows = [row(0, "a", "train", 0, **same), row(1, "a", "test", 1, **same), row(2, "b", "train", 2)]
    rows.append(row(3, "b", "train", 2, question=rows[2]["question"], chosen=rows[2]["chosen"]))
    found = describe_rows(tmp_path, rows)
    crossing = found["overlap"]["texts"]["between_splits"]["train/test"]
    assert (crossing["distinct"], crossing["rows"], crossing["rows_of_the_same_client"]) == (1, 1, 1)
    assert found["repeated_rows"] == 1


def test_rows_whose_picture_is_missing_repeat_no_other(tmp_path: Path) -> None:
    rows = [
        {"image": f"{name}.jpg", "question": "What?", "chosen": "it", "client": "a", "split": "train"} for name in "xyz"
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = describe_source(tmp_path)
    assert (found["unusable"]["rows"], found["repeated_rows"]) == (3, 0)


def test_broken_images_are_found_when_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, Form(rows=120, spoil=dict.fromkeys(REASONS, 2)))
    blind = describe_source(tmp_path)["unusable"]["reasons"]
    seeing = describe_source(tmp_path, check_images=True)["unusable"]["reasons"]
    expected = {"no image": 4, "image file cannot be read": 2, "empty question": 2, "empty answer": 2}
    assert blind == expected
    assert seeing == expected | {"broken or truncated image": 4}


def test_clients_that_are_held_out_are_marked(tmp_path: Path) -> None:
    write_folder(tmp_path, Form(rows=300))
    clients = describe_source(tmp_path, partition="iid", clients=10, held_out_clients=0.2)["clients"]
    assert [one["train"] == 0 for one in clients] == [one["held_out"] for one in clients]
    assert sum(one["held_out"] for one in clients) == 2


def test_the_label_is_a_key_that_says_more_than_who_the_client_is(tmp_path: Path) -> None:
    write_folder(tmp_path, Form(rows=100))
    assert describe_source(tmp_path)["label"] == "question_type"
    drawn = {"partition": "dirichlet", "partition_by": "origin_dataset", "clients": 4}
    assert describe_source(tmp_path, **drawn)["label"] == "origin_dataset"
    rows = [row(n, f"c{n % 3}", "train", n, origin_dataset="one", ds_name="x") for n in range(6)]
    assert describe_rows(tmp_path / "alone", rows)["label"] is None


@pytest.mark.parametrize(
    ("prompt", "reasons"),
    [(None, {"empty question": 1}), ("neutral", {}), ("client-language", {"empty question": 1})],
)
def test_those_questions_are_looked_at_that_would_be_asked(
    tmp_path: Path, prompt: Any, reasons: dict[str, int]
) -> None:
    rows = [row(n, "c", "train", n, question_client="" if n == 2 else "Was?") for n in range(4)]
    assert describe_rows(tmp_path, rows, prompt=prompt)["unusable"]["reasons"] == reasons


def test_the_shipped_set() -> None:
    options = make_options(images_per_client=6, validation_per_client=2, test_per_client=3)
    table = read_table(options)
    found = describe(table, federate(table, options, 0), options)
    assert found["label"] == "group"
    assert len(found["clients"]) == 16
    assert found["rows"] == {"in_table": 191_592, "in_use": 16 * 2 * 11, "without_client": 0}
    assert all(not line["distinct"] for line in found["overlap"]["images"]["between_splits"].values())


def test_unlikeness_by_hand() -> None:
    assert measure_unlikeness(np.asarray([[3, 1], [3, 1], [0, 0]])) == pytest.approx(0)
    assert measure_unlikeness(np.asarray([[5, 0], [0, 5]])) == pytest.approx(0.5)
    assert measure_unlikeness(np.asarray([[0, 0]])) is None
