"""Statistics of attacks, against scipy and against pairs that are counted by hand."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from fedvlm_jax.audit.detection import clopper_pearson, find_auroc, find_tpr, trace_roc


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 40), (1, 1), (3, 7), (39, 40), (200, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_clopper_pearson_is_scipys(hits, trials, level):
    ours, theirs = clopper_pearson(hits, trials, level), binomtest(hits, trials).proportion_ci(level, "exact")
    assert ours.value == hits / trials
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(("hits", "trials"), [(2, 1), (-1, 3), (0, 0)])
def test_clopper_pearson_refuses_what_is_no_share(hits, trials):
    with pytest.raises(ValueError, match="trials"):
        clopper_pearson(hits, trials)


def test_auroc_and_its_interval_by_counting_pairs():
    """3 members, 4 others, a tie: 9 pairs are right and one is half; DeLong's variance from the pairs' matrix."""
    members, others = np.asarray([0.9, 0.5, 0.4]), np.asarray([0.5, 0.3, 0.2, 0.1])
    pairs = np.asarray([[(a > b) + (a == b) / 2 for b in others] for a in members])
    found = find_auroc(members, others)
    assert pairs.sum() == 10.5
    assert found.value == pytest.approx(10.5 / 12)
    variance = pairs.mean(axis=1).var(ddof=1) / 3 + pairs.mean(axis=0).var(ddof=1) / 4
    assert found.low == pytest.approx(10.5 / 12 - norm.ppf(0.975) * variance**0.5)
    assert found.high == 1.0


def test_auroc_of_what_tells_nothing_is_a_half():
    assert find_auroc(np.zeros(5), np.zeros(9)) == (0.5, 0.5, 0.5)


def test_tpr_by_hand():
    """Of 200 others 2 may pass: those of 198 and 199, so a member has to be above 197."""
    others = np.arange(200.0)
    assert find_tpr(np.asarray([196.5, 197.0, 197.5, 300.0]), others).value == 0.5
    # Of 50 none may.
    assert find_tpr(np.asarray([48.5, 49.0, 49.5]), others[:50]).value == pytest.approx(1 / 3)


def test_the_curve_holds_the_area():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 60).round(1), rng.normal(0, 1, 50).round(1)
    points = trace_roc(members, others, most=1000)
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
    assert area == pytest.approx(find_auroc(members, others).value)
    assert points[0] == (0, 0)
    assert points[-1] == (1, 1)


def test_a_long_curve_keeps_its_ends_and_its_beginning():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 1, 2000)
    short, whole = trace_roc(members, others, most=100), trace_roc(members, others, most=10**6)
    assert len(short) <= 101
    assert set(short) <= set(whole)
    assert short[-1] == (1, 1)
    assert min(x for x, _ in short if x) == 1 / 2000
