"""Reading ahead: the order is that of the indices, the buffer is bounded, errors come out where they belong."""

import threading
import time

import pytest

from fedvlm_jax.data.batches import read_ahead


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
