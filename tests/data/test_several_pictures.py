"""Rows of several pictures, from tables on: what has which image, what is skipped, and what is never torn apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from make_parquet import draw_image
from malformed import LOST
from words import WordProcessor

from fedvlm_jax.data.dataset_summary import describe
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.image_decoding import BrokenImageError
from fedvlm_jax.data.partitioning.table_clients import group_by_image
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.data.table import ImageFacts, Table
from fedvlm_jax.data.tokenization import Examples, encode
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.fingerprints import describe_clients

OPTIONS = make_options("rows.parquet", max_bad_share=1.0, validation_share=0.0, test_share=0.3)


class Album(WordProcessor):
    """Takes three pictures."""

    most_pictures = 3


def make_table(*rows: tuple[int | str | None, ...], folder: Path = Path(), **columns: list[Any]) -> Table:
    """A table of rows of pictures: numbers of drawn ones, names of files, and None."""
    width = max(map(len, rows))

    def write(picture: int | str | None) -> dict[str, Any] | None:
        if picture is None:
            return None
        return (
            {"bytes": None, "path": picture} if isinstance(picture, str) else {"bytes": draw_image(picture), "path": ""}
        )

    names = ["image", *(f"image_{place}" for place in range(2, width + 1))]
    held = {name: [write(row[place] if place < len(row) else None) for row in rows] for place, name in enumerate(names)}
    plain: dict[str, list[Any]] = {
        "question": [f"What {n}?" for n in range(len(rows))],
        "chosen": [f"It is {n}" for n in range(len(rows))],
        "client": ["ab"[n % 2] for n in range(len(rows))],
    }
    return Table("drawn", pa.table({**held, **plain, **columns}), folder)


def encode_table(table: Table, processor: WordProcessor) -> Examples:
    return encode(table, federate(table, OPTIONS, 0), processor, OPTIONS)


def test_every_picture_of_a_row_has_its_place(tmp_path: Path) -> None:
    table = make_table((0, 1), (2,), (1, 0, 3), ("lost.png", 4), (5, "lost.png"), (None, 6), (7, None, 8), (None,))
    assert table.most_pictures == 3
    images, index, missing = unique_images(table, range(8))
    assert index.dtype == np.int32
    assert index.tolist() == [[0, 1, -1], [2, -1, -1], [1, 0, 3], *[[-1, -1, -1]] * 5]
    assert missing == {3: LOST, 4: LOST, 5: "no image", 6: "no image", 7: "no image"}
    assert (images.rows.tolist(), images.places.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 2])
    for place, number in enumerate((0, 1, 2, 3)):
        found = table.read_image(int(images.rows[place]), int(images.places[place]))
        assert found == draw_image(number)
        assert images.decode(place).size == (32, 24)
    assert images.find_broken() == {}
    again = images.select([3, 1])
    assert (again.rows.tolist(), again.places.tolist()) == ([2, 0], [2, 1])
    with pytest.raises(BrokenImageError, match="no image"):
        table.read_image(1, 1)
    assert "lost.png" in table.describe_lookup(4, 1)
    assert not table.describe_lookup(4)


def test_facts_of_first_pictures_are_kept_under_their_rows(tmp_path: Path) -> None:
    table = make_table((0, 1), (2,), (1, 0))
    unique_images(table, range(3))[0].find_broken()
    assert table.facts.digests.keys() == {0, 1, 2, 3, 5}
    assert table.facts.sound == {0, 1, 3}
    assert table.facts.digests[3] == table.facts.digests[2]  # row 0's second is row 2's first
    file = tmp_path / "facts.npz"
    facts = ImageFacts(file, table.facts.digests, table.facts.sound)
    facts.save(lambda number: number != 5)
    assert ImageFacts.open(file).digests.keys() == {0, 1, 2, 3}


def test_a_broken_picture_costs_its_row() -> None:
    table = make_table((0, 1), (2,), (3, 4))
    columns = {name: table.data.column(name).to_pylist() for name in table.columns}
    columns["image_2"][2]["bytes"] = draw_image(4)[:40]
    table = Table("drawn", pa.table(columns), Path())
    examples = encode_table(table, Album())
    assert [(entry.row, entry.reason) for entry in examples.skipped] == [(2, "broken or truncated image")]
    assert describe(table, federate(table, OPTIONS, 0), OPTIONS, check_images=True)["unusable"]["reasons"] == {
        "broken or truncated image": 1
    }


def test_a_model_gets_rows_of_as_many_pictures_as_it_takes() -> None:
    rows = [(0,), (1, 2), (3, 4, 5), (6, 7, 8, 9), (1,), (2, 1)]
    table = make_table(*rows)
    for processor, fits in ((WordProcessor(), {0, 4}), (Album(), {0, 1, 2, 4, 5})):
        examples = encode_table(table, processor)
        assert {*examples.rows.tolist()} == fits
        wanted = {row: f"{len(rows[row])} pictures, the model takes {processor.most_pictures}" for row in range(6)}
        assert {entry.row: entry.reason for entry in examples.skipped} == {
            row: reason for row, reason in wanted.items() if row not in fits
        }
        assert examples.pictures.shape == (len(fits), processor.most_pictures)
        np.testing.assert_array_equal(examples.image, examples.pictures[:, 0])
        assert examples.image.dtype == examples.pictures.dtype == np.int32
        held = {number for row in fits for number in rows[row]}
        assert len(examples.images) == len(held)
        for row, indices in zip(examples.rows.tolist(), examples.pictures.tolist(), strict=True):
            found = [table.read_image(int(examples.images.rows[i]), int(examples.images.places[i]))
                     for i in indices if i >= 0]  # fmt: skip
            assert found == [draw_image(number) for number in rows[row]]
            assert indices[len(rows[row]) :] == [-1] * (processor.most_pictures - len(rows[row]))


class Talker(Album):
    """Reads turns."""

    reads_turns = True


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("{", "turns that are no messages"),
        ("[]", "turns that are no messages"),
        ("5", "turns that are no messages"),
        ('["user"]', "turns that are no messages"),
        ('[{"role": ["user"], "content": "a"}]', "turns that are no messages"),
        ('[{"role": {}, "content": "a"}]', "turns that are no messages"),
        ('[{"role": "tool", "content": "a"}]', "turns that are no messages"),
        ('[{"role": "user", "content": 5}]', "turns that are no messages"),
        ('[{"role": "user", "content": ["a"]}]', "turns that are no messages"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "turns that are no messages"),
        ("[" * 100_000, "turns that are no messages"),
        (
            '[{"role": "user", "content": [{"type": "image"}]}]',
            "turns with places for 1 picture, and 2 pictures",
        ),
        ('[{"role": "system", "content": "a"}]', "no turn of the user in which its pictures could stand"),
    ],
    ids=range(13),
)
def test_turns_that_somebody_else_wrote_cost_their_row(written: str, reason: str) -> None:
    table = make_table((0, 1), (2, 3), prompt_turns=[written, '[{"role": "user", "content": "Alike?"}]'])
    examples = encode_table(table, Talker())
    assert [(entry.row, entry.reason) for entry in examples.skipped] == [(0, reason)]
    assert examples.rows.tolist() == [1]


def test_rows_that_share_a_picture_stay_together() -> None:
    chain = [(n, n + 1) for n in range(8)]  # 0-1, 1-2, …: all are linked
    alone = [(100 + n,) for n in range(40)]
    table = make_table(*chain, *alone, client=["a"] * 48)
    groups = group_by_image(table, np.arange(48))
    assert len(set(groups.of_row[:8].tolist())) == 1
    assert len(groups.digests) == 41
    backwards = group_by_image(table, np.arange(48)[::-1])
    assert {*backwards.digests} == {*groups.digests}
    for seed in range(5):
        federation = federate(table, OPTIONS, seed)
        splits = [{*federation.clients[0].rows_of(split).tolist()} for split in ("train", "test")]
        assert sum(bool(split & {*range(8)}) for split in splits) == 1
        assert describe(table, federation, OPTIONS)["overlap"]["images"]["between_splits"]["train/test"]["rows"] == 0
    drawn = make_options("rows.parquet", partition="iid", clients=4)
    federation = federate(table, drawn, 0)
    held = [{*np.concatenate([c.train, c.validation, c.test]).tolist()} for c in federation.clients]
    assert sum(bool(rows & {*range(8)}) for rows in held) == 1


def test_a_second_picture_in_train_and_test_is_told() -> None:
    table = make_table((0, 1), (2, 1), (3, 0), (4,), split=["train", "test", "test", "test"], client=["a"] * 4)
    found = describe(table, federate(table, OPTIONS, 0), OPTIONS)
    assert found["images"] == {"distinct": 5, "most_rows": 2, "decoded": False}
    assert found["clients"][0]["images"] == 5
    leak = found["overlap"]["images"]["between_splits"]["train/test"]
    assert leak == {"distinct": 2, "rows": 2, "rows_of_the_same_client": 2, "examples": [[0, 1], [0, 2]]}


def test_another_second_picture_is_another_client() -> None:
    pair, other, alone = (make_table(row, client=["a"]) for row in ((0, 1), (0, 2), (0,)))
    found = [describe_clients(encode_table(table, Album()))["a"] for table in (pair, other, alone)]
    assert len({*found}) == 3


def test_what_was_looked_for_is_told_of_the_picture_that_is_lost() -> None:
    table = make_table((0, "gone/second.png"), (1,))
    options = OPTIONS.replace(max_bad_share=0.0)
    with pytest.raises(UserError, match=r"1 × image file cannot be read.*For row 0 it looked for 'gone/second\.png'"):
        encode(table, federate(table, options.replace(test_share=0.0), 0), Album(), options)
