import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_table import make_table

from fedvlm_jax.data.partitioning.row_keys import DERIVED, UNKNOWN, list_keys, parse_origin_split, read_key
from fedvlm_jax.errors import UserError

ANSWERING = {"question_type": "question answering", "generator": "a 7B", "labeller": "b 34B"}
NOTHING = dict.fromkeys(DERIVED, UNKNOWN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model": "a 7B", "labeller": "b 34B", "type": "question answering"}', ANSWERING),
        ('{"feedback_model": "b 34B", "infer_model": "a 7B", "type": "Question_Answering"}', ANSWERING),
        ("{'Generation Model': 'a 7B', 'Label Model': 'b  34B', 'Question Type': 'question-answering'}", ANSWERING),
        ('{"type": "detailed description", "model": null}', NOTHING | {"question_type": "detailed description"}),
        ('{"type": ["detailed description"], "model": 7}', NOTHING | {"generator": "7"}),
        ("{'type': 'detailed \\d'}", NOTHING | {"question_type": "detailed \\d"}),
        ("detailed_description", NOTHING | {"question_type": "detailed description"}),
        ('{"type": "question answering", "mod', NOTHING | {"question_type": "question answering"}),
        ("detailed description or question answering", NOTHING),
        ("train", NOTHING),
        ("[1]", NOTHING),
        ("{}", NOTHING),
        ("{1, 2}", NOTHING),
        ("{" * 5000, NOTHING),
        ('{"type": "' + "x" * 20_000 + '"}', NOTHING),
        ("", NOTHING),
        (None, NOTHING),
    ],
)
def test_an_origin_split_is_read_in_many_spellings(text, expected):
    assert parse_origin_split(text) == expected


@given(st.one_of(st.text(), st.recursive(st.none() | st.text() | st.floats(), st.lists).map(json.dumps)))
def test_no_text_is_too_odd(text):
    parsed = parse_origin_split(text)
    assert set(parsed) == set(DERIVED)
    assert all(isinstance(value, str) and value for value in parsed.values())


def test_keys_are_the_columns_and_what_origin_split_gives():
    splits = ['{"type": "question answering", "model": "m"}', None, "?"]
    table = make_table([1, 2, 3], origin_split=splits, language=["en", " de ", ""])
    assert list_keys(table) == ("idx", "question", "chosen", "origin_split", "language", *DERIVED)
    assert read_key(table, "language") == ["en", "de", None]
    assert read_key(table, "question_type") == ["question answering", UNKNOWN, UNKNOWN]
    assert read_key(table, "generator", [2, 0]) == [UNKNOWN, "m"]


def test_a_column_wins_over_a_derived_key_of_its_name():
    table = make_table([1], origin_split=['{"model": "m"}'], generator=["column"])
    assert read_key(table, "generator") == ["column"]


@pytest.mark.parametrize("key", ["image", "generator", "colour"])
def test_keys_that_are_not_there_are_told_with_those_that_are(key):
    with pytest.raises(UserError, match=rf"no key '{key}'.*it has idx, question, chosen"):
        read_key(make_table([1]), key)
