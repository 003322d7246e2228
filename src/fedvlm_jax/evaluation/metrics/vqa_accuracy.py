"""VQA accuracy (arXiv 1505.00468): short English answers against those of several people.

An answer is right to a third for every person who gave it, up to three; as in the official evaluation, that is averaged
over all subsets of the people that leave one out. Both sides are normalised by the official rules for punctuation,
numbers, articles and contractions. They are English: for other languages use `exact_match`.

Deviations: both sides are always normalised, where the official code leaves them as written if all people agree; a
single gold answer is right or wrong (1 or 0). The rule is made for ten people: of two gold answers it gives at most
1/3, of three at most 2/3.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from fedvlm_jax.evaluation.metrics.answer_tokens import pair_up

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS)} | {"none": "0"}

# Contractions that are mended. "Im", "Ive" and "Id've" are in the official table with a capital that no lower-cased
# word has, and "lets" and "shes" are not: all five stay as written.
FULL_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in FULL_FORMS.split()
    for place, sign in enumerate(form)
    if sign == "'"
}
"""Misspellings, which lack one apostrophe, to full forms: of couldnt've and couldn'tve, not of couldntve."""


def normalise_short(text: str) -> str:
    """Bring a short answer to the official form.

    A mark of punctuation is deleted where it stands beside a space anywhere in the text, or where any comma stands
    between digits (1,000); else it becomes a space. Full stops go unless a digit follows (.5). Then lower case, words
    for numbers from none to ten as digits, articles dropped, contractions with their apostrophes.

    >>> normalise_short("The two dogs' .")
    "2 dogs'"
    """
    text = " ".join(re.split(r"[\n\t]", text)).strip()
    joined = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text  # in the text as given, as in the official code
        plain = plain.replace(mark, "" if beside or joined else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " examples"]:
    """Score every prediction by VQA accuracy, from 0 to 1.

    `references` are the gold answers of every example, one from each person, equal ones as often as they were given.

    Raises:
        ValueError: as `pair_up`.

    >>> vqa_accuracy(["red"], [["red"] * 3 + ["blue"] * 7]).round(3).tolist()
    [0.9]
    """
    scores = []
    for prediction, golds in pair_up(predictions, references):
        answer = normalise_short(prediction)
        agreed, people = sum(normalise_short(gold) == answer for gold in golds), len(golds)
        # Without one of those who agree there are agreed - 1 left; without any other, all of them.
        left_out = agreed * min((agreed - 1) / 3, 1) + (people - agreed) * min(agreed / 3, 1)
        scores.append(left_out / people if people > 1 else float(agreed))
    return np.asarray(scores, np.float64)
