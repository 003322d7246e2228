"""The contract of every named data set, and what the shipped one promises besides."""

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from make_parquet import make_rows, write_rows
from stamps import write_stamps

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.forms import parquet
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.data.sources.registry import list_sets, make_options, read_table
from fedvlm_jax.data.tokenization import encode
from fedvlm_jax.data.unique_images import digest_rows
from fedvlm_jax.errors import UserError


@pytest.fixture
def stand_in(tmp_path):
    """Where sets lie that do not ship: made-up rows of their form."""
    write_rows(tmp_path / "rows.parquet", make_rows(60))
    write_stamps(tmp_path / "stamps")
    return {"rlaif-v": {"path": tmp_path}, "photos": {"path": tmp_path / "stamps"}}


@pytest.mark.parametrize("name", sorted(list_sets()))
def test_a_named_set_federates_and_encodes_with_the_defaults(name, processor, stand_in):
    options = make_options(source=name, **stand_in.get(name, {}))
    table = read_table(options)
    assert table.name == name
    federation = federate(table, options, 3)
    again = federate(table, options, 3)
    assert (federation.rows == again.rows).all()
    assert len(set(federation.rows.tolist())) == len(federation.rows)
    assert len(set(federation.names)) == len(federation.names)
    assert json.loads(json.dumps(federation.description)) == federation.description
    examples = encode(table, federation, processor, options)
    parts = [client.rows_of(split) for client in examples.clients for split in SPLITS]
    assert np.concatenate(parts).tolist() == list(range(len(examples)))
    assert examples.image.max() == len(examples.images) - 1
    assert not examples.skipped
    assert examples.images.decode(0).mode == "RGB"


def test_the_shipped_set_can_be_cut_anew():
    """Pictures stay with one client, concepts in their split, and every row of the pool is used once."""
    table = read_table("emoji")
    base: Any = {"languages": ("en",), "images_per_client": 30}
    options = make_options(**base, held_out_clients=0.25)
    pool = set()
    for changes in ({}, {"partition": "dirichlet", "clients": 5, "alpha": 0.2}, {"partition": "iid", "clients": 5}):
        federation = federate(table, make_options(**base, **changes), 1)
        splits = table.read_text("split")
        for split in SPLITS:
            assert {splits[row] for client in federation.clients for row in client.rows_of(split)} == {split}
        if not changes:
            continue
        assert len(federation.clients) == 5
        assert federation.description["cut_from"] == ["noto-en", "twemoji-en", "fluent-en", "emojione-en"]
        held = [set(digest_rows(table, np.concatenate([c.rows_of(s) for s in SPLITS]))[0]) for c in federation.clients]
        assert sum(map(len, held)) == len(set().union(*held))
        pool = pool or set(federation.rows.tolist())
        assert set(federation.rows.tolist()) == pool
        assert len(federation.rows) == 4 * 2 * (30 + 30 + 60)
    languages = federate(table, make_options(languages=("en", "de"), partition_by="language", images_per_client=5), 0)
    assert languages.names == ("de", "en")
    assert sum(client.held_out for client in federate(table, options, 1).clients) == 1


def test_the_shipped_set_gives_every_client_what_the_options_say(processor):
    table = read_table("emoji")
    federation = federate(table, make_options(), 0)
    assert len(federation.clients) == 16
    assert {len(client.rows_of(split)) for client in federation.clients for split in SPLITS} == {120, 60}
    assert [len(federation.clients[0].rows_of(split)) for split in SPLITS] == [120, 60, 120]


def test_no_test_concept_is_anybodys_training_concept():
    table = read_table("emoji")
    concepts = defaultdict(set)
    for concept, split in zip(table.read_text("concept"), table.read_text("split"), strict=True):
        concepts[split].add(concept)
    assert set(concepts) == set(SPLITS)
    assert len(set().union(*concepts.values())) == sum(map(len, concepts.values()))


def test_no_picture_is_trained_on_and_tested():
    table = read_table("emoji")
    federation = federate(table, make_options(images_per_client=2000, test_per_client=2000, tasks=("group",)), 0)
    train, test = (
        set(digest_rows(table, np.concatenate([client.rows_of(split) for client in federation.clients]))[0])
        for split in ("train", "test")
    )
    assert len(train) > 3000
    assert len(test) > 1000
    assert not train & test


@pytest.mark.parametrize("options", [DataOptions(), parquet.Options(source="emoji"), emoji.Options(source="nowhere")])
def test_options_of_another_source_are_refused_from_python_too(options):
    """They would open another set than the one that they name."""
    with pytest.raises(UserError, match="has other options than"):
        read_table(options)
