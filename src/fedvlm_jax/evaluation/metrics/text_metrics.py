"""Exact match, token F1 and ROUGE-L of generated answers, and the list of all text metrics by name.

A metric is `(predictions, gold answers) -> a number per example`. Of several gold answers, exact match, token F1 and
ROUGE-L take the one that fits best, as SQuAD and ROUGE do; CIDEr averages over them, VQA accuracy counts how many
agree. All lie between 0 and 1, CIDEr between 0 and 10.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics.answer_tokens import normalise, pair_up, tokenise, tokenise_squad
from fedvlm_jax.evaluation.metrics.cider import cider, weigh_corpus
from fedvlm_jax.evaluation.metrics.vqa_accuracy import vqa_accuracy

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Float[np.ndarray, " examples"]]
"""(predictions [N], gold answers [N] lists) -> float64 [N]; raises what `pair_up` raises."""


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " examples"]:
    """Score 1.0 where a prediction equals one of its gold answers after `normalise`, else 0.0.

    >>> exact_match(["A cat.", "dog"], [["a cat", "cat"], ["cat"]]).tolist()
    [1.0, 0.0]
    """
    return _take_best(lambda ours, gold: float(ours == gold), predictions, references, normalise)


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " examples"]:
    """Compute SQuAD's F1 (arXiv 1606.05250) of the tokens that both have, in any order, by `tokenise_squad`.

    Two answers without a token are equal (1.0), as in SQuAD 2.0. On ASCII it is SQuAD's number but for texts of
    punctuation or articles alone, which SQuAD takes for empty and this keeps.

    >>> token_f1(["the red bus"], [["a bus"]]).round(3).tolist()
    [0.667]
    """

    def overlap(ours: list[str], gold: list[str]) -> float:
        return _f1((Counter(ours) & Counter(gold)).total(), ours, gold)

    return _take_best(overlap, predictions, references, tokenise_squad)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " examples"]:
    """Compute ROUGE-L (Lin 2004, ACL W04-1013): F1 of the longest common subsequence of tokens, by `tokenise`.

    As the package rouge-score computes it (precision and recall weigh the same, no stemming), but for texts that are no
    ASCII or have neither letter nor digit. COCO's caption server weighs recall more (beta 1.2): its numbers differ.

    >>> rouge_l(["a bus that is red"], [["a red bus"]]).tolist()
    [0.5]
    """
    from rapidfuzz.distance import LCSseq  # late: only this metric needs it

    def share_order(ours: list[str], gold: list[str]) -> float:
        return _f1(LCSseq.similarity(ours, gold), ours, gold)

    return _take_best(share_order, predictions, references, tokenise)


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "cider": cider,
    "vqa_accuracy": vqa_accuracy,
}
"""Text metrics by name. `cider` here weighs by the gold answers of its call: `select_metrics` binds a corpus."""


def select_metrics(names: Sequence[str], corpus: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Select metrics by name, ready to be called client by client.

    The corpus is the gold answers of every example of the split, over all clients, for CIDEr's document frequencies.

    Raises:
        UserError: there is no metric of that name.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"there is no metric {unknown[0]!r}; expected some of {', '.join(METRICS)}.")
    chosen = {name: METRICS[name] for name in names}
    if "cider" in chosen:
        chosen["cider"] = functools.partial(cider, rarity=weigh_corpus(corpus))
    return chosen


def _take_best(
    score: Callable[[Any, Any], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    read: Callable[[str], Any],
) -> Float[np.ndarray, " examples"]:
    """Take the score of the gold answer that fits best, both sides in the form that `score` compares."""
    best = []
    for prediction, golds in pair_up(predictions, references):
        ours = read(prediction)
        best.append(max(score(ours, read(gold)) for gold in golds))
    return np.asarray(best, np.float64)


def _f1(common: int, ours: list[str], gold: list[str]) -> float:
    """Compute the harmonic mean of the shares that `common` tokens have of both sides."""
    return 2 * common / (len(ours) + len(gold)) if ours or gold else 1.0
