"""The file of personal states against a dictionary, whatever is written, kept, let go and gone back to."""

import os

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.client_states import ClientStates

CLIENTS = 5
SHAPES = {
    "a": jax.ShapeDtypeStruct((2, 3), np.float32),
    "count": jax.ShapeDtypeStruct((), np.int32),
    "new": jax.ShapeDtypeStruct((3,), np.bool_),
}
STATE = 2 * 3 * 4 + 4 + 3
RECORD = STATE + 16


def make_states(numbers, value):
    """States that tell client and time."""
    at = np.asarray(numbers)
    return {
        "a": np.broadcast_to((at + value / 1000).astype(np.float32)[:, None, None], (len(at), 2, 3)),
        "count": np.full(len(at), value, np.int32),
        "new": np.broadcast_to(at[:, None] % 2 == 0, (len(at), 3)),
    }


def assert_states(found, numbers, values):
    for place, (number, value) in enumerate(zip(numbers, values, strict=True)):
        wanted = make_states([number], value)
        for name, leaf in found.items():
            assert leaf.dtype == SHAPES[name].dtype
            np.testing.assert_array_equal(leaf[place], wanted[name][0])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("scatter"), st.sets(st.integers(0, CLIENTS - 1), min_size=1)),
        st.tuples(st.sampled_from(["keep", "let_go"]), st.sampled_from("xyz")),
        st.tuples(st.just("restart"), st.sampled_from("xyz")),
    ),
    max_size=30,
)


@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_every_kept_table_reads_as_it_was(tmp_path_factory, steps):
    file = tmp_path_factory.mktemp("states") / "states.bin"
    client_states, now, kept = ClientStates(SHAPES, CLIENTS, file), {}, {}
    for value, (what, which) in enumerate(steps):
        if what == "scatter":
            numbers = sorted(which, reverse=bool(value % 2))
            client_states.scatter(numbers, make_states(numbers, value))
            now = {**now, **dict.fromkeys(numbers, value)}
        elif what == "keep":
            kept[which] = (client_states.keep(which).copy(), client_states.stamps(), now)
        elif what == "let_go":
            client_states.let_go(which)
            kept.pop(which, None)
        elif which in kept:  # as after a kill: the file, and the table of a checkpoint
            slots, stamps, now = kept[which]
            client_states = ClientStates(SHAPES, CLIENTS, file)
            client_states.load(slots, stamps)
            client_states.keep(which)
            kept = {which: (slots, stamps, now)}
        assert client_states.find_damage(client_states.slots, *(slots for slots, _, _ in kept.values())) is None
        for slots, values in [(None, now), *((slots, values) for slots, _, values in kept.values())]:
            assert_states(client_states.gather(list(values), slots), values, values.values())
        assert client_states.known.tolist() == [number in now for number in range(CLIENTS)]
    assert file.stat().st_size <= RECORD * CLIENTS * (1 + 3 + 1), "slots are used again"


def test_an_unknown_client_s_state_is_zeros_and_repeated_numbers_read_alike():
    client_states = ClientStates(SHAPES, CLIENTS)
    client_states.scatter([3], make_states([3], 7))
    found = client_states.gather([1, 3, 3])
    assert all((leaf[0] == 0).all() for leaf in found.values())
    assert_states({name: leaf[1:] for name, leaf in found.items()}, [3, 3], [7, 7])


def test_without_a_table_to_keep_a_state_stays_in_its_place(tmp_path):
    """Rounds that nobody remembers leave the file as long as it was."""
    file = tmp_path / "states.bin"
    client_states = ClientStates(SHAPES, CLIENTS, file)
    for value in range(20):
        client_states.scatter([4, 2], make_states([4, 2], value))
    assert client_states.record == RECORD
    assert file.stat().st_size == 2 * RECORD


def test_states_without_bytes():
    """A method that keeps nothing private still knows who took part."""
    client_states = ClientStates({}, CLIENTS)
    client_states.scatter([1], {})
    assert client_states.gather([0, 1]) == {}
    assert client_states.known.tolist() == [False, True, False, False, False]


def test_a_file_that_was_cut_is_told(tmp_path):
    file = tmp_path / "states.bin"
    client_states = ClientStates(SHAPES, CLIENTS, file)
    client_states.scatter([0, 1, 2], make_states([0, 1, 2], 1))
    again = ClientStates(SHAPES, CLIENTS, file)
    again.load(client_states.slots, client_states.stamps())
    assert again.find_damage(again.slots) is None
    os.truncate(file, 2 * RECORD)
    assert "states.bin ends 47 bytes before the end of a client's state" in again.find_damage(again.slots)


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path):
    file = tmp_path / "states.bin"
    client_states = ClientStates(SHAPES, CLIENTS, file)
    client_states.scatter([0, 1], make_states([0, 1], 1))
    os.truncate(file, 2 * RECORD - 5)
    with pytest.raises(UserError, match=r"states\.bin ends 5 bytes before the end of a client's state"):
        client_states.gather([0, 1])


@pytest.mark.parametrize("step", [1, 5, 26, STATE, RECORD])
def test_a_call_may_move_fewer_bytes_and_parts_than_asked(monkeypatch, tmp_path, step):
    def shortened(how):
        def move(file, parts, at):
            moved, left = [], step
            for part in parts:
                moved.append(part[:left])
                left -= len(moved[-1])
            return how(file, moved, at)

        return move

    monkeypatch.setattr(os, "preadv", shortened(os.preadv))
    monkeypatch.setattr(os, "pwritev", shortened(os.pwritev))
    monkeypatch.setattr("fedvlm_jax.federation.client_states.MOST_PARTS", 2)
    client_states = ClientStates({**SHAPES, "nothing": jax.ShapeDtypeStruct((0,), np.float32)}, CLIENTS)
    states = {**make_states([1, 4], 3), "nothing": np.empty((2, 0), np.float32)}
    client_states.scatter([1, 4], states)
    found = client_states.gather([4, 1])
    assert found.pop("nothing").shape == (2, 0)
    assert_states(found, [4, 1], [3, 3])


def test_states_of_another_type_are_refused():
    states = make_states([1], 3)
    with pytest.raises(ValueError, match="reshape"):
        ClientStates(SHAPES, CLIENTS).scatter([1], {**states, "a": states["a"].astype(np.float64)})


def test_two_processes_write_one_file(tmp_path):
    """Each has the table and writes its own records: read by either, all of them are there."""
    file, numbers = tmp_path / "states.bin", [4, 0, 3]
    one, two = (ClientStates(SHAPES, CLIENTS, file) for _ in range(2))
    for value in range(3):
        states = make_states(numbers, value)
        for client_states, own in ((one, [0, 2]), (two, [1])):
            client_states.scatter(numbers, {name: leaf[own] for name, leaf in states.items()}, np.asarray(own))
            client_states.keep("last")
        np.testing.assert_array_equal(one.slots, two.slots)
        np.testing.assert_array_equal(one.stamps(), two.stamps())
        for client_states in (one, two):
            assert_states(client_states.gather(numbers), numbers, [value] * 3)
    nothing = {name: leaf[:0] for name, leaf in make_states([1], 0).items()}
    two.scatter([1], nothing, np.asarray([], np.int64))  # another's
    assert two.known.tolist() == [True, True, False, True, True]
