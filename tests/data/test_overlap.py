"""Overlaps, counted by hand and against a slow count that is plainly right."""

import itertools
import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.dataset_summary import find_overlap, place_rows
from fedvlm_jax.data.federated_dataset import ClientRows, Federation
from fedvlm_jax.data.unique_images import number_distinct

NAMES = ("a", "b", "c")


def make_federation(*clients: tuple[list[int], list[int], list[int]]) -> Federation:
    rows = [[np.asarray(part, np.int64) for part in parts] for parts in clients]
    return Federation(tuple(ClientRows(name, *parts) for name, parts in zip(NAMES, rows, strict=False)), {})


def find(federation: Federation, thing_of_row: dict[int, str | None]) -> dict[str, Any]:
    things = number_distinct([thing_of_row[row] for row in federation.rows.tolist()])[1]
    return find_overlap(things, place_rows(federation), federation.names)


def test_rows_are_lined_up_with_client_and_split() -> None:
    places = place_rows(make_federation(([5, 1], [], [2]), ([], [], []), ([], [7], [])))
    assert places.rows.tolist() == [5, 1, 2, 7]
    assert places.clients.tolist() == [0, 0, 0, 2]
    assert [SPLITS[split] for split in places.splits] == ["train", "train", "test", "validation"]


def leaks(overlap: dict[str, Any]) -> dict[str, Any]:
    return {line: found for line, found in overlap["between_splits"].items() if found["distinct"]}


def test_no_leak_where_there_is_none() -> None:
    # Rows of one split may share an image, and so may clients inside it.
    federation = make_federation(([0, 1], [2], [3]), ([4], [5], [6]))
    overlap = find(federation, {0: "x", 1: "x", 2: "y", 3: "z", 4: "x", 5: "v", 6: None})
    assert leaks(overlap) == {}
    assert overlap["distinct"] == 4
    assert overlap["between_clients"] == {"distinct": 1, "rows": 3, "most": [["a", "b", 1]]}


def test_a_known_leak_is_found_with_its_rows() -> None:
    federation = make_federation(([0, 1], [2], [3]), ([4], [], [5, 6]))
    # x: train of a, test of a and of b. y: validation of a, test of b.
    overlap = find(federation, {0: "w", 1: "x", 2: "y", 3: "x", 4: "v", 5: "x", 6: "y"})
    assert leaks(overlap) == {
        "train/test": {"distinct": 1, "rows": 2, "rows_of_the_same_client": 1, "examples": [[1, 3], [1, 5]]},
        "validation/test": {"distinct": 1, "rows": 1, "rows_of_the_same_client": 0, "examples": [[2, 6]]},
    }
    assert overlap["between_clients"] == {"distinct": 2, "rows": 5, "most": [["a", "b", 2]]}
    assert json.loads(json.dumps(overlap)) == overlap


def test_an_empty_federation_has_no_overlap() -> None:
    overlap = find(make_federation(([], [], []), ([1], [], [])), {1: None})
    assert (overlap["distinct"], leaks(overlap)) == (0, {})
    assert overlap["between_clients"] == {"distinct": 0, "rows": 0, "most": []}


@settings(deadline=None)  # scipy is imported in the first example
@given(st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 2), st.integers(0, 2)), max_size=40))
def test_against_counting_one_by_one(stand: list[tuple[int, int, int]]) -> None:
    parts = [[[], [], []] for _ in NAMES]
    for row, (_, client, split) in enumerate(stand):
        parts[client][split].append(row)
    federation = make_federation(*map(tuple, parts))
    overlap = find(federation, {row: None if thing < 0 else str(thing) for row, (thing, _, _) in enumerate(stand)})
    seen = [{(thing, client) for thing, client, at in stand if at == split and thing >= 0} for split in range(3)]
    for first, second in itertools.combinations(range(3), 2):
        crossing = overlap["between_splits"][f"{SPLITS[first]}/{SPLITS[second]}"]
        both = {thing for thing, _ in seen[first]} & {thing for thing, _ in seen[second]}
        assert crossing["distinct"] == len(both)
        assert crossing["rows"] == sum(split == second and thing in both for thing, _, split in stand)
        own = [(thing, client) in seen[first] for thing, client, split in stand if split == second and thing >= 0]
        assert crossing["rows_of_the_same_client"] == sum(own)
        assert len(crossing["examples"]) == min(5, crossing["rows"])
        for one, other in crossing["examples"]:
            assert (stand[one][0], stand[one][2], stand[other][2]) == (stand[other][0], first, second)
    holders = {}
    for thing, client, _ in stand:
        holders.setdefault(thing, set()).add(client)
    holders.pop(-1, None)
    assert overlap["distinct"] == len(holders)
    assert overlap["between_clients"]["distinct"] == sum(len(who) > 1 for who in holders.values())
    counted = {
        (NAMES[one], NAMES[other]): sum({one, other} <= who for who in holders.values())
        for one, other in itertools.combinations(range(3), 2)
    }
    shared = {(one, other): count for one, other, count in overlap["between_clients"]["most"]}
    assert shared == {pair: count for pair, count in counted.items() if count}
