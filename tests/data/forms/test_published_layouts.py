"""Layouts of published federated sets, written small as their authors' public code reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_data import make_own_rows, write_pictures

from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.detection import find_form

ROWS = make_own_rows()


def say(number: int, image: Any, **about: Any) -> dict[str, Any]:
    asked = "<image>" * (len(image) if isinstance(image, list) else 1)
    row = ROWS[number]
    turns = [{"from": "human", "value": f"{asked}\nWhat is it?"}, {"from": "gpt", "value": row["chosen"]}]
    return {"id": number, "image": image, "conversations": turns, **about}


def name(number: int) -> str:
    return f"{ROWS[number]['client']}/{ROWS[number]['file']}"


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def read_splits(options: Any) -> dict[str, dict[str, list[str]]]:
    """client -> split -> its rows' idx."""
    table = read_table(options)
    names = table.read_text("idx")
    federation = federate(table, options, 0)
    return {
        client.name: {
            split: sorted(str(names[row]) for row in client.rows_of(split)) for split in ("train", "validation", "test")
        }
        for client in federation.clients
    }


@pytest.fixture
def fedvlmbench(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", ROWS)
    folder = tmp_path / "Fed-Nature"
    for client, numbers in enumerate(((0, 1, 2), (3, 4))):
        write(folder / "clients" / "train" / f"client_{client}.json", [say(n, name(n)) for n in numbers])
    write(folder / "clients" / "test" / "test.json", [say(n, name(n)) for n in (8, 9, 10)])
    write(folder / "central_training" / "train" / "train.json", [say(n, name(n)) for n in range(5)])
    return folder


def test_fedvlmbench_has_a_file_for_each_client_and_tests_everybody_on_everything(fedvlmbench: Path, tmp_path: Path):
    options = make_options(str(fedvlmbench), image_root=tmp_path / "images", validation_share=0.0)
    assert options.form == "fedvlmbench"
    found = read_splits(options)
    assert {client: splits["train"] for client, splits in found.items()} == {
        "client_0": ["0", "1", "2"],
        "client_1": ["3", "4"],
    }
    assert {tuple(splits["test"]) for splits in found.values()} == {("10", "8", "9")}
    table = read_table(options)
    answers = table.read_text("chosen")
    assert sorted({str(answer) for answer in answers}) == sorted({ROWS[n]["chosen"] for n in (0, 1, 2, 3, 4, 8, 9, 10)})
    assert table.read_image(0) == ROWS[0]["bytes"]
    assert "\n" not in (table.read_text("question")[0] or "\n")


def test_of_several_test_files_fedvlmbench_leaves_the_common_one_out(fedvlmbench: Path, tmp_path: Path):
    write(fedvlmbench / "clients" / "test" / "vqa_test.json", [say(11, name(11))])
    write(fedvlmbench / "clients" / "test" / "caption_test.json", [say(10, name(10))])
    found = read_splits(make_options(str(fedvlmbench), image_root=tmp_path / "images"))
    assert {tuple(splits["test"]) for splits in found.values()} == {("10", "11")}


def test_a_client_s_file_of_another_name_is_another_client(fedvlmbench: Path, tmp_path: Path):
    """The rows are kept by their content, and a name is none of it."""
    options = make_options(str(fedvlmbench), image_root=tmp_path / "images")
    assert {*read_splits(options)} == {"client_0", "client_1"}
    (fedvlmbench / "clients" / "train" / "client_1.json").rename(fedvlmbench / "clients" / "train" / "client_7.json")
    assert {*read_splits(options)} == {"client_0", "client_7"}


def test_other_names_of_the_conversations_are_said(fedvlmbench: Path, tmp_path: Path):
    """Fed-ScienceCap has two conversations in a record."""
    options = make_options(str(fedvlmbench), image_root=tmp_path / "images")
    expected = read_table(options).read_text("chosen")
    for file in (fedvlmbench / "clients").rglob("*.json"):
        said = [
            record | {"conversations_caption": record.pop("conversations")} for record in json.loads(file.read_text())
        ]
        write(file, said)
    named = options.replace(columns=("conversations=conversations_caption",))
    assert read_table(named).read_text("chosen") == expected


@pytest.fixture
def drake(tmp_path: Path) -> Path:
    """Two sets with three tasks; pictures by paths from the folder that `dataset` lies in, one row with two of them."""
    folder = tmp_path / "project" / "dataset"
    write_pictures(folder / "Fashion", ROWS)
    write_pictures(folder / "VSR", ROWS)
    for task, (kind, number) in enumerate((("Fashion", 0), ("Fashion", 1), ("VSR", 0))):
        first = 3 * task
        image = [f"dataset/{kind}/{name(first)}", f"dataset/{kind}/{name(first + 1)}"]
        rows = [say(first, image), say(first + 1, f"dataset/{kind}/{name(first + 1)}")]
        write(folder / kind / "train" / f"dataset-{number}.json", rows)
        test = [say(first + 2, f"dataset/{kind}/{name(first + 2)}")]
        write(folder / kind / "test" / f"dataset-{number}.json", test)
    return folder


def test_every_task_of_drake_is_a_client(drake: Path):
    options = make_options(str(drake))
    assert options.form == "drake"
    found = read_splits(options)
    assert found == {
        "Fashion-0": {"train": ["0", "1"], "validation": [], "test": ["2"]},
        "Fashion-1": {"train": ["3", "4"], "validation": [], "test": ["5"]},
        "VSR-0": {"train": ["6", "7"], "validation": [], "test": ["8"]},
    }
    table = read_table(options)
    assert table.most_pictures == 2
    assert [table.read_image(row) for row in range(2)] == [ROWS[0]["bytes"], ROWS[1]["bytes"]]


def test_a_scenario_of_drake_deals_the_tasks(drake: Path, tmp_path: Path):
    scenario = tmp_path / "scenario.json"
    tasks = [
        [{"dataset": "VSR", "subset_id": 0, "type": "multi-choice"}, {"dataset": "Fashion", "subset_id": 1}],
        [{"dataset": "dummy"}, {"dataset": "Fashion", "subset_id": 1}],
    ]
    write(scenario, [{"client_id": n, "datasets": each, "model_id": "x"} for n, each in enumerate(tasks)])
    found = read_splits(make_options(str(drake), "natural", "drake", scenario=scenario))
    assert {client: (splits["train"], splits["test"]) for client, splits in found.items()} == {
        "0": (["3", "4", "6", "7"], ["5", "8"]),
        "1": (["3", "4"], ["5"]),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"client_id": 0, "datasets": [{"dataset": "../VSR", "subset_id": 0}]}], r"has \.\./VSR, subset 0"),
        ([{"client_id": 0, "datasets": [{"dataset": "VSR", "subset_id": "0"}]}], "is no scenario of DRAKE"),
        ([{"client_id": 0}], "is no scenario of DRAKE"),
        ({"a": 1}, "is no scenario of DRAKE"),
        ([], "nobody has a task"),
        ([{"client_id": 0, "datasets": [{"dataset": "dummy"}]}], "nobody has a task"),
        ([{"client_id": 3, "datasets": [{"dataset": "VSR", "subset_id": k}]} for k in (0, 1)], "client 3 is in it tw"),
        ([{"client_id": 0, "datasets": [{"dataset": "VSR", "subset_id": 10**99}]}], r"subset 1000.*\(100 characters\)"),
        ("x" * (2**20 + 1), "is no scenario of DRAKE"),
    ],
)
def test_a_damaged_scenario_is_refused(drake: Path, tmp_path: Path, content: Any, message: str):
    write(tmp_path / "scenario.json", content)
    with pytest.raises(UserError, match=message):
        read_table(make_options(str(drake), "natural", "drake", scenario=tmp_path / "scenario.json"))


@pytest.mark.parametrize("form", ["fedvlmbench", "drake"])
def test_a_record_that_says_otherwise_does_not_move_a_test_row(
    fedvlmbench: Path, drake: Path, tmp_path: Path, form: str
):
    """LLaVA's records keep fields of the set that they come from, its splits among them."""
    said = {"split": "train", "client": "another"}
    if form == "drake":
        write(drake / "VSR" / "test" / "dataset-0.json", [say(8, f"dataset/VSR/{name(8)}", **said)])
        rows = [say(n, f"dataset/VSR/{name(n)}", split=split) for n, split in ((6, "test"), (7, "validation"))]
        write(drake / "VSR" / "train" / "dataset-0.json", rows)
        found = read_splits(make_options(str(drake)))["VSR-0"]
        assert found == {"train": ["6"], "validation": ["7"], "test": ["8"]}
        return
    write(fedvlmbench / "clients" / "test" / "test.json", [say(8, name(8), **said)])
    found = read_splits(make_options(str(fedvlmbench), image_root=tmp_path / "images"))
    assert {client: splits["test"] for client, splits in found.items()} == {"client_0": ["8"], "client_1": ["8"]}


@pytest.mark.parametrize("form", ["fedvlmbench", "drake"])
def test_another_folder_is_refused(tmp_path: Path, form: str):
    with pytest.raises(UserError, match="expected"):
        read_table(make_options(str(tmp_path), "natural", form))


def test_a_link_out_of_the_folder_is_refused(fedvlmbench: Path, tmp_path: Path):
    write(tmp_path / "secret.json", [say(0, name(0))])
    (fedvlmbench / "clients" / "train" / "client_9.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match="leads out of the folder"):
        read_table(make_options(str(fedvlmbench), image_root=tmp_path / "images"))


def test_the_layouts_are_found(fedvlmbench: Path, drake: Path):
    assert (find_form(str(fedvlmbench)), find_form(str(drake))) == ("fedvlmbench", "drake")
    assert np.all([find_form(str(folder / "clients" / "test")) == "json" for folder in (fedvlmbench,)])
