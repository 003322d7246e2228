"""Sentences of a report. A loss is called a loss, and a difference inside its interval is called level."""

import math
from collections.abc import Sequence
from typing import Any

from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import Difference, compare_paired, count_seeds_ahead, judge
from fedvlm_jax.reporting.score_tables import RIVALS
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord, read_baseline
from fedvlm_jax.training.failures import describe_lost, describe_rounds

FEW = 8
"""Up to so many methods each difference has a sentence of its own."""


def describe_run(record: RunRecord) -> list[str]:
    """Describe what a run achieved, and what it does not show."""
    zero_shot, personal = record.scores("zero_shot"), record.scores("personal")
    before, after = summarise(zero_shot), summarise(personal)
    gain = after.mean - before.mean
    change = f"{points(gain)} points" if gain else "no change"
    sentences = [
        f"With {record.method}, each of {after.clients} clients with its own model "
        f"{_achieves(record.metric, after.mean)} on average; the frozen model "
        f"{_achieves(record.metric, before.mean)} ({change})."
    ]
    if gain < 0:
        sentences.append(_describe_loss(record.method, compare_paired({0: personal}, {0: zero_shot})))
    sentences.append(
        f"The worst tenth of the clients goes from {percent(before.worst_decile)} to {percent(after.worst_decile)}."
    )
    common = [client for client in personal if client in zero_shot]
    better = sum(personal[client] > zero_shot[client] for client in common)
    worse = sum(personal[client] < zero_shot[client] for client in common)
    sentences.append(f"{better} of {len(common)} clients gained, {worse} lost.")
    chosen = record.results.get("selected_round")
    if chosen is not None:
        ends = [str(one["from"]) for one in record.config.get("longer") or []]
        read = f"read then, and after round {' and '.join(ends)} before" if ends else "read once"
        sentences.append(f"The adapters are those of round {chosen}, chosen on validation; test was {read}.")
    lost = describe_lost(record.results)
    sentences += [*([lost] if lost else []), *describe_rounds(record.rounds)]
    sentences.append(_describe_sharing(record))
    return sentences


def _describe_loss(method: str, difference: Difference | None) -> str:
    if difference is None or math.isnan(difference.low):
        return "From one client, so without an interval."
    if judge(difference) == "behind":
        return f"So {method} lost here: training made the average client worse."
    return "That is inside the noise: the 95 % interval over clients holds zero."


def _describe_sharing(record: RunRecord) -> str:
    alone = read_baseline(record)
    if alone is None or alone.metric != record.metric:
        return (
            "One run of one method: whether sharing is worth it, against training alone, is what `fedvlm compare` "
            "measures."
        )
    difference = compare_paired({0: record.scores("personal")}, {0: alone.scores("personal")})
    if difference is None:
        return "Trained alone, no client has a score to compare with."
    sentence = _describe_difference(record.method, "training alone", difference, 0)
    return f"{sentence} Same clients, rounds and rates; `fedvlm compare` has several seeds and methods."


def _achieves(metric: str, value: float) -> str:
    if metric == "exact_match":
        return f"gets {percent(value)} of the test questions exactly right"
    if metric.startswith("preference_accuracy"):
        return f"finds the preferred of two test answers likelier in {percent(value)} of all pairs"
    return f"reaches a {find_measure(metric).label} of {percent(value)} on test"


def describe_runs(records: Sequence[RunRecord]) -> list[str]:
    """Say what may, and what may not, be read out of several runs side by side."""
    best = max(records, key=lambda record: summarise(record.scores("personal")).mean)
    accuracy = percent(summarise(best.scores("personal")).mean)
    return [
        f"{len(records)} runs. The highest mean is that of {best.folder.name} ({best.method}): {accuracy}.",
        "These runs were started one by one, so their clients and seeds may differ, and no interval is given. "
        "`fedvlm compare` compares on equal terms.",
        *_name_unlike(records),
    ]


SOURCES = {"data": "data", "weights": "base weights", "model_files": "model files", "clients": "clients"}
"""The digests of a run's fingerprint."""


def _name_unlike(records: Sequence[RunRecord]) -> list[str]:
    """Name the runs whose data, base or clients are not those of the first, as far as their folders tell."""
    known = [record for record in records if record.config.get("fingerprint")]
    found = []
    for record in known[1:]:
        ours, theirs = known[0].config["fingerprint"], record.config["fingerprint"]
        if unlike := [name for key, name in SOURCES.items() if ours.get(key) != theirs.get(key)]:
            found.append(f"{record.folder.name} (other {', '.join(unlike)})")
    if not found:
        return []
    return [f"Not on what {known[0].folder.name} was trained on: {'; '.join(found)}. Their numbers do not compare."]


def describe_comparison(record: ComparisonRecord) -> list[str]:
    """Describe which method is ahead of which, method by method, against the two rivals that are hard to beat."""
    scores = {method: record.scores(method) for method in ["zero-shot", *record.methods]}
    scores = {method: by_seed for method, by_seed in scores.items() if by_seed}
    means = {
        method: sum(summarise(one).mean for one in by_seed.values()) / len(by_seed)
        for method, by_seed in scores.items()
    }
    ranking = sorted((method for method in means if method != "zero-shot"), key=lambda method: -means[method])
    sentences = [_describe_winner(ranking, means, scores)] if len(ranking) > 1 else []
    for rival in RIVALS if len(ranking) <= FEW else ():
        for method in ranking:
            # The two rivals meet once, from fine-tuning's side.
            if rival in scores and method != rival and not (method == RIVALS[0] and rival == RIVALS[1]):
                difference = compare_paired(scores[method], scores[rival])
                if difference is not None:
                    ahead = count_seeds_ahead(scores[method], scores[rival])
                    sentences.append(_describe_difference(method, rival, difference, ahead))
    if len(ranking) > FEW:
        sentences += [_sum_up(rival, ranking, scores) for rival in RIVALS if rival in scores]
    if "zero-shot" in means:
        sentences.append(f"Zero-shot, the frozen model alone, has {percent(means['zero-shot'])}.")
    if len(record.seeds) < 3:
        sentences.append(_warn_of_few_seeds(len(record.seeds)))
    return sentences


def _sum_up(rival: str, ranking: Sequence[str], scores: dict[str, Any]) -> str:
    """Describe in one sentence which of many methods are ahead of a rival, which behind, and which are level."""
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "level": []}
    for method in ranking:
        difference = compare_paired(scores[method], scores[rival])
        if method != rival and difference is not None:
            found[judge(difference)].append(f"{method} ({points(difference.mean)})")
    parts = {"ahead": "ahead of it", "behind": "behind it", "level": "not to be told apart from it"}
    groups = [f"{parts[verdict]}: {', '.join(names) or 'none'}" for verdict, names in found.items()]
    return f"Against {rival}, in points, by 95 % intervals without a correction for their number; {'; '.join(groups)}."


def _describe_difference(method: str, rival: str, difference: Difference, seeds_ahead: int) -> str:
    """Describe a paired difference in a sentence."""
    size = f"{abs(100 * difference.mean):.1f} points"
    seeds = f"ahead in {seeds_ahead} of {difference.seeds} seeds" if difference.seeds > 1 else "one seed"
    if math.isnan(difference.low):
        return f"{method} against {rival}: {points(difference.mean)} points, from one client, so without an interval."
    interval = f"95 % interval {points(difference.low)} to {points(difference.high)}"
    verdict = judge(difference)
    if verdict == "ahead":
        return f"{method} is ahead of {rival} by {size} ({interval}; {seeds})."
    if verdict == "behind":
        return f"{method} loses to {rival} by {size} ({interval}; {seeds})."
    return (
        f"{method} and {rival} cannot be told apart: the difference of {points(difference.mean)} points lies inside "
        f"the noise ({interval}; {seeds})."
    )


def _describe_winner(ranking: list[str], means: dict[str, float], scores: dict[str, Any]) -> str:
    first, second = ranking[:2]
    trained = " of what was trained" if means.get("zero-shot", -math.inf) > means[first] else ""
    sentence = f"The highest mean on test{trained} is that of {first}, {percent(means[first])}"
    difference = compare_paired(scores[first], scores[second])
    if difference is not None and judge(difference) == "ahead":
        return f"{sentence}, ahead of {second} with {percent(means[second])}."
    return f"{sentence}, but its lead over {second} ({percent(means[second])}) is within the noise."


def _warn_of_few_seeds(seeds: int) -> str:
    if seeds == 1:
        return "There is one seed: the intervals are over clients and say nothing about other seeds."
    return f"There are only {seeds} seeds: the intervals are wide, and only large differences can show."
