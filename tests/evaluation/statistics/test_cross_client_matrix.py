import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.cross_client_matrix import Rival, summarise_matrix

# Down the models of a, b, c; across their data. On b's data a's model is better than b's own; on c's it ties.
VALUES = np.array([[0.5, 0.75, 0.25], [0.25, 0.5, 0.0], [0.25, 0.5, 0.25]])


def test_a_matrix_by_hand():
    found = summarise_matrix(VALUES, ["a", "b", "c"])
    assert found.own == pytest.approx(1.25 / 3)
    assert found.others == pytest.approx(2 / 6)
    assert found.own_best == pytest.approx(2 / 3)
    assert found.rivals == (Rival("b", "a", 0.5, 0.75),)
    assert found.clients == 3


def test_of_a_loss_the_lowest_is_best():
    found = summarise_matrix(VALUES, ["a", "b", "c"], higher_is_better=False)
    assert found.own_best == pytest.approx(1 / 3)
    assert found.rivals == (Rival("a", "b", 0.5, 0.25), Rival("c", "b", 0.25, 0.0))


def test_one_client_has_no_others():
    found = summarise_matrix(np.array([[0.5]]), ["a"])
    assert (found.own, found.own_best, found.rivals) == (0.5, 1.0, ())
    assert math.isnan(found.others)


@given(st.data())
def test_the_order_of_clients_changes_nothing(data):
    count = data.draw(st.integers(1, 6))
    flat = data.draw(st.lists(st.integers(0, 5), min_size=count**2, max_size=count**2))
    values, names = np.reshape(flat, (count, count)), list("abcdef")[:count]
    order = data.draw(st.permutations(range(count)))
    one = summarise_matrix(values, names)
    other = summarise_matrix(values[np.ix_(order, order)], [names[n] for n in order])
    assert (other.own, other.others, other.own_best) == pytest.approx((one.own, one.others, one.own_best), nan_ok=True)
    assert {(rival.client, rival.best) for rival in other.rivals} == {
        (rival.client, rival.best) for rival in one.rivals
    }
    assert one.own_best == pytest.approx(1 - len(one.rivals) / count)
    assert all(rival.best > rival.own and rival.model != rival.client for rival in one.rivals)
    turned = summarise_matrix(-values, names, higher_is_better=False)
    assert [rival.client for rival in turned.rivals] == [rival.client for rival in one.rivals]


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (np.zeros((2, 3)), ["a", "b"], r"shape \(2, 3\) for 2 clients"),
        (np.zeros((0, 0)), [], "for 0 clients"),
        (np.array([[1.0, math.nan], [0.0, 0.0]]), ["a", "b"], "model of a has no finite value on the data of b"),
    ],
)
def test_what_is_no_matrix_is_refused(values, names, message):
    with pytest.raises(UserError, match=message):
        summarise_matrix(values, names)
