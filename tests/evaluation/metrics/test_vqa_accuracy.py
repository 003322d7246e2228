"""VQA accuracy by hand, and against the official evaluation's numbers.

Those are of vqaEval.py in github.com/GT-Vision-Lab/VQA at commit a013f0043c1e (2021), its print statements taken out
for Python 3: `VQAEval.evaluate` for accuracies, `processDigitArticle(processPunctuation(text))` for the forms.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvlm_jax.evaluation.metrics.vqa_accuracy import normalise_short, vqa_accuracy

FORMS = [
    ("The dog.", "dog"),
    ("Two dogs, a cat", "2 dogs cat"),
    ("None", "0"),
    ("ten", "10"),
    ("1,000", "1000"),
    ("1,000 people (or more)", "1000 people or more"),
    ("3.5", "3.5"),
    ("on the left/right", "on left right"),
    ("left / right", "left right"),
    ("it is 5.", "it is 5"),
    ("U.S.", "us"),
    ("dont know", "don't know"),
    ("I cant", "i can't"),
    ("what's  that?", "what's that"),
    ("  red\tand\nblue ", "red and blue"),
    ('"STOP"', "stop"),
    ("black-and-white", "black and white"),
    ("black - and white", "black and white"),
    ("$5.00", "$5.00"),
    ("5 %", "5 %"),
    ("12:30", "12:30"),
    ("a an the", ""),
    ("O'Neill's", "o'neill's"),
    ("whats it for", "what's it for"),
    ("y'allll", "y'all'll"),
    ("'ow'sat", "'ow's'at"),
    ("yes!", "yes"),
    ("yes !", "yes"),
    ("50,000 - 60,000", "50000 60000"),
    ("über", "über"),
    ("no_one", "no 1"),
    ("A", ""),
    ("x > y", "x y"),
    ("C++", "c"),
    ("[unknown]", "unknown"),
    ("theyre", "they're"),
    ("Hes there", "he's there"),
]

# (prediction, gold answers of the people, accuracy); they disagree in writing, so that the official code normalises.
ACCURACIES = [
    ("The two dogs.", ["two dogs", "2 dogs", "dogs", "dogs", "2 dogs", "cat", "a dog", "dog", "2  dogs", "none"], 1.0),
    ("yes", ["yes", "yes", "no", "yes", "no", "no", "no", "no", "no", "no"], 0.9),
    ("Yes", ["yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "no"], 1.0),
    ("no", ["yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "no"], 0.3),
    (
        "red, white and blue",
        [
            "red white and blue",
            "red white blue",
            "red, white, and blue",
            "blue",
            "red and blue",
            "white",
            "red white and blue",
            "blue",
            "tan",
            "usa",
        ],
        0.9,
    ),
    (
        "cant tell",
        [
            "can't tell",
            "cannot tell",
            "can't tell",
            "not sure",
            "unknown",
            "can't tell",
            "no",
            "can't tell",
            "can't tell",
            "maybe",
        ],
        1.0,
    ),
    ("zero", ["0", "none", "0", "no", "nothing", "zero", "0", "1", "2", "none"], 1.0),
    ("1000", ["1,000", "1000", "thousand", "1000", "900", "1,000", "many", "lots", "1000", "1 000"], 1.0),
    ("left", ["right", "right", "right", "right", "right", "on left", "on left", "on left", "on left", "on left"], 0.0),
    ("surfing", ["surfing", "surf", "surfing", "surfboarding", "surfing"], 0.8),
    ("a", ["a", "b", "a", "c"], 0.5),
    ("red", ["red", "blue", "red"], 0.444444444444),
    ("red", ["red", "blue"], 0.166666666667),
]


@pytest.mark.parametrize(("text", "form"), FORMS)
def test_forms_are_the_official_ones(text, form):
    assert normalise_short(text) == form


@pytest.mark.parametrize(("prediction", "golds", "accuracy"), ACCURACIES)
def test_accuracies_are_the_official_ones(prediction, golds, accuracy):
    assert vqa_accuracy([prediction], [golds]).tolist() == [pytest.approx(accuracy, abs=1e-12)]


def test_one_gold_answer_is_right_or_wrong():
    found = vqa_accuracy(["The two dogs.", "a dog", "None"], [["2 dogs"], ["cat"], ["0"]])
    assert found.tolist() == [1.0, 0.0, 1.0]


def test_agreement_by_hand():
    # Three of ten said so. Without one of these three two agree with the prediction (2/3), without another all three:
    # (3 · 2/3 + 7 · 1) / 10.
    golds = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy(["red", "blue", "green"], [golds] * 3).tolist() == [pytest.approx(0.9), 1.0, 0.0]
    # Of two people and of three there are never three others.
    assert vqa_accuracy(["red"] * 2, [["red"] * 2, ["red"] * 3]).tolist() == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    ]
    # People who all agree are normalised too, unlike in the official code.
    assert vqa_accuracy(["Red."], [["red"] * 10]).tolist() == [1.0]


def test_misspellings_lack_one_apostrophe():
    assert normalise_short("couldnt've couldn'tve couldntve") == "couldn't've couldn't've couldntve"
    # The official table writes "somebody'd" without its apostrophe, this one with it: the two are equal in both.
    assert normalise_short("somebodyd") == normalise_short("somebody'd")
    assert normalise_short("im lets shes") == "im lets shes"


@given(
    st.lists(st.sampled_from(["yes", "no", "Yes.", "2", "two"]), min_size=2, max_size=12),
    st.sampled_from(["yes", "no", "two"]),
    st.randoms(),
)
def test_it_is_the_mean_over_those_left_out(golds, prediction, random):
    agrees = [normalise_short(gold) == normalise_short(prediction) for gold in golds]
    left = [min(sum(agrees[:place] + agrees[place + 1 :]) / 3, 1) for place in range(len(golds))]
    assert vqa_accuracy([prediction], [golds])[0] == pytest.approx(np.mean(left))
    assert vqa_accuracy([prediction], [random.sample(golds, len(golds))])[0] == pytest.approx(np.mean(left))
