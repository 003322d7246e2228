"""Metrics of answers: by hand, by what must hold for any texts, and against reference implementations.

The references' numbers are those of golden_texts.json (see make_golden.py), or, marked `parity`, of rouge-score in the
same process on other sentences. VQA accuracy's are in test_vqa.py.
"""

import importlib.util
import json
import random

import numpy as np
import pytest
from evaluation.make_golden import ARTICLES, CASES, FILE, join_words, rouge
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics.cider import cider, weigh_corpus
from fedvlm_jax.evaluation.metrics.text_metrics import METRICS, exact_match, rouge_l, select_metrics, token_f1

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
PREDICTIONS, REFERENCES = [prediction for prediction, _ in CASES], [golds for _, golds in CASES]

# Few words, so that answers share some.
TEXTS = st.one_of(
    st.lists(st.sampled_from(["a", "the", "dog", "Dog.", "it's", "2", "犬", "食べ物", "!", "Straße"]), max_size=8).map(
        " ".join
    ),
    st.text(max_size=12),
)
ANSWERS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)), min_size=1, max_size=6)


def test_exact_match_by_hand():
    found = exact_match(["Food.", "food", "", "!"], [["food"], ["foods", "FOOD"], [""], ["?", "。"]])
    assert found.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert found.dtype == np.float64
    assert exact_match([], []).shape == (0,)


@pytest.mark.parametrize(
    ("prediction", "golds", "f1"),
    [
        # Two of three tokens, two of two: 2 · 2 / (3 + 2).
        ("big red bus", ["red bus"], 0.8),
        ("The red bus!", ["a Red Bus", "car"], 1.0),
        ("red red bus", ["red bus bus"], 2 / 3),
        ("bus red", ["red bus"], 1.0),
        ("cat", ["dog", "the cat sat"], 2 / 3),
        ("食べ物と飲み物", ["飲み物"], 0.6),
        ("红色的公共汽车", ["红色汽车"], 8 / 11),
        ("A", ["A"], 1.0),
        ("A", ["B"], 0.0),
        ("?", ["!"], 0.0),
        ("", [""], 1.0),
        ("", ["dog"], 0.0),
        ("dog", ["", "cat"], 0.0),
    ],
)
def test_token_f1_by_hand(prediction, golds, f1):
    assert token_f1([prediction], [golds]).tolist() == [pytest.approx(f1)]


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        # Lin's example: "police the gunman" against "police killed the gunman" share three tokens in order.
        ("police kill the gunman", ["police killed the gunman"], 0.75),
        ("the gunman kill police", ["police killed the gunman"], 0.5),
        ("bus red", ["red bus"], 0.5),
        ("red red bus", ["red bus", "dog"], 0.8),
        ("飲み物と食べ物", ["食べ物と飲み物"], 3 / 7),
        ("", ["dog"], 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, golds, score):
    assert rouge_l([prediction], [golds]).tolist() == [pytest.approx(score)]


def test_cider_by_hand():
    # Two documents. "dog" is in both: weight 0; "a" and "b" in one each: weight log 2. The first prediction has the
    # right unigram and bigram of two, and no more tokens: cosines 1, 1, 0, 0. The second repeats: unigrams 2 log 2
    # clipped to log 2 over norms 2 log 2 and log 2 give 1/2; of the bigrams "b b" and "b dog" one is gold: 1/sqrt(2);
    # one token too long: exp(-1/72).
    found = cider(["a dog", "b b dog"], [["a dog"], ["b dog"]])
    long = (1 / 2 + 1 / np.sqrt(2)) / 4 * np.exp(-1 / 72)
    assert found.tolist() == [pytest.approx(5.0), pytest.approx(10 * long)]


def test_cider_is_the_mean_over_gold_answers():
    corpus = weigh_corpus(REFERENCES)
    golds = REFERENCES[0]
    whole = cider([PREDICTIONS[0]], [golds], corpus)[0]
    assert whole == pytest.approx(np.mean([cider([PREDICTIONS[0]], [[gold]], corpus)[0] for gold in golds]))


def test_cider_weighs_by_the_corpus_not_by_the_client():
    selected = select_metrics(["cider"], REFERENCES)["cider"]
    apart = [selected([one], [golds])[0] for one, golds in zip(PREDICTIONS, REFERENCES, strict=True)]
    np.testing.assert_allclose(apart, cider(PREDICTIONS, REFERENCES), rtol=1e-12)
    assert cider(["a red bus"], [["a red bus"]]).tolist() == [0.0], "nothing is rare in a corpus of one document"
    assert selected(["a red bus"], [["a red bus"]])[0] == pytest.approx(7.5), "three orders of four"


def test_a_corpus_keeps_what_occurs_twice():
    corpus = weigh_corpus([["a b", "a"], ["a b"], ["b c"]])
    assert corpus.weights == pytest.approx({("a",): np.log(3 / 2), ("b",): 0.0, ("a", "b"): np.log(3 / 2)}, abs=1e-15)
    assert corpus.most == pytest.approx(np.log(3))


def test_against_the_references_numbers():
    assert [list(case) for case in CASES] == GOLDEN["cases"], "make_golden.py has changed: run it"
    np.testing.assert_allclose(rouge_l(PREDICTIONS, REFERENCES), GOLDEN["rougeL"], rtol=1e-12)
    np.testing.assert_allclose(cider(PREDICTIONS, REFERENCES), GOLDEN["cider"], rtol=1e-12, atol=1e-14)
    plain = join_words(CASES, ARTICLES)
    np.testing.assert_allclose(
        token_f1([one for one, _ in plain], [golds for _, golds in plain]), GOLDEN["f1"], rtol=1e-12
    )


def test_other_tokens_than_the_treebanks_change_cider_little():
    ours, treebank = cider(PREDICTIONS, REFERENCES), np.asarray(GOLDEN["cider_treebank"])
    assert ours.mean() == pytest.approx(2.083, abs=5e-4)
    assert treebank.mean() == pytest.approx(2.115, abs=5e-4)
    signs = "'-0123456789"
    plain = [n for n, (one, golds) in enumerate(CASES) if not any(sign in one + "".join(golds) for sign in signs)]
    assert len(plain) == 8
    np.testing.assert_allclose(ours[plain], treebank[plain], atol=5e-3)


@pytest.mark.parity
def test_against_rouge_score_on_other_sentences():
    if importlib.util.find_spec("rouge_score") is None:
        pytest.skip("needs the extra `parity`: pip install -e '.[parity]'")
    draw = random.Random(5)
    words = [word for one, golds in CASES for text in (one, *golds) for word in text.split()]

    def make() -> str:
        return " ".join(draw.choices(words, k=draw.randint(0, 15)))

    cases = [(make(), [make() for _ in range(draw.randint(1, 4))]) for _ in range(500)]
    # A text without a word scores 0 there; against another such text it is equal here.
    cases = [(one, golds) for one, golds in cases if one and all(golds)]
    found = rouge_l([one for one, _ in cases], [golds for _, golds in cases])
    np.testing.assert_allclose(found, rouge(cases)["rougeL"], rtol=1e-12)


@pytest.mark.parametrize("name", METRICS)
@given(ANSWERS, st.randoms())
@settings(max_examples=40)
def test_every_metric_is_bounded_and_knows_no_order(name, answers, shuffle):
    predictions, references = [one for one, _ in answers], [golds for _, golds in answers]
    scores = METRICS[name](predictions, references)
    assert scores.shape == (len(answers),)
    assert scores.dtype == np.float64
    assert (scores >= 0).all()
    assert (scores <= (10 if name == "cider" else 1) + 1e-9).all()
    order = shuffle.sample(range(len(answers)), len(answers))
    again = METRICS[name]([predictions[n] for n in order], [references[n] for n in order])
    np.testing.assert_allclose(again, scores[order], rtol=1e-9, atol=1e-12)
    turned = METRICS[name](predictions, [golds[::-1] for golds in references])
    np.testing.assert_allclose(turned, scores, rtol=1e-9, atol=1e-12)
    twice = METRICS[name](predictions * 2, references * 2)
    np.testing.assert_allclose(twice[: len(answers)], twice[len(answers) :], rtol=1e-12)
    if name != "cider":  # whose weights are the corpus', which has grown
        np.testing.assert_allclose(twice[: len(answers)], scores, rtol=1e-12)


@pytest.mark.parametrize("metric", [exact_match, token_f1, rouge_l])
@given(ANSWERS, TEXTS)
@settings(max_examples=40)
def test_another_gold_answer_can_only_help(metric, answers, text):
    predictions, references = [one for one, _ in answers], [golds for _, golds in answers]
    assert (metric(predictions, [[*golds, text] for golds in references]) >= metric(predictions, references)).all()


@given(ANSWERS)
def test_what_matches_exactly_has_all_tokens(answers):
    predictions, references = [one for one, _ in answers], [golds for _, golds in answers]
    exact = exact_match(predictions, references) == 1
    assert (token_f1(predictions, references)[exact] == 1).all()
    assert (rouge_l(predictions, references)[exact] == 1).all()


@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_gold_answers_given_back_are_as_good_as_it_gets(texts):
    golds = [[text] for text in texts]
    for name in ("exact_match", "token_f1", "rouge_l", "vqa_accuracy"):
        assert (METRICS[name](texts, golds) == 1).all()


def test_metrics_are_asked_for_by_name():
    chosen = select_metrics(["rouge_l", "cider"], REFERENCES)
    assert list(chosen) == ["rouge_l", "cider"]
    np.testing.assert_allclose(chosen["rouge_l"](PREDICTIONS, REFERENCES), GOLDEN["rougeL"], rtol=1e-12)
    with pytest.raises(UserError, match=r"no metric 'bleu'; expected some of exact_match, token_f1"):
        select_metrics(["exact_match", "bleu"], REFERENCES)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_what_does_not_pair(name):
    with pytest.raises(ValueError, match="expected as many"):
        METRICS[name](["a"], [["a"], ["b"]])
    assert METRICS[name]([], []).shape == (0,)
