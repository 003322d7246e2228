"""How well scores tell members from others: AUROC, the true positive rate at a small false positive rate, intervals.

Clopper and Pearson 1934 for shares; DeLong, DeLong and Clarke-Pearson 1988 for AUROC. That an attack is judged at a
small false positive rate is Carlini et al. (arXiv 2112.03570).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
"""Level of all intervals."""

Scores = Float[np.ndarray, " rows"]


class Share(NamedTuple):
    """A share with its two-sided interval."""

    value: float
    low: float
    high: float


def clopper_pearson(hits: int, trials: int, level: float = LEVEL) -> Share:
    """Bound the chance of which `hits` of `trials` were seen, two-sided and never too narrow.

    Raises:
        ValueError: there are more hits than trials, or none of either.

    >>> share = clopper_pearson(0, 10)
    >>> round(share.low, 3), round(share.high, 3)
    (0.0, 0.308)
    """
    from scipy.special import betaincinv  # late: it takes a while to import

    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits of {trials} trials")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1 - tail))
    return Share(hits / trials, low, high)


def find_auroc(members: Scores, others: Scores, level: float = LEVEL) -> Share:
    """Compute the chance that a member scores above another row, ties counted half, with DeLong's interval.

    >>> round(find_auroc(np.asarray([0.9, 0.4]), np.asarray([0.5, 0.1])).value, 2)
    0.75

    Raises:
        ValueError: there is nobody on one side.
    """
    from scipy.special import ndtri

    if not len(members) or not len(others):
        raise ValueError("an AUROC needs scores of both kinds")
    ordered_members, ordered_others = np.sort(members), np.sort(others)

    def share_below(values: Scores, against: Scores) -> Scores:
        below, upto = (np.searchsorted(against, values, side) for side in ("left", "right"))
        return (below + upto) / 2 / len(against)

    of_members = share_below(np.asarray(members), ordered_others)
    of_others = 1 - share_below(np.asarray(others), ordered_members)
    value = float(of_members.mean())
    spread = sum(float(part.var(ddof=1)) / len(part) for part in (of_members, of_others) if len(part) > 1)
    half = float(ndtri((1 + level) / 2)) * spread**0.5
    return Share(value, max(0.0, value - half), min(1.0, value + half))


def find_tpr(members: Scores, others: Scores, fpr: float = 0.01, level: float = LEVEL) -> Share:
    """Find the share of members above a threshold that at most this share of the others passes.

    The threshold is the score that stands first among those others who may not pass. With fewer than 1 / `fpr` others
    none of them may.

    >>> find_tpr(np.asarray([3.0, 1.0]), np.asarray([0.0, 2.0])).value
    0.5
    """
    allowed = int(fpr * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return clopper_pearson(int((np.asarray(members) > threshold).sum()), len(members), level)


def trace_roc(members: Scores, others: Scores, most: int = 200) -> list[tuple[float, float]]:
    """List points (false positive rate, true positive rate) of the curve, from (0, 0) to (1, 1), at most `most`.

    >>> trace_roc(np.asarray([2.0]), np.asarray([1.0]))
    [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    """
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    passed = [len(scores) - np.searchsorted(np.sort(scores), thresholds, "left") for scores in (others, members)]
    points = np.stack([np.r_[0, passed[0] / len(others)], np.r_[0, passed[1] / len(members)]], axis=1)
    # Evenly spread over the logarithm of the false positive rate, for that is how the curve is looked at.
    if len(points) > most:
        wanted = np.geomspace(1 / len(others), 1, most - 1)
        kept = np.unique(np.r_[0, np.searchsorted(points[:, 0], wanted, "right") - 1, len(points) - 1])
        points = points[kept]
    return [(float(x), float(y)) for x, y in points]
