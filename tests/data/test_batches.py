import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.data.batches import bucket, count_steps, local_batches, pad_rows, read_ahead, round_rows

SMALL = st.integers(0, 12)


@given(seed=SMALL, round_=SMALL, client=SMALL, n=st.integers(0, 30), steps=SMALL, batch=st.integers(1, 9))
def test_every_example_once_per_epoch(seed, round_, client, n, steps, batch):
    indices, mask = local_batches(seed, round_, client, n, steps, batch)
    assert indices.shape == mask.shape == (steps, batch)
    assert (indices.dtype, mask.dtype) == (np.int32, bool)
    order = indices[mask]
    assert len(order) == steps * min(n, batch)
    for start in range(0, len(order) - n + 1, max(n, 1)):
        assert sorted(order[start : start + n]) == list(range(n))
    again, _ = local_batches(seed, round_, client, n, steps, batch)
    assert (again == indices).all()


def test_fewer_than_a_batch_are_masked_not_repeated():
    indices, mask = local_batches(0, 0, 0, 3, 2, 5)
    assert mask.tolist() == [[True, True, True, False, False]] * 2
    assert [sorted(row[:3]) for row in indices.tolist()] == [[0, 1, 2]] * 2


def test_seed_round_and_client_each_matter_and_more_steps_continue():
    base = local_batches(1, 2, 3, 50, 4, 8)[0]
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]:
        assert (local_batches(*other, 50, 4, 8)[0] != base).any()
    assert (local_batches(1, 2, 3, 50, 9, 8)[0][:4] == base).all()


@given(n=st.integers(0, 100_000))
def test_buckets_hold_and_are_few(n):
    size = bucket(n)
    assert size >= n
    assert n <= 8 or size * 2 < n * 3
    assert bucket(size) == size


def test_buckets_by_hand():
    assert [bucket(n) for n in (0, 8, 9, 13, 17, 25, 33, 49)] == [8, 8, 12, 16, 24, 32, 48, 64]


def test_padding_repeats_a_real_row():
    assert pad_rows(np.asarray([7, 9]), 4).tolist() == [7, 9, 7, 7]
    assert pad_rows(np.asarray([], np.int64), 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match="2 rows do not fit into 1"):
        pad_rows(np.asarray([7, 9]), 1)


@given(sizes=st.lists(st.integers(0, 40), max_size=5), steps=st.integers(1, 4), batch=st.integers(1, 6), seed=SMALL)
def test_a_round_carries_only_what_it_touches(sizes, steps, batch, seed):
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(start, start + size) + 100 for start, size in zip(starts, sizes, strict=False)]
    cohort = [3 * place for place in range(len(sizes))]
    size = bucket(min(max(sizes, default=0), steps * batch))
    got = round_rows(seed, 4, cohort, rows, steps, batch, size, [steps] * len(sizes))
    assert got.indices.shape == got.mask.shape == (len(sizes), steps, batch)
    assert got.rows.shape == (len(sizes), size)
    assert got.counts.tolist() == sizes
    for place, client in enumerate(cohort):
        indices, mask = local_batches(seed, 4, client, sizes[place], steps, batch)
        assert (got.mask[place] == mask).all()
        assert (got.rows[place][got.indices[place]][mask] == rows[place][indices[mask]]).all()
        assert set(got.rows[place]) <= ({*rows[place].tolist()} or {0})


def test_steps_of_epochs_by_hand():
    """⌈E n / B⌉; a client with less than a batch takes a step per epoch, and nobody without examples takes any."""
    assert [count_steps(n, 1, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert [count_steps(n, 3, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 3, 3, 4, 6, 7]
    assert [count_steps(100, epochs, 1) for epochs in (0.001, 0.07, 0.29, 1.1)] == [1, 7, 29, 110]  # 0.07 · 100 > 7


@given(n=st.integers(1, 40), epochs=st.integers(1, 4), batch=st.integers(1, 9), seed=SMALL)
def test_epochs_show_every_example_so_often(n, epochs, batch, seed):
    steps = count_steps(n, epochs, batch)
    indices, mask = local_batches(seed, 1, 2, n, steps, batch)
    seen = np.bincount(indices[mask], minlength=n)
    assert seen.min() >= epochs
    assert seen.sum() < epochs * n + min(n, batch), "no step more than it takes"


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), batch=st.integers(1, 6), seed=SMALL, data=st.data()
)  # fmt: skip
def test_steps_that_are_not_taken_read_nothing(sizes, batch, seed, data):
    """The steps that are taken show what they would have shown, and rows are brought for them alone."""
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(start, start + size) + 100 for start, size in zip(starts, sizes, strict=False)]
    cohort, steps = list(range(len(sizes))), 4
    taken = data.draw(st.lists(st.integers(0, steps), min_size=len(sizes), max_size=len(sizes)))
    whole = round_rows(seed, 4, cohort, rows, steps, batch, 24, [steps] * len(sizes))
    some = round_rows(seed, 4, cohort, rows, steps, batch, 24, taken)
    assert some.mask.shape == whole.mask.shape
    for place, first in enumerate(taken):
        assert not some.mask[place, first:].any()
        assert (some.mask[place, :first] == whole.mask[place, :first]).all()
        mask = some.mask[place]
        shown = some.rows[place][some.indices[place]][mask]
        assert (shown == whole.rows[place][whole.indices[place]][mask]).all()
        assert set(some.rows[place]) <= ({*shown.tolist()} or {0})


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_order_does_not_depend_on_the_number_of_threads(ahead: int) -> None:
    def make(index: int) -> int:
        time.sleep(0.004 * (index * 7 % 5))  # later elements are often ready first
        return index * index

    assert list(read_ahead(make, 3, 20, ahead=ahead)) == [index * index for index in range(3, 20)]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_more_than_asked_is_read_ahead(ahead: int) -> None:
    made = []
    elements = read_ahead(lambda index: made.append(index) or index, 0, 50, ahead=ahead)
    for taken in range(1, 6):
        next(elements)
        time.sleep(0.05)  # time enough to run away
        assert taken <= len(made) <= taken + ahead + 1  # one more may be in the making


def test_the_next_is_made_while_this_one_is_used() -> None:
    second = threading.Event()
    elements = read_ahead(lambda index: (index, index == 1 and second.set()), 0, 3, ahead=2)
    next(elements)
    assert second.wait(5), "nothing was read ahead"


def test_an_error_comes_out_in_its_turn() -> None:
    def make(index: int) -> int:
        if index == 2:
            raise KeyError("two")
        return index

    elements = read_ahead(make, 0, 5, ahead=2)
    assert [next(elements), next(elements)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(elements)


def test_an_empty_range_yields_nothing() -> None:
    assert list(read_ahead(lambda index: index, 4, 4)) == []
