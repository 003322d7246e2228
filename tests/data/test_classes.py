"""The classes of a federation: what is trained among, what is asked about besides, and which examples are novel."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_table import make_table

from fedvlm_jax.data.classes import count_ambiguous, describe_classes, find_novel, find_own, list_classes
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.federated_dataset import ClientRows, Federation
from fedvlm_jax.data.table import UNREADABLE
from fedvlm_jax.errors import UserError


def rows(*numbers):
    return np.asarray(numbers, np.int64)


CLIENTS = (
    ClientRows("ann", rows(0, 1), rows(2), rows(3)),
    ClientRows("bob", rows(4), rows(), rows(5)),
    ClientRows("eve", rows(), rows(6), rows(7), held_out=True),
)
CHOSEN = ["dog ", "cat", "cat", "emu", "dog", "gnu", "", UNREADABLE, "of nobody"]
REJECTED = ["yak", "dog", "emu", "fox", "", "cat", "dog", "dog", "of nobody"]


def test_classes_are_the_answers_of_rows_in_use():
    table, federation = make_table([None] * 9, chosen=CHOSEN, rejected=REJECTED), Federation(CLIENTS, {})
    assert list_classes(table, federation, DataOptions(), pairs=False) == (("cat", "dog"), ("emu", "fox", "gnu", "yak"))
    # Who learns from pairs trains among the rejected answers, too.
    assert list_classes(table, federation, DataOptions(), pairs=True) == (("cat", "dog", "yak"), ("emu", "fox", "gnu"))
    alone = make_table([None] * 9, chosen=CHOSEN)
    assert list_classes(alone, federation, DataOptions(), pairs=False) == (("cat", "dog"), ("emu", "gnu"))


AGREED = DataOptions(agreed_classes=("hen", "dog", "cat"), agreed_novel=("yak", "gnu", "fox", "emu"))


def test_classes_that_were_agreed_on_take_the_place_of_answers():
    table, federation = make_table([None] * 9, chosen=CHOSEN, rejected=REJECTED), Federation(CLIENTS, {})
    found = list_classes(table, federation, AGREED, pairs=False)
    assert found == (("cat", "dog", "hen"), ("emu", "fox", "gnu", "yak"))


@pytest.mark.parametrize(
    ("changes", "pairs", "told"),
    [
        ({"agreed_novel": ("yak", "fox", "emu")}, False, "^rows of x have the answer 'gnu', which is none of the cl"),
        ({"agreed_classes": ("cat", "dogs")}, False, "^rows of x have the answer 'dog', which is none"),
        ({"agreed_novel": ("emu", "gnu", "fox")}, False, "'yak', which is none"),  # a rejected answer is chosen among
        ({}, True, "^training rows of x have the answer 'yak', a novel class"),
        ({"agreed_classes": ("cat",), "agreed_novel": (*AGREED.agreed_novel, "dog")}, False, "'dog', a novel class"),
    ],
)
def test_answers_that_are_no_class_agreed_on_are_named(changes, pairs, told):
    table, federation = make_table([None] * 9, chosen=CHOSEN, rejected=REJECTED), Federation(CLIENTS, {})
    with pytest.raises(UserError, match=told):
        list_classes(table, federation, AGREED.replace(source="x", **changes), pairs=pairs)


def test_a_stranger_s_answer_is_told_on_one_line():
    table = make_table([None] * 9, chosen=["a\x1b[31m\n" + "b" * 500] * 9)
    with pytest.raises(UserError) as refused:
        list_classes(table, Federation(CLIENTS, {}), AGREED, pairs=False)
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_picture_is_ambiguous_to_a_client_that_has_two_answers_to_it():
    image = np.asarray([0, 0, 1, 1, 1, 2, 1, 1])  # ann: 0 once, 1 with cat and emu; eve: 1 with two again; bob: apart
    answers = ["dog", "dog", "cat", "emu", "dog", "gnu", "cat", "yak"]
    assert count_ambiguous(SimpleNamespace(clients=CLIENTS, answers=answers, image=image)) == 2


def test_novel_is_what_no_training_example_of_anybody_has():
    answers = [text.strip() for text in CHOSEN]
    found = find_novel(SimpleNamespace(clients=CLIENTS, answers=answers))
    assert [answer for answer, novel in zip(answers, found, strict=True) if novel] == answers[3:4] + answers[5:]
    # Somebody who is not here trains on emu, and not on dog.
    found = find_novel(SimpleNamespace(clients=CLIENTS, answers=answers), ("emu", "cat"))
    assert {answer for answer, novel in zip(answers, found, strict=True) if not novel} == {"emu", "cat"}


def test_own_is_what_the_client_itself_trains_on():
    answers = [text.strip() for text in CHOSEN]
    found = find_own(SimpleNamespace(clients=CLIENTS, answers=answers))
    # Ann trains on dog and cat, and is asked about cat and emu; bob on dog, and is asked about gnu; eve on nothing.
    assert found.tolist() == [True, True, True, False, True, False, False, False, False]


def test_strange_and_long_names_are_told_on_one_line():
    told = describe_classes(["a\x1b[31m\n", "b" * 500], ["a\x1b[31m\n", "b" * 500, *"cdefghijk"])
    assert "\x1b" not in told
    assert "\n" not in told
    assert len(told) < 250
    assert told.startswith("answers are chosen among 11 classes, of which 9 are in no training example: ")
    assert told.endswith(", …")
