import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_parquet import SOURCES, draw_image, make_emoji_rows, make_row, make_rows, write_rows

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.partitioning.emoji_topics import draw_concepts, draw_mix, read_file
from fedvlm_jax.data.sources.emoji import Topics
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.errors import UserError

EMOJI = make_options(
    vendors=("noto", "twemoji"),
    languages=("en", "de"),
    images_per_client=20,
    validation_per_client=6,
    test_per_client=9,
)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return read_file(write_rows(tmp_path_factory.mktemp("emoji") / "emoji.parquet", make_emoji_rows()))


def read(tmp_path, rows, **kwargs):
    return read_table(str(write_rows(tmp_path / "a.parquet", rows, **kwargs)))


def as_lists(federation):
    return [[client.name, *(client.rows_of(split).tolist() for split in SPLITS)] for client in federation.clients]


def test_sources_are_the_natural_clients(tmp_path):
    federation = federate(read(tmp_path, make_rows(140)), make_options("rows.parquet"), 0)
    assert federation.names == tuple(sorted(SOURCES))
    assert sorted(federation.rows) == list(range(140))
    assert [len(c.train) for c in federation.clients] == [14] * 7  # of 20 images 4 are test, 2 validation
    assert [len(c.test) for c in federation.clients] == [4] * 7


def test_client_and_split_columns_are_taken_as_they_are(tmp_path):
    owners = ["b", "a", "b", "b", None, "a "]
    splits = ["train", "test", "validation", "train", "train", "train"]
    rows = [make_row(n, client=c, split=s) for n, (c, s) in enumerate(zip(owners, splits, strict=True))]
    federation = federate(read(tmp_path, rows), make_options("rows.parquet"), 0)
    assert as_lists(federation) == [["a", [5], [], [1]], ["b", [0, 3], [2], []]]
    assert [(s.row, s.idx, s.reason) for s in federation.skipped] == [(4, "4", "no client")]


def test_unknown_splits_are_refused_with_their_counts(tmp_path):
    rows = [make_row(n, client="a", split=("train", "val", "dev")[min(n, 2)]) for n in range(5)]
    with pytest.raises(UserError, match=r"'dev' \(3 rows\), 'val' \(1 row\); expected train, validation, test"):
        federate(read(tmp_path, rows), make_options("rows.parquet"), 0)


def test_without_clients_or_training_rows_there_is_no_federation(tmp_path):
    with pytest.raises(UserError, match="no column 'client' nor 'origin_dataset'"):
        federate(read(tmp_path, make_rows(3), drop=["origin_dataset"]), make_options("rows.parquet"), 0)
    with pytest.raises(UserError, match=r"no client is left of 1; --data.min-examples is 9 .* has 1 training"):
        federate(read(tmp_path, [make_row(0, client="a")]), make_options("rows.parquet", min_examples=9), 0)
    with pytest.raises(UserError, match="none of the 1 client has a training row"):
        federate(read(tmp_path, [make_row(0, client="a", split="test")]), make_options("rows.parquet"), 0)


def test_negative_seeds_are_refused(emoji):
    with pytest.raises(UserError, match="--seed is -1"):
        federate(emoji, EMOJI, -1)


def test_small_clients_stay_unless_told(tmp_path):
    rows = [make_row(n, client=c, split=s) for n, (c, s) in enumerate([("a", "train")] * 3 + [("b", "test")])]
    table = read(tmp_path, rows)
    assert federate(table, make_options("rows.parquet"), 0).names == ("a", "b")
    federation = federate(table, make_options("rows.parquet", min_examples=1), 0)
    assert federation.names == ("a",)
    assert federation.description["left_out"] == ["b"]
    assert json.dumps(federation.description)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    owners=st.lists(st.integers(0, 4), min_size=8, max_size=60),
    pictures=st.integers(1, 30),
    seed=st.integers(0, 2**40),
)
def test_drawn_splits_use_every_row_once_and_no_image_twice(tmp_path_factory, owners, pictures, seed):
    picture_of = [(7 * n) % pictures for n in range(len(owners))]
    rows = [make_row(n, picture_of[n], client=f"c{owner}") for n, owner in enumerate(owners)]
    table = read(tmp_path_factory.mktemp("drawn"), rows)
    options = make_options(source="a.parquet", validation_share=0.2, test_share=0.3)
    try:
        federation = federate(table, options, seed)
    except UserError:
        assert pictures <= 2  # so few that none was left to train on
        return
    assert sorted(federation.rows) == list(range(len(owners)))
    for client in federation.clients:
        assert all(f"c{owners[row]}" == client.name for split in SPLITS for row in client.rows_of(split))
    seen = [{picture_of[row] for c in federation.clients for row in c.rows_of(split)} for split in SPLITS]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert as_lists(federate(table, options, seed)) == as_lists(federation)


def test_drawn_splits_ignore_the_order_of_rows_and_follow_the_seed(tmp_path):
    rows = [make_row(n, client="a") for n in range(50)]

    def held_out(order, seed):
        path = write_rows(tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet", [rows[n] for n in order])
        table = read_table(str(path))
        return set(table.read_text("idx", federate(table, make_options("rows.parquet"), seed).clients[0].test))

    assert held_out(range(50), 3) == held_out(range(49, -1, -1), 3)
    assert held_out(range(50), 3) != held_out(range(50), 4)


def test_emoji_clients_have_all_tasks_for_images_of_their_own(emoji):
    federation = federate(emoji, EMOJI, 1)
    assert federation.names == ("noto-en", "noto-de", "twemoji-en", "twemoji-de")
    splits, tasks, concepts, clients = (emoji.read_text(c) for c in ("split", "task", "concept", "client"))
    for client in federation.clients:
        for split, count in zip(SPLITS, (20, 6, 9), strict=True):
            rows = client.rows_of(split)
            assert [tasks[row] for row in rows] == ["group", "subgroup"] * count
            assert len({concepts[row] for row in rows}) == count
            assert {(splits[row], clients[row]) for row in rows} == {(split, client.name)}


def test_emoji_draws_nest_and_do_not_disturb_each_other(emoji):
    few, more = (federate(emoji, EMOJI.replace(images_per_client=n), 5) for n in (7, 20))
    alone = federate(emoji, EMOJI.replace(vendors=("twemoji",), languages=("de",)), 5)
    for a, b in zip(few.clients, more.clients, strict=True):
        assert a.train.tolist() == b.train[:14].tolist()
        assert (a.validation.tolist(), a.test.tolist()) == (b.validation.tolist(), b.test.tolist())
    assert as_lists(alone) == as_lists(more)[3:]
    assert as_lists(federate(emoji, EMOJI, 5)) == as_lists(more)
    assert as_lists(federate(emoji, EMOJI, 6)) != as_lists(more)


def test_further_emoji_clients_share_a_style_and_language_and_draw_for_themselves(emoji):
    four, ten = federate(emoji, EMOJI, 5), federate(emoji, EMOJI.replace(partition=Topics(clients=10)), 5)
    assert ten.names[4:] == ("noto-en-2", "noto-de-2", "twemoji-en-2", "twemoji-de-2", "noto-en-3", "noto-de-3")
    assert as_lists(ten)[:4] == as_lists(four), "those who were there keep their images"
    owners, noto = emoji.read_text("client"), [client for client in ten.clients if client.name.startswith("noto-en")]
    for client in noto:
        assert {owners[row] for split in SPLITS for row in client.rows_of(split)} == {"noto-en"}
        assert len(set(client.train.tolist())) == len(client.train) == 40
    first, second, third = (client.train.tolist() for client in noto)
    assert first != second != third != first
    splits = emoji.read_text("split")
    assert all(splits[row] == split for client in ten.clients for split in SPLITS for row in client.rows_of(split))


def test_fewer_emoji_clients_than_styles_and_languages_are_refused(emoji):
    with pytest.raises(UserError, match=r"is 3, and the 2 styles and 2 languages make 4 clients at least"):
        federate(emoji, EMOJI.replace(partition=Topics(clients=3)), 0)


def test_emoji_reports_the_mix_that_came_out(emoji):
    federation = federate(emoji, EMOJI.replace(partition=Topics(alpha=0.1)), 2)
    groups = emoji.read_text("group")
    for client in federation.clients:
        counted = Counter(groups[row] for row in client.train[::2])
        reported = federation.description["topics"][client.name]["mix_realised"]["train"]
        assert reported == {f"group{g}": counted[f"group{g}"] / 20 for g in range(6)}


def test_emoji_clients_get_what_there_is_when_they_ask_for_more(emoji):
    federation = federate(emoji, EMOJI.replace(images_per_client=500, validation_per_client=0), 0)
    assert [len(client.train) for client in federation.clients] == [144, 144, 120, 120]  # 72 concepts; twemoji draws 60
    assert all(len(client.validation) == 0 for client in federation.clients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vendors": ("apple",)}, "--data.vendors has apple; the emoji set has noto, twemoji"),
        ({"languages": ("en", "xx")}, "--data.languages has xx; the emoji set has de, en"),
        ({"tasks": ("name",)}, "--data.tasks has name; the emoji set has group, subgroup"),
    ],
)
def test_emoji_names_what_it_has(emoji, changes, message):
    with pytest.raises(UserError, match=message):
        federate(emoji, EMOJI.replace(**changes), 0)


def test_emoji_refuses_a_concept_in_two_splits(tmp_path):
    rows = make_emoji_rows(concepts=10)
    rows[0]["split"] = "test"
    with pytest.raises(UserError, match="concept '0000'"):
        federate(read_file(write_rows(tmp_path / "emoji.parquet", rows)), EMOJI, 0)


def test_a_mix_has_the_moments_of_its_dirichlet():
    prior = np.asarray([0.5, 0.3, 0.2])
    drawn = np.stack([draw_mix(np.random.default_rng(n), 0.4, prior) for n in range(20_000)])
    concentration = 0.4 * 3
    np.testing.assert_allclose(drawn.mean(0), prior, atol=0.01)
    np.testing.assert_allclose(drawn.var(0), prior * (1 - prior) / (concentration + 1), atol=0.005)
    assert draw_mix(np.random.default_rng(0), np.inf, prior) is prior


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    count=st.integers(0, 40),
    fewer=st.integers(0, 40),
    alpha=st.sampled_from([1e-4, 0.3, 10.0, np.inf]),
    seed=st.integers(0, 1000),
)
def test_draws_are_without_replacement_and_nest(sizes, count, fewer, alpha, seed):
    pools = [[f"{group}/{place}" for place in range(size)] for group, size in enumerate(sizes)]
    mix = draw_mix(np.random.default_rng(seed), alpha, np.full(len(sizes), 1 / len(sizes)))
    drawn = draw_concepts(np.random.default_rng(seed), mix, pools, count)
    assert len(drawn) == len(set(drawn)) == min(count, sum(sizes))
    assert set(drawn) <= {concept for pool in pools for concept in pool}
    assert draw_concepts(np.random.default_rng(seed), mix, pools, fewer)[:count] == drawn[:fewer]


def test_a_dry_group_gives_its_share_to_the_others():
    drawn = draw_concepts(np.random.default_rng(0), np.asarray([1.0, 0.0]), [["a", "b"], ["c", "d", "e"]], 4)
    assert set(drawn[:2]) == {"a", "b"}
    assert len(set(drawn[2:]) & {"c", "d", "e"}) == 2


def test_the_same_picture_at_two_clients_is_in_one_split(tmp_path):
    shared = {"bytes": draw_image(99), "path": "x.png"}
    rows = [make_row(n, client=f"c{n % 9}", **({"image": shared} if n % 10 == 0 else {})) for n in range(90)]
    federation = federate(read(tmp_path, rows), make_options("rows.parquet"), 11)
    holders = {split for split in SPLITS for c in federation.clients for row in c.rows_of(split) if row % 10 == 0}
    assert len(holders) == 1


def test_novel_classes_are_left_out_of_training_and_validation_alone(tmp_path):
    rows = [
        make_row(n, client="ab"[n % 2], split=SPLITS[n // 20], chosen=f" class {n % 5} ", rejected="none")
        for n in range(60)
    ]
    table = read(tmp_path, rows)
    options = make_options("rows.parquet", novel_classes=0.4)
    federation, whole = federate(table, options, 1), federate(table, make_options("rows.parquet"), 1)

    def classes(part, split):
        return {n % 5 for client in part.clients for n in client.rows_of(split).tolist()}

    assert classes(federation, "train") == classes(federation, "validation")
    assert len(classes(federation, "train")) == 3
    assert classes(federation, "test") == set(range(5))
    assert [client.test.tolist() for client in federation.clients] == [c.test.tolist() for c in whole.clients]
    said = federation.description["novel_classes"]
    assert said == {"share": 0.4, "seed": 1, "classes": 2, "rows_set_aside": 16}
    assert "novel_classes" not in whole.description
    drawn = {frozenset(classes(federate(table, options, seed), "train")) for seed in range(8)}
    assert len(drawn) > 1
    assert len(classes(federate(table, options.replace(novel_classes=0.01), 0), "train")) == 4
    with pytest.raises(UserError, match=r"--data\.novel-classes 0\.95 of 5 different answers is 5: none would be left"):
        federate(table, options.replace(novel_classes=0.95), 0)
