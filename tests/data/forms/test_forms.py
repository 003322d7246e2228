"""Every form gives the rows that were written, and those that `datasets` itself loads."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from make_parquet import draw_image, make_row, write_rows
from own_data import FIXED, FORMS, make_own_rows, make_saved, talk, write_pictures
from rlaif_form import Form, make_form_rows
from words import WordProcessor

from fedvlm_jax.data.config import FAULT, TURNS
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.image_decoding import BrokenImageError
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.tokenization import encode
from fedvlm_jax.errors import UserError

ROWS = make_own_rows()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path, ROWS)
    return tmp_path


def read_lines(folder: Path, *rows: Any, **options: Any):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(make_options(str(folder / "rows.jsonl"), **options))


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_gives_the_same_rows(name: str, folder: Path) -> None:
    form, needed, write = FORMS[name]
    options = make_options(str(write(folder, ROWS)), **needed)
    assert options.form == form
    table = read_table(options)
    assert table.form == form
    columns = [table.read_text(column) for column in ("question", "chosen", "client")]
    found = sorted(zip(map(table.read_image, range(len(table))), *columns, strict=True))
    assert found == sorted((row["bytes"], FIXED, row["chosen"], row["client"]) for row in ROWS)
    federation = federate(table, options, 0)
    assert federation.names == ("north", "south")
    examples = encode(table, federation, WordProcessor(), options)
    assert len(examples) == len(ROWS)
    assert not examples.skipped


@pytest.mark.parametrize("name", ["lines", "a list", "CSV", "TSV", "metadata.jsonl", "metadata.csv", "classes", "TRL"])
def test_it_is_what_datasets_loads(name: str, folder: Path) -> None:
    form, needed, write = FORMS[name]
    place = write(folder, ROWS)
    kind = {
        "imagefolder": {"data_dir": str(place)},
        "csv": {"data_files": str(place), "sep": "," if name == "CSV" else "\t"},
    }
    loaded = datasets.load_dataset(form, split="train", **kind.get(form, {"data_files": str(place)}))
    table = read_table(make_options(str(place), **needed))
    assert len(loaded) == len(table)
    if name == "classes":
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
        classes = [loaded.features["label"].names[label] for label in loaded["label"]]
        pairs = {(Path(row["path"]).name, label) for row, label in zip(loaded["image"], classes, strict=True)}
        paths = [row["path"] for row in table.data.column("image").to_pylist()]
        assert pairs == {(Path(path).name, kind) for path, kind in zip(paths, table.read_text("chosen"), strict=True)}
        return
    for column in {"question", "chosen", "client"} & {*loaded.column_names}:
        values = [row[0]["content"][0]["text"] if isinstance(row, list) else row for row in loaded[column]]
        assert values == table.read_text(column)
    if form == "imagefolder":
        paths = [row["path"] for row in loaded.cast_column("image", datasets.Image(decode=False))["image"]]
        assert [Path(path).read_bytes() for path in paths] == [table.read_image(row) for row in range(len(table))]


def test_rlaif_v_in_trl_s_form_gives_the_same_examples(tmp_path: Path) -> None:
    rows = make_form_rows(Form(rows=80, spoil={"unicode": 6, "equal answers": 4, "empty rejected": 3}))
    write_rows(tmp_path / "own" / "a.parquet", rows)
    kept = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")
    trl = [
        {
            "images": [row["image"]],
            "prompt": talk(row["question"], parts=True),
            "chosen": talk("", row["chosen"], parts=True)[1:],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": row["rejected"]}]}],
            **{name: row[name] for name in kept},
        }
        for row in rows
    ]
    text = [
        {"images": [row["image"]], "prompt": row["question"], **{n: row[n] for n in (*kept, "chosen", "rejected")}}
        for row in rows
    ]
    for name, made in (("trl", trl), ("text", text)):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list(made).to_parquet(tmp_path / name / "a.parquet")
    found = []
    for name in ("own", "trl", "text"):
        options = make_options(str(tmp_path / name), max_bad_share=0.5)
        table = read_table(options)
        federation = federate(table, options, 3)
        found.append((federation, encode(table, federation, WordProcessor(), options, pairs=True)))
    (federation, own), *others = found
    assert len(own.skipped) == 7
    for other_federation, other in others:
        assert other_federation.names == federation.names
        assert (other_federation.rows == federation.rows).all()
        for name in ("image", "input_ids", "attention_mask", "labels", "rejected", "rows"):
            np.testing.assert_array_equal(getattr(own, name), getattr(other, name))
        assert other.answers == own.answers
        assert other.rejected_answers == own.rejected_answers
        assert other.images.keys == own.images.keys
        assert other.skipped == own.skipped
        assert other.all_answers is None


def test_conversations_and_captions_are_those_that_datasets_loads(folder: Path) -> None:
    (place, coco) = (FORMS[name][2](folder, ROWS) for name in ("LLaVA", "COCO"))
    talks = datasets.load_dataset("json", data_files=str(place), split="train")
    table = read_table(make_options(str(place)))
    assert [talk[0]["value"].removeprefix("<image>\n") for talk in talks["conversations"]] == table.read_text(
        "question"
    )
    assert [talk[1]["value"] for talk in talks["conversations"]] == table.read_text("chosen")
    assert [row["path"] for row in table.data.column("image").to_pylist()] == talks["image"]
    said = datasets.load_dataset("json", data_files=str(coco), field="annotations", split="train")
    table = read_table(make_options(str(coco)))
    captions = dict(zip(map(str, said["image_id"]), said["caption"], strict=True))
    assert [captions[idx] for idx in table.read_text("idx")] == table.read_text("chosen")


def test_pictures_of_the_hub_that_stay_files_lie_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "datasets--anna--photos" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_pictures(snapshot, ROWS)
    FORMS["metadata.jsonl"][2](snapshot, ROWS)
    load = datasets.load_dataset
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id, **_: load("imagefolder", data_dir=str(snapshot)))
    table = read_table("anna/photos")
    assert [table.read_image(row) for row in range(len(table))] == [row["bytes"] for row in ROWS]
    assert "split" not in table.columns
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(BrokenImageError, match="outside of the data's folder"):
        read_table("anna/photos").read_image(0)


def test_the_splits_of_a_saved_dictionary_are_the_column(tmp_path: Path) -> None:
    parts = {"train_sft": make_saved(ROWS[:6]), "val": make_saved(ROWS[6:8]), "test_sft": make_saved(ROWS[8:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    table = read_table(str(tmp_path / "saved"))
    assert table.read_text("split") == ["train"] * 6 + ["validation"] * 2 + ["test"] * 4
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert [text for part in loaded.values() for text in part["chosen"]] == table.read_text("chosen")
    assert federate(table, make_options(str(tmp_path / "saved")), 0).description["splits_from"] == "column 'split'"


def test_a_set_of_the_hub_is_fetched_and_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    made = datasets.DatasetDict({"train": make_saved(ROWS[:8]), "test": make_saved(ROWS[8:])})
    made.save_to_disk(tmp_path / "kept")

    def give(hub_id: str, **kwargs: Any) -> datasets.DatasetDict:
        asked.update(kwargs, hub_id=hub_id)
        given = datasets.load_from_disk(tmp_path / "kept")
        given["train"].info.download_checksums = {f"hf://datasets/anna/photos@{'4' * 40}/a.parquet": {}}
        return given

    monkeypatch.setattr(datasets, "load_dataset", give)
    options = make_options("anna/photos", config="small", revision="abc")
    assert options.form == "hub"
    table = read_table(options)
    assert asked == {"hub_id": "anna/photos", "name": "small", "revision": "abc"}
    assert table.read_text("client") == [row["client"] for row in ROWS]
    assert table.read_text("split") == ["train"] * 8 + ["test"] * 4
    assert [table.read_image(row) for row in range(12)] == [row["bytes"] for row in ROWS]
    assert table.revision == "4" * 40
    assert table.image_root is None or "extracted" in str(table.image_root)
    one = read_table(options.replace(splits=("test",)))
    assert "split" not in one.columns
    assert len(one) == 4
    with pytest.raises(UserError, match=r"--data.splits has dev; anna/photos has train, test"):
        read_table(options.replace(splits=("dev",)))


def test_without_the_hub_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"anna/photos is no path that exists, and .*no route.*hf download anna/photos"):
        read_table("anna/photos")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anna" / "photos").mkdir(parents=True)
    with pytest.raises(UserError, match="is a path, or no owner/name"):
        read_table(make_options("anna/photos", form="hub"))


TALK = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Asleep?"},
    {"from": "gpt", "value": "Yes."},
]


def test_each_answer_of_a_conversation_or_the_last(folder: Path) -> None:
    row = {"id": "r", "image": "north/00.png", "conversations": TALK}
    last = read_lines(folder, row)
    asked = "Be brief.\nUser: What is it?\nAssistant: A cat.\nUser: Asleep?"
    assert last.read_text("question") == [asked]
    assert last.read_text("chosen") == ["Yes."]
    each = read_lines(folder, row, turns="each")
    assert each.read_text("question") == ["Be brief.\nWhat is it?", asked]
    assert each.read_text("chosen") == ["A cat.", "Yes."]
    assert each.read_text("idx") == ["r", "r/2"]
    kept = [json.loads(text or "[]") for text in each.read_text(TURNS)]
    assert [[turn["role"] for turn in turns] for turns in kept] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert [turn["content"] for turn in kept[1]] == [
        "Be brief.",
        [{"type": "image"}, {"type": "text", "text": "What is it?"}],
        "A cat.",
        "Asleep?",
    ]


def test_prompts_of_preferences_may_stand_in_both_answers(folder: Path) -> None:
    both = {"chosen": talk("What?", "a cat"), "rejected": talk("What?", "a dog")}
    table = read_lines(
        folder,
        {"image": "north/00.png", **both},
        {"image": "north/00.png", **both, "prompt": "What?"},
        {"image": "north/00.png", "chosen": talk("What?", "a cat"), "rejected": talk("Where?", "a dog")},
    )
    assert table.read_text("question") == ["What?", "What?", None]
    assert table.read_text("chosen") == ["a cat", "a cat", None]
    assert table.read_text("rejected") == ["a dog", "a dog", None]
    assert table.read_text(FAULT) == [None, None, "chosen and rejected answer different prompts"]


def test_our_own_column_counts_before_one_that_says_the_same(folder: Path) -> None:
    row = {
        "image": "a.png",
        "images": ["b.png"],
        "question": "What?",
        "prompt": "Who?",
        "rejected": talk("?", "no")[1:],
    }
    table = read_lines(folder, row | {"chosen": talk("?", "yes")[1:], "messages": talk("Where?", "there")})
    assert table.data.column("image").to_pylist() == [{"bytes": None, "path": "a.png"}]
    assert [table.read_text(name) for name in ("question", "chosen", "rejected")] == [["What?"], ["yes"], ["no"]]


def test_messages_of_a_supervised_set(folder: Path) -> None:
    parts = [{"type": "image", "image": f"north/{ROWS[0]['file']}"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]
    table = read_lines(folder, {"messages": turns})
    assert table.read_text("question") == ["What?"]
    assert table.read_image(0) == ROWS[0]["bytes"]


def test_several_captions_are_several_gold_answers(folder: Path) -> None:
    images = [{"id": n, "file_name": f"north/{n:02d}.png"} for n in (0, 2)]
    said = [{"image_id": n, "caption": text} for n, text in ((2, "b"), (0, "a"), (2, "c"), (2, "b"), (7, "lost"))]
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": said}, indent=2))
    table = read_table(make_options(str(folder / "c.json")))
    assert table.read_answers() == [("a",), ("b", "c", "b"), ()]
    assert table.read_text("chosen") == ["a", "b", None]
    assert table.read_text("question")[:2] == ["Describe the picture."] * 2
    assert table.read_text(FAULT) == [None, None, "caption of no picture"]


def test_pictures_below_metadata_and_folders_of_clients(tmp_path: Path) -> None:
    for number, (split, ward) in enumerate([("train", "a"), ("train", "b"), ("test", "a")]):
        (tmp_path / split / ward).mkdir(parents=True)
        (tmp_path / split / ward / "x.png").write_bytes(draw_image(number))
        with (tmp_path / split / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{ward}/x.png", "text": f"answer {number}"}) + "\n")
    options = make_options(str(tmp_path), columns=("chosen=text",), client_folder=-1)
    table = read_table(options)
    assert table.read_text("split") == ["test", "train", "train"]
    assert table.read_text("client") == ["a", "a", "b"]
    assert table.read_text("chosen") == ["answer 2", "answer 0", "answer 1"]
    assert [table.read_image(row) for row in range(3)] == [draw_image(2), draw_image(0), draw_image(1)]
    assert read_table(options.replace(client_folder=1)).read_text("client") == ["test", "train", "train"]
    assert read_table(options.replace(client_folder=3)).read_text("client") == [None] * 3


def test_files_of_a_folder_are_splits_by_their_names(tmp_path: Path) -> None:
    write_pictures(tmp_path, ROWS)
    for name, rows in (("my_train", ROWS[:8]), ("my_val", ROWS[8:])):
        FORMS["lines"][2](tmp_path, rows).rename(tmp_path / f"{name}.jsonl")
    assert read_table(str(tmp_path)).read_text("split") == ["train"] * 8 + ["validation"] * 4


def test_columns_are_named_outright_or_told(folder: Path) -> None:
    row = {"photo": "north/00.png", "caption": "a cat", "question": "What?"}
    with pytest.raises(UserError, match=r"no column 'image'; it has 'photo', 'caption', 'question'\. .*image=NAME"):
        read_lines(folder, row)
    with pytest.raises(UserError, match=r"--data.columns names 'foto'; .* has 'photo', 'caption', 'question'"):
        read_lines(folder, row, columns=("image=foto",))
    with pytest.raises(UserError, match=r"no column 'question'.* --data.question TEXT"):
        read_lines(folder, {"image": "a.png", "chosen": "b"})
    with pytest.raises(UserError, match=r"--data.columns has 'image'; expected OURS=THEIRS"):
        make_options("rows.csv", columns=("image",))
    with pytest.raises(UserError, match="every name once"):
        make_options("rows.csv", columns=("image=a", "image=b"))
    table = read_lines(folder, row, columns=("image=photo", "chosen=caption", "client=caption"), question="?")
    assert table.read_text("question") == ["What?"]
    assert table.read_text("client") == table.read_text("chosen") == ["a cat"]


def test_parquet_takes_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{**{k: v for k, v in make_row(n).items() if k != "question"}, "frage": f"Was? {n}"} for n in range(3)]
    write_rows(tmp_path / "a.parquet", rows, drop=["question"])
    with pytest.raises(UserError, match=r"lacks 'question'.*--data.columns question=NAME"):
        read_table(str(tmp_path))
    table = read_table(make_options(str(tmp_path), columns=("question=frage",)))
    assert table.read_text("question") == ["Was? 0", "Was? 1", "Was? 2"]
    assert table.read_image(2) == draw_image(2)


def test_a_table_is_made_once_and_again_when_it_is_read_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedvlm_jax.data import records_to_arrow

    row = {"image": "north/00.png", "conversations": TALK}
    assert len(read_lines(folder, row)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(records_to_arrow, "make_rows", None)
        assert len(read_lines(folder, row)) == 1
    assert len(read_lines(folder, row, turns="each")) == 2
    assert len(read_lines(folder, row, row)) == 2


def test_rows_are_written_part_by_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedvlm_jax.data import records_to_arrow

    monkeypatch.setattr(records_to_arrow, "ROWS", 4)
    table = read_lines(folder, *({"image": f"{n}.png", "question": "?", "chosen": str(n)} for n in range(10)))
    assert table.data.column("chosen").num_chunks == 3
    assert table.read_text("chosen") == [str(n) for n in range(10)]
