"""CIDEr-D (arXiv 1411.5726): n-grams that an answer shares with its gold answers, rare n-grams counting more.

As COCO's caption server computes it: n-grams of one to four tokens, clipped counts, a Gaussian penalty on the
difference in length (sigma 6), times 10, so that a score lies between 0 and 10; nothing is stemmed. Deviation: tokens
are those of `tokenise`, in every script, not the Penn treebank's, which needs Java and knows English alone.

The weight of an n-gram is log(documents / documents that hold it), a document being all gold answers of an example.
The document frequencies come from the gold answers of a split over all clients, each example once: with frequencies of
its few examples alone, a client's score could not be compared with another's.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fedvlm_jax.evaluation.metrics.answer_tokens import pair_up, tokenise

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0

Gram = tuple[Hashable, ...]


class Rarity(NamedTuple):
    """Weights of a corpus' n-grams: `weights` has those that two documents or more hold, all others weigh `most`.

    Most n-grams occur once, and would take most of the memory. `most` is log(documents).
    """

    most: float
    weights: dict[Gram, float]


class _Vector(NamedTuple):
    """A text's n-grams by order, n-gram -> weight; their Euclidean norms; the text's length in tokens."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


def weigh_corpus(corpus: Sequence[Sequence[str]]) -> Rarity:
    """Weigh the n-grams of a corpus, a document of which is all gold answers of an example.

    >>> weigh_corpus([["a bus"], ["a cat"], ["two"]]).weights.keys()
    dict_keys([('a',)])
    """
    return weigh_documents([[tokenise(text) for text in texts] for texts in corpus])


def weigh_documents(documents: Sequence[Sequence[Sequence[Hashable]]]) -> Rarity:
    """Weigh the n-grams of documents, each of which is some texts as tokens of any kind.

    >>> weigh_documents([[[5, 7]], [[5]]]).weights
    {(5,): 0.0}
    """
    most = math.log(max(len(documents), 1))  # an empty split has no documents
    weights: dict[Gram, float] = {}
    for order in ORDERS:  # one after the other, for what is dropped at once needs no memory
        found: Counter[Gram] = Counter()
        for texts in documents:
            found.update({gram for tokens in texts for gram in _list_grams(tokens, order)})
        weights |= {gram: most - math.log(count) for gram, count in found.items() if count > 1}
    return Rarity(most, weights)


def cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]], rarity: Rarity | None = None
) -> Float[np.ndarray, " examples"]:
    """Score every prediction against its gold answers by CIDEr-D, from 0 to 10; the mean where there are several.

    Without the corpus' rarity it is that of `references`, which is right only where these are the whole split over all
    clients. In a corpus of one document every score is 0.

    Raises:
        ValueError: as `pair_up`.

    >>> cider(["a red bus", "two dogs"], [["a red bus"], ["a cat"]]).round(2).tolist()
    [7.5, 0.0]
    """
    rarity = weigh_corpus(references) if rarity is None else rarity
    scores = []
    for prediction, golds in pair_up(predictions, references):
        ours = _weigh(tokenise(prediction), rarity)
        scores.append(10 * sum(_compare(ours, _weigh(tokenise(gold), rarity)) for gold in golds) / len(golds))
    return np.asarray(scores, np.float64)


def _list_grams(tokens: Sequence[Hashable], order: int) -> list[Gram]:
    return list(zip(*(tokens[start:] for start in range(order)), strict=False))


def _weigh(tokens: Sequence[Hashable], rarity: Rarity) -> _Vector:
    counts = [Counter(_list_grams(tokens, order)) for order in ORDERS]
    weights = [
        {gram: times * rarity.weights.get(gram, rarity.most) for gram, times in found.items()} for found in counts
    ]
    return _Vector(weights, [math.hypot(*grams.values()) for grams in weights], len(tokens))


def _compare(ours: _Vector, gold: _Vector) -> float:
    """Average the cosine over orders, clipped to the gold answer's counts and damped by length."""
    total = 0.0
    for mine, other, norm, norm_other in zip(ours.weights, gold.weights, ours.norms, gold.norms, strict=True):
        if norm and norm_other:  # short texts have no long n-grams, and frequent ones weigh nothing
            shared = sum(min(weight, other[gram]) * other[gram] for gram, weight in mine.items() if gram in other)
            total += shared / (norm * norm_other)
    return total / len(ORDERS) * math.exp(-((ours.length - gold.length) ** 2) / (2 * SIGMA**2))
