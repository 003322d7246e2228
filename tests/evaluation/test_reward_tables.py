"""Rewards that read tables: CIDEr against the text metric, a file's against a dictionary, and how tables are made."""

import itertools
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics.cider import cider, weigh_corpus
from fedvlm_jax.evaluation.reward_tables import count_documents, make_reward_tables
from fedvlm_jax.objectives import PreferenceOptions
from fedvlm_jax.objectives.answer_rewards import SCORES
from fedvlm_jax.objectives.reward_tables import find_rows, tabulate_answers

BOS, EOS = 1, 2
WORDS = ["red", "bus", "dog", "cat", "old", "two"]  # of tokens 10, 11, …


def pad(rows, width):
    return np.asarray([[*row, *[-100] * (width - len(row))] for row in rows], np.int32).reshape(-1, width)


def draw_answers(rng, count, most=7):
    return [(10 + rng.integers(0, len(WORDS), length)).tolist() for length in rng.integers(0, most + 1, count)]


def say(rows):
    return [" ".join(WORDS[token - 10] for token in row) for row in rows]


def test_cider_is_the_text_metric_s_where_tokens_are_words():
    rng = np.random.default_rng(0)
    documents, gold, drawn = draw_answers(rng, 60), draw_answers(rng, 300), draw_answers(rng, 300)
    drawn[:40] = gold[:40]
    drawn[40:80] = [row[:-1] + row[:2] for row in gold[40:80]]
    known = count_documents(pad([[BOS, *row, EOS] for row in documents], 12), (BOS, EOS))
    found = SCORES["cider"](jnp.asarray(pad(drawn, 10)), jnp.asarray(pad(gold, 8)), known)
    wanted = cider(say(drawn), [[text] for text in say(gold)], weigh_corpus([[text] for text in say(documents)])) / 10
    assert ((wanted > 0.05) & (wanted < 0.95)).sum() > 50
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_cider_by_hand():
    """Of three documents two have token 10: it weighs log 1.5, and all else log 3."""
    known = count_documents(pad([[10, 11], [10], [12, 13]], 2), ())
    drawn, gold = pad([[10, 10, 11], [11], [14]], 3), pad([[10, 11], [10, 11], [14]], 2)
    often, seldom = math.log(1.5), math.log(3)
    ours, theirs = math.hypot(2 * often, seldom), math.hypot(often, seldom)
    first = (often**2 + seldom**2) / (ours * theirs) + 1 / math.sqrt(2)  # of the bigrams the gold one, beside another
    second = seldom / theirs
    damped = math.exp(-1 / 72)
    found = SCORES["cider"](jnp.asarray(drawn), jnp.asarray(gold), known)
    np.testing.assert_allclose(found, [first / 4 * damped, second / 4 * damped, 0.25], rtol=1e-6)


def test_cider_of_one_document_or_none_is_zero():
    for documents in ([[10]], []):
        known = count_documents(pad(documents, 1), ())
        assert SCORES["cider"](jnp.asarray([[10]]), jnp.asarray([[10]]), known).tolist() == [0.0]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200])
def test_rows_are_found_as_a_dictionary_finds_them(size):
    rng = np.random.default_rng(size)
    keys = [*{tuple(row) for row in rng.integers(0, 7, (size, 4)).tolist()}]
    rewards = {(one, two, tuple(rest)): place / 300 for place, (one, two, *rest) in enumerate(keys)}
    tables = tabulate_answers(rewards, 0.5)
    asked = np.asarray([*keys, *rng.integers(-1, 8, (300, 4)).tolist()], np.int32)
    width = tables["listed"].shape[1]
    at = np.asarray(find_rows(jnp.asarray(tables["listed"]), jnp.asarray(asked[:, :width])))
    found = np.where(at < 0, -1, tables["listed_rewards"][at])
    wanted = [rewards.get((one, two, (*rest,)), -1) for one, two, *rest in asked.tolist()]
    np.testing.assert_allclose(found, wanted if size else [-1] * len(asked), rtol=1e-6)


def test_a_file_s_reward_is_the_nearest_row_s():
    rng = np.random.default_rng(1)
    answers = [(), (5,), (5, 7), (7, 5), (5, 7, 9)]
    keys = [*itertools.product(range(3), range(3), answers[:4])]
    rewards = {keys[place]: float(rng.random()) for place in rng.choice(len(keys), 15, replace=False)}
    cases = [*itertools.product(range(3), range(2), answers)]
    known = tabulate_answers(rewards, 0.25)
    known |= {"reward_question": np.asarray([q for q, _, _ in cases]), "client": np.asarray([c for _, c, _ in cases])}
    drawn = pad([[-100, *row] if row else [] for row in (tokens for _, _, tokens in cases)], 5)  # as without a frame
    found = SCORES["file"](jnp.asarray(drawn), jnp.full((len(cases), 1), -100), known)
    wanted = []
    for q, c, tokens in cases:
        places = ((q, c + 1), (q, 0), (0, c + 1), (0, 0))
        wanted.append(next((rewards[*place, tokens] for place in places if (*place, tokens) in rewards), 0.25))
    assert len({*wanted}) > 8
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


class Letters:
    """A processor with a token a letter, which knows no capitals, in a frame."""

    def answers(self, texts, most):
        rows = [[BOS, *map(ord, text.lower()), EOS][:most] for text in texts]
        return pad(rows, max(map(len, rows)))


def make(tmp_path, *records):
    file = tmp_path / "rewards.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    clients = tuple(
        SimpleNamespace(name=name, trains=name != "eve", train=np.asarray([row]))
        for row, name in enumerate(("ann", "bob", "eve"))
    )
    labels = pad([[BOS, 97, 98, EOS], [BOS, 97, EOS], [BOS, 97, 98, EOS]], 4)
    examples = SimpleNamespace(clients=clients, labels=labels)
    options = PreferenceOptions(rewards=("file", "cider"), reward_file=file)
    return make_reward_tables(options, examples, ["Who?", "What?", "Who?"], Letters(), (BOS, EOS), 6)


def test_tables_of_a_run(tmp_path):
    tables = make(
        tmp_path,
        {"answer": "Ab", "reward": 0.5, "question": "Where?"},  # which nobody asks
        {"answer": "ab", "reward": 1, "question": "What?"},
        {"answer": "b", "reward": 1, "client": "bob"},
        {"answer": "b", "reward": 1, "client": "tom"},
        {"answer": "abcde", "reward": 1},
        {"reward": 0.125},
    )
    assert tables.questions is not None
    assert tables.questions.tolist() == [0, 2, 0]
    listed = tables.arrays["listed"]
    assert listed[:2].tolist() == [[0, 2, 98, -100], [2, 0, 97, 98]]
    assert (listed[2:] == np.iinfo(np.int32).max).all()
    assert float(tables.arrays["listed_default"]) == 0.125
    assert tables.note == (
        "--preference.reward-file: 2 answers, 0.125 for every other; left out: 1 for questions that no example asks, "
        "1 for clients that there are not, 1 of more than 6 tokens, or none"
    )
    # Ann and Bob train, and both say 97; Eve is held out.
    assert float(tables.arrays["gram_most"]) == pytest.approx(math.log(2))
    assert tables.arrays["grams"][0].tolist() == [97, -100, -100, -100]
    assert tables.arrays["gram_weights"].tolist() == [0] * 8


def test_one_answer_for_the_model_has_one_reward(tmp_path):
    assert "1 answer," in make(tmp_path, {"answer": "Ab", "reward": 1}, {"answer": "ab", "reward": 1}).note
    with pytest.raises(UserError, match="'Ab' and 'ab' are the same tokens of the model, and have the rewards 1 and 0"):
        make(tmp_path, {"answer": "Ab", "reward": 1}, {"answer": "ab", "reward": 0})


def test_a_file_without_any_answer_that_can_be_given_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no answer that can be given; left out: 1 for clients that there are not"):
        make(tmp_path, {"answer": "a", "reward": 1, "client": "tom"})
