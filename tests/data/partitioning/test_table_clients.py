"""Federations cut out of columns: every row once, every picture with one client, the same seed the same everywhere."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_table import as_lists, count_labels, make_table

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.partitioning.table_clients import choose_rows
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError

PATH = make_options(source="rows.parquet")
DRAWN = {
    "iid": {},
    "quantity": {"alpha": 0.5},
    "dirichlet": {"alpha": 0.5},
    "pathological": {"classes_per_client": 1},
}


def cut(partition, clients=3, **changes):
    return make_options("rows.parquet", partition, **{"clients": clients, **DRAWN.get(partition, {}), **changes})


def make_sources(count, pictures=None):
    """Rows of three sources, 70 %, 20 % and 10 %."""
    origins = [("street", "harbour", "attic")[int(np.searchsorted([70, 90], n % 100, "right"))] for n in range(count)]
    return make_table([n % (pictures or count) for n in range(count)], origin_dataset=origins), origins


@settings(deadline=None)
@given(
    partition=st.sampled_from([*DRAWN]),
    pictures=st.lists(st.integers(0, 30) | st.none(), max_size=60).map(lambda some: [*range(100, 112), *some]),
    by=st.sampled_from(["origin_dataset", "language"]),
    seed=st.integers(0, 2**40),
    given_splits=st.booleans(),
)
def test_drawn_clients_use_every_row_once_and_share_no_picture(partition, pictures, by, seed, given_splits):
    columns = {
        "origin_dataset": [("a", "b")[n % 2] for n in range(len(pictures))],
        "language": [("en", "de", "", None)[(n // 3) % 4] for n in range(len(pictures))],
    }
    if given_splits:
        columns["split"] = [SPLITS[n % 3] for n in range(len(pictures))]
    table = make_table(pictures, **columns)
    options = cut(partition, **({"partition_by": by} if partition in ("dirichlet", "pathological") else {}))
    federation = federate(table, options, seed)
    whole = [row for row, picture in enumerate(pictures) if picture is not None]
    assert sorted(federation.rows) == whole
    assert {(s.row, s.reason) for s in federation.skipped} == {
        (n, "no image") for n in set(range(len(pictures))) - {*whole}
    }
    held = [{pictures[row] for split in SPLITS for row in client.rows_of(split)} for client in federation.clients]
    assert sum(map(len, held)) == len(set().union(*held))
    if not given_splits:
        seen = [{pictures[row] for c in federation.clients for row in c.rows_of(split)} for split in SPLITS]
        assert sum(map(len, seen)) == len(set().union(*seen))
    else:
        assert all(
            columns["split"][row] == split for c in federation.clients for split in SPLITS for row in c.rows_of(split)
        )
    assert as_lists(federate(table, options, seed)) == as_lists(federation)
    assert json.loads(json.dumps(federation.description)) == federation.description


@pytest.mark.parametrize("partition", [*DRAWN, "natural"])
def test_partitions_follow_the_seed_and_not_the_order_of_rows(partition):
    count = 120
    origins = [("a", "b", "c")[n % 3] for n in range(count)]
    options = make_options("rows.parquet", partition, **DRAWN.get(partition, {}))

    def owners(order, seed):
        table = make_table(
            [n // 2 for n in order], idx=list(map(str, order)), origin_dataset=[origins[n // 2] for n in order]
        )
        federation = federate(table, options, seed)
        return {
            c.name: [sorted(table.read_text("idx", c.rows_of(split))) for split in SPLITS] for c in federation.clients
        }

    there = owners(range(count), 3)
    assert owners(np.random.default_rng(0).permutation(count), 3) == there
    assert owners(range(count), 4) != there


def test_dirichlet_clients_differ_in_the_key_and_iid_clients_do_not():
    table, origins = make_sources(3000)
    alike = count_labels(federate(table, cut("iid", 10), 0), origins)
    assert (alike.sum(axis=1) == 300).all()
    assert abs(alike - [30, 60, 210]).max() < 25
    limit = count_labels(federate(table, cut("dirichlet", 10, alpha=float("inf")), 0), origins)
    assert abs(limit - [30, 60, 210]).max() <= 1
    skewed = count_labels(federate(table, cut("dirichlet", 10, alpha=0.1), 0), origins)
    assert skewed.sum() == 3000
    assert abs(skewed - [30, 60, 210]).max() > 500
    single = count_labels(federate(table, cut("pathological", 10), 0), origins)
    assert ((single > 0).sum(axis=1) == 1).all()


def test_a_given_split_is_in_every_client_in_the_same_proportion():
    count = 2000
    splits = [("train", "train", "train", "validation", "test")[n % 5] for n in range(count)]
    origins = [("a", "b")[n % 7 > 4] for n in range(count)]
    table = make_table(range(count), split=splits, origin_dataset=origins)
    for partition in ("iid", "dirichlet", "quantity"):
        for client in federate(table, cut(partition, 8), 2).clients:
            sizes = np.asarray([len(client.rows_of(split)) for split in SPLITS])
            assert abs(sizes - sizes.sum() * np.asarray([0.6, 0.2, 0.2])).max() <= 3


def test_a_picture_has_the_label_that_most_of_its_rows_have():
    """Pictures 0 and 1 are "b" by two rows to one; picture 2 is drawn, so "a", the first by name."""
    table = make_table([0, 0, 0, 1, 1, 1, 2, 2, 3, 3], language=[*"abb", *"bab", *"ba", *"aa"])
    options = cut("pathological", 2, partition_by="language").replace(validation_share=0.0, test_share=0.0)
    owned = {tuple(client.train.tolist()) for client in federate(table, options, 0).clients}
    assert owned == {(0, 1, 2, 3, 4, 5), (6, 7, 8, 9)}


def test_least_sizes_hold_or_what_is_possible_is_told():
    table, _ = make_sources(400)
    options = cut("dirichlet", 8, alpha=0.3)
    free = federate(table, options, 1)
    assert min(len(client.train) for client in free.clients) < 12
    forced = federate(table, options.replace(min_examples=12), 1)
    assert min(len(client.train) for client in forced.clients) >= 12
    assert len(forced.clients) == 8
    assert forced.description["partition"]["draws"] > 1
    assert sorted(forced.rows) == list(range(400))
    with pytest.raises(UserError, match=r"smallest of 8 clients had \d+ training rows at best; .* are 3\d each"):
        federate(table, options.replace(min_examples=60), 1)
    with pytest.raises(UserError, match=r"--data.clients is 500, and there are 400 images"):
        federate(table, cut("iid", 500), 1)


def test_natural_clients_are_the_values_of_any_key():
    splits = ['{"type": "question answering"}', "detailed description", "{'type': 'question answering'}", "?"]
    table = make_table(range(40), origin_split=splits * 10, client=["one"] * 40)
    assert federate(table, PATH, 0).names == ("one",)
    federation = federate(table, make_options("rows.parquet", partition_by="question_type"), 0)
    assert federation.names == ("detailed description", "question answering", "unknown")
    assert [sum(len(c.rows_of(s)) for s in SPLITS) for c in federation.clients] == [10, 20, 10]
    assert federation.description["partition"] == {"kind": "natural", "by": "question_type", "seed": 0}


@pytest.mark.parametrize(
    ("columns", "seen"),
    [
        ({}, "no column 'client' nor 'origin_dataset'"),
        ({"origin_dataset": ["coco"] * 4}, "no column 'client', and only 'coco' in 'origin_dataset'"),
        ({"origin_dataset": [None] * 4}, "no column 'client', and nothing in 'origin_dataset'"),
    ],
)
def test_without_natural_clients_the_flags_that_make_some_are_named(columns, seen):
    with pytest.raises(UserError, match=rf"{seen}.*--data.partition-by \(idx.*--data.partition iid.*--data.clients"):
        federate(make_table(range(4), **columns), PATH, 0)


@pytest.mark.parametrize("partition", ["dirichlet", "pathological"])
def test_partitions_by_a_key_need_one(partition):
    with pytest.raises(
        UserError, match=r"has no column 'origin_dataset'; name one with --data.partition-by: idx, question"
    ):
        federate(make_table(range(20), language=["en"] * 20), cut(partition), 0)


def test_clients_are_named_in_the_order_of_their_numbers():
    table, _ = make_sources(40)
    names = federate(table, cut("iid", 11), 0).names
    assert names == tuple(sorted(names))
    assert names[-1] == "client-10"


def test_the_description_tells_how_the_clients_were_made():
    table, _ = make_sources(60)
    options = cut("dirichlet", 4, alpha=float("inf"), origins=("street",), limit=40)
    description = federate(table, options, 7).description
    assert description["partition"] == {
        "kind": "dirichlet", "clients": 4, "by": "origin_dataset", "alpha": "inf", "values": 1, "rows_unknown": 0,
        "seed": 7, "min_examples": 0, "draws": 1,
    }  # fmt: skip
    assert description["rows_chosen"] == {"of": 60, "origins": ["street"], "limit": 40, "are": 40}
    assert sum(sum(sizes.values()) for sizes in description["rows"].values()) == 40


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_a_limit_takes_one_row_of_every_stretch(count, limit, seed):
    table = make_table(range(count))
    rows = choose_rows(table, PATH.replace(limit=limit), seed)
    assert len(rows) == min(count, limit)
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 0
    assert rows.max() < count
    edges = np.arange(len(rows) + 1) * count // len(rows)
    assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()
    assert rows.tolist() == choose_rows(table, PATH.replace(limit=limit), seed).tolist()


def test_a_limit_is_drawn_by_the_seed_and_shows_no_period():
    origins = [("a", "b", "c", "d")[n % 4] for n in range(800)]
    table = make_table(range(800), origin_dataset=origins)
    drawn = [choose_rows(table, PATH.replace(limit=200), seed) for seed in range(2)]
    assert drawn[0].tolist() != drawn[1].tolist()
    counts = np.asarray([sum(origins[row] == name for row in drawn[0]) for name in "abcd"])
    assert abs(counts - 50).max() < 25  # every fourth row would be all of one


def test_origins_are_a_subset_by_name():
    table, origins = make_sources(100)
    federation = federate(table, PATH.replace(origins=("attic", "harbour")), 0)
    assert federation.names == ("attic", "harbour")
    assert sorted(federation.rows) == [row for row, origin in enumerate(origins) if origin != "street"]
    few = choose_rows(table, PATH.replace(origins=("attic",), limit=4), 0)
    assert {origins[row] for row in few} == {"attic"}
    with pytest.raises(
        UserError, match=r"has cellar; made-up has attic \(10 rows\), harbour \(20 rows\), street \(70 rows"
    ):
        federate(table, PATH.replace(origins=("attic", "cellar")), 0)
    with pytest.raises(UserError, match="no key 'origin_dataset'"):
        federate(make_table(range(4)), PATH.replace(origins=("attic",)), 0)


def test_held_out_clients_never_train_and_keep_their_other_rows():
    table = make_table(range(200), client=[f"c{n % 10}" for n in range(200)])
    everybody = federate(table, PATH, 5)
    options = PATH.replace(held_out_clients=0.2)
    federation = federate(table, options, 5)
    held = [client.name for client in federation.clients if client.held_out]
    assert len(held) == 2
    assert federation.names == everybody.names
    for before, after in zip(everybody.clients, federation.clients, strict=True):
        assert after.train.tolist() == ([] if after.held_out else before.train.tolist())
        assert after.validation.tolist() == before.validation.tolist()
        assert after.test.tolist() == before.test.tolist()
    assert federation.description["held_out"] == {
        "share": 0.2, "seed": 5, "clients": held, "training_rows_set_aside": 28,
    }  # fmt: skip
    chosen = {tuple(c.name for c in federate(table, options, seed).clients if c.held_out) for seed in range(9)}
    assert len(chosen) > 3


def test_a_share_of_held_out_clients_is_one_at_least_and_never_all():
    table = make_table(range(40), client=[f"c{n % 2}" for n in range(40)])
    assert sum(c.held_out for c in federate(table, PATH.replace(held_out_clients=0.01), 0).clients) == 1
    with pytest.raises(UserError, match=r"--data.held-out-clients 0.9 of 2 clients is 2: nobody would be left"):
        federate(table, PATH.replace(held_out_clients=0.9), 0)


def test_small_clients_are_left_out_before_some_are_held_out():
    table = make_table(range(61), client=["tiny"] + [f"c{n % 3}" for n in range(60)])
    federation = federate(table, PATH.replace(min_examples=5, held_out_clients=0.34), 0)
    assert federation.names == ("c0", "c1", "c2")
    assert federation.description["left_out"] == ["tiny"]
    assert sum(client.held_out for client in federation.clients) == 1
