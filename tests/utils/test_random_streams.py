"""All random numbers of a run come from its seed, through streams of which no two are one."""

import ast
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import fedvlm_jax
from fedvlm_jax.data.partitioning.emoji_topics import draw_mix
from fedvlm_jax.federation.participation import draw_cohort
from fedvlm_jax.utils.random_streams import Stream

SOURCE = Path(fedvlm_jax.__file__).parent
NOT_OF_A_RUN = {
    "evaluation/statistics/over_clients.py",
    "methods/zoo/fed_sb.py",
    "lora/adapter.py",
    "export/logit_check.py",
    "audit/canaries.py",
    "federation/diagnostics.py",
}
"""Resampling for intervals has a seed of its own; Fed-SB's frozen factors are the same for every seed; an adapter folds
its sites' paths into a key that it is given; exports are all checked on the same noise; who
replays canaries gives the seed, with its stream; diagnostics compare the same places of a round in every run."""


def read_calls(name):
    """(file, call) of every call of `….name(…)` in the package, but for those that are no run's."""
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE).as_posix()
        if path in NOT_OF_A_RUN:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                yield path, node


def is_stream(node):
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Stream"


def test_every_generator_s_seed_begins_with_a_stream():
    calls = list(read_calls("default_rng"))
    assert len(calls) >= 8, "the search itself finds nothing any more"
    for path, call in calls:
        (seed,) = call.args
        assert isinstance(seed, ast.List), f"{path}:{call.lineno}"
        assert is_stream(seed.elts[0]), f"{path}:{call.lineno}"
        assert not any(is_stream(part) for part in seed.elts[1:]), f"{path}:{call.lineno}"


def test_no_bare_number_is_folded_into_a_key():
    """A run's keys are folded from it with a stream first: by name, or by the round's `fold(stream)`."""
    calls = list(read_calls("fold_in"))
    folded = [call.args[1] for _, call in calls]
    assert sum(is_stream(number) or (isinstance(number, ast.Name) and number.id == "stream") for number in folded) == 5
    for path, call in calls:
        assert not isinstance(call.args[1], ast.Constant), f"{path}:{call.lineno}"
    nodes = ast.walk(ast.parse((SOURCE / "federation/client_round.py").read_text(encoding="utf-8")))
    rounds = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fold"]
    assert len(rounds) == 3
    assert all(is_stream(call.args[0]) for call in rounds)


def test_no_stream_is_read_in_two_places():
    """Two places with the same first number read the same numbers, whatever they append."""
    used = Counter(
        node.attr
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if is_stream(node)
    )
    assert used == dict.fromkeys(Stream.__members__, 1)


def test_numbers_of_release_0_1_stay_but_for_the_cohorts():
    """Data, splits, adapters, batches and turnout of the committed studies are these."""
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == {
        "ADAPTER": 0, "NEWCOMERS": 1, "UPDATES": 2, "DROPOUT": 3, "AGGREGATION": 4,
        "TOPICS": 101, "CONCEPTS": 102, "TURNOUT": 103, "COHORTS": 104, "EVALUATED": 105,
        "BATCHES": 201, "LIMIT": 301, "PARTITIONS": 302, "ROUNDING": 5, "GROUPS": 106,
        "AUDITED": 401, "CANDIDATES": 402, "CANARIES": 403,
        "HOSTILE_NOISE": 21, "ATTACKERS": 121, "POISONED": 122,  # later, as all that is new
    }  # fmt: skip


@pytest.mark.parametrize("number", range(1, 4))
def test_a_client_s_topics_and_a_round_s_cohort_are_two_draws(number):
    """In 0.1 client k's mix and round k's cohort came from one generator."""
    topics = np.random.default_rng([Stream.TOPICS, 5, number])
    cohort = np.random.default_rng([Stream.COHORTS, 5, number])
    same = np.random.default_rng([101, 5, number])
    np.testing.assert_array_equal(draw_mix(topics, 1.0, np.full(4, 0.25)), draw_mix(same, 1.0, np.full(4, 0.25)))
    drawn = draw_cohort(5, number, 1000, 10)
    np.testing.assert_array_equal(drawn, np.sort(cohort.choice(1000, 10, replace=False)))
    again = np.random.default_rng([101, 5, number])
    assert drawn.tolist() != sorted(again.choice(1000, 10, replace=False).tolist())


def test_a_member_folds_as_its_number_does():
    key = jax.random.key(3)
    for stream in (Stream.ADAPTER, Stream.NEWCOMERS, Stream.UPDATES, Stream.DROPOUT, Stream.AGGREGATION):
        assert jax.random.fold_in(key, stream) == jax.random.fold_in(key, int(stream))
