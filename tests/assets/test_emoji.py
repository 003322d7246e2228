"""The shipped emoji set: its schema, its splits by concept, its pictures, and what must not leak between splits."""

import io
import json
from collections import defaultdict
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

PARQUET = Path(str(resources.files("fedvlm_jax") / "assets" / "emoji" / "emoji.parquet"))
SPLITS = Path(__file__).resolve().parents[2] / "tools" / "assets" / "emoji_splits.json"
VENDORS = ("noto", "twemoji", "fluent", "emojione")
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "ru", "ja", "zh")
RLAIF_V = [
    *("ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"),
]
OWN = ["client", "split", "language", "concept", "task", "group", "question_neutral", "question_client"]


@pytest.fixture(scope="module")
def texts() -> pa.Table:
    """Every column but the image bytes, which would be copied once per row."""
    columns = [name for name in (*RLAIF_V, *OWN) if name != "image"]
    return pq.read_table(PARQUET, columns=columns, read_dictionary=[name for name in columns if name != "idx"])


@pytest.fixture(scope="module")
def rows(texts) -> dict[str, list]:
    return texts.to_pydict()


@pytest.fixture(scope="module")
def sprites(rows) -> dict[str, bytes]:
    """Image path -> bytes; the German clients show every picture of their vendor."""
    table = pq.read_table(
        PARQUET, columns=["image"], filters=(pc.field("language") == "de") & (pc.field("task") == "group")
    )
    return {image["path"]: image["bytes"] for image in table.column("image").to_pylist()}


def pairs(rows, *names) -> set[tuple]:
    return set(zip(*(rows[name] for name in names), strict=True))


def test_file_has_rlaif_vs_schema_and_fits_the_limit():
    schema = pq.read_schema(PARQUET)
    assert schema.names == [*RLAIF_V, *OWN]
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert all(schema.field(name).type == pa.string() for name in schema.names if name != "image")
    assert PARQUET.stat().st_size <= 12 * 10**6


def test_every_vendor_meets_every_language(rows):
    assert set(rows["client"]) == {f"{vendor}-{language}" for vendor in VENDORS for language in LANGUAGES}
    assert all(client.endswith(f"-{language}") for client, language in pairs(rows, "client", "language"))
    assert all(path.startswith(client.split("-")[0]) for client, path in pairs(rows, "client", "image_path"))


def test_every_picture_is_asked_about_once_by_each_task_of_each_client(rows):
    assert len(set(rows["idx"])) == len(rows["idx"])
    asked = pairs(rows, "client", "concept", "task")
    drawn = {(path.split("/")[0], concept) for path, concept in pairs(rows, "image_path", "concept")}
    tasks = ("group", "subgroup", "name")
    assert len(asked) == len(rows["idx"])
    assert asked == {(f"{v}-{lang}", c, t) for v, c in drawn for lang in LANGUAGES for t in tasks}


def test_splits_are_the_committed_ones_by_concept(rows):
    committed = json.loads(SPLITS.read_text(encoding="utf-8"))
    shipped = pairs(rows, "concept", "split")
    assert shipped == set(committed.items())  # set equality also means: one split per concept, for all clients
    for vendor in VENDORS:
        held = {concept for client, concept in pairs(rows, "client", "concept") if client == f"{vendor}-en"}
        share = {s: sum(committed[c] == s for c in held) / len(held) for s in ("train", "validation", "test")}
        assert share == pytest.approx({"train": 0.60, "validation": 0.15, "test": 0.25}, abs=0.02)


def test_every_answer_asked_for_in_test_can_be_learned_in_train(rows):
    for task in ("group", "subgroup"):
        held = defaultdict(set)
        for split, kind, language, chosen in pairs(rows, "split", "task", "language", "chosen"):
            if kind == task:
                held[split].add((language, chosen))
        assert held["test"] <= held["train"]
        assert held["validation"] <= held["train"]


def test_names_of_test_concepts_appear_in_no_training_row(rows):
    named = defaultdict(set)
    for split, task, language, chosen, rejected in pairs(rows, "split", "task", "language", "chosen", "rejected"):
        if task == "name":
            named[split] |= {(language, chosen), (language, rejected)}
    assert not named["train"] & named["test"]
    assert not named["validation"] & named["test"]


def test_rejected_is_another_answer_to_the_same_question(rows):
    answers = defaultdict(set)
    for task, language, chosen in pairs(rows, "task", "language", "chosen"):
        answers[task, language].add(chosen)
    for task, language, chosen, rejected in pairs(rows, "task", "language", "chosen", "rejected"):
        assert chosen != rejected
        assert rejected in answers[task, language]


def test_neutral_question_is_one_per_task_and_the_clients_own_one_per_language(rows):
    assert rows["question"] == rows["question_neutral"]
    assert len(pairs(rows, "task", "question")) == 3
    assert len(pairs(rows, "task", "language", "question_client")) == 3 * len(LANGUAGES)
    assert len(set(rows["question_client"])) == 3 * len(LANGUAGES)


def test_origin_split_says_type_and_language(rows):
    for origin, language in pairs(rows, "origin_split", "language"):
        assert json.loads(origin) == {"type": "question answering", "language": language}


def test_pictures_decode_to_64_by_64_rgb_with_something_on_them(rows, sprites):
    assert set(sprites) == set(rows["image_path"])
    for path, data in sprites.items():
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode) == ((64, 64), "RGB"), path
        assert np.asarray(image).min() < 232, path


def test_no_picture_is_in_two_splits(rows, sprites):
    split = dict(pairs(rows, "image_path", "split"))
    held = defaultdict(set)
    for path, data in sprites.items():
        held[data].add(split[path])
    assert max(map(len, held.values())) == 1


def test_sprites_are_stored_once_each():
    group = pq.ParquetFile(PARQUET).metadata.row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "image.bytes")
    assert column.total_uncompressed_size < 8 * 10**6


def test_datasets_reads_the_metadata_and_decodes():
    features = json.loads(pq.read_schema(PARQUET).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert set(features) == {*RLAIF_V, *OWN}
