"""Sentences of a report. A loss is called a loss, and a difference inside its interval is called level."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure, percent
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import BySeed, Difference, compare_paired, count_seeds_ahead, judge
from fedvlm_jax.messages.config import WITHSTANDS
from fedvlm_jax.reporting.score_tables import RIVALS, read_scores
from fedvlm_jax.reporting.tables import points
from fedvlm_jax.run_dir.reader import ComparisonRecord, RunRecord
from fedvlm_jax.run_dir.stored_baseline import read_baseline
from fedvlm_jax.training.failures import describe_lost, describe_rounds, list_names
from fedvlm_jax.utils.untrusted_text import clean, cut

ANSWER = 80  # letters of an answer in a sentence
FEW = 8  # up to so many methods each difference has a sentence of its own
# The digests of a run's fingerprint.
SOURCES = {"data": "data", "weights": "base weights", "model_files": "model files", "clients": "clients"}


def describe_run(record: RunRecord) -> list[str]:
    """Describe what a run achieved, and what it does not show."""
    zero_shot, personal = record.scores("zero_shot"), record.scores("personal")
    before, after = summarise(zero_shot), summarise(personal)
    gain = after.mean - before.mean
    change = f"{points(gain)} points" if gain else "no change"
    sentences = [
        f"With {record.method}, each of {format_count(after.clients, 'client')} with its own model "
        f"{_achieves(record.metric, after.mean)} on average; the frozen model "
        f"{_achieves(record.metric, before.mean)} ({change})."
    ]
    if gain < 0:
        difference = compare_paired({0: personal}, {0: zero_shot})
        if difference is None or math.isnan(difference.low):
            sentences.append("From one client, so without an interval.")
        elif judge(difference) == "behind":
            sentences.append(f"So {record.method} lost here: training made the average client worse.")
        else:
            sentences.append("That is inside the noise: the 95 % interval over clients holds zero.")
    sentences.append(
        f"The worst tenth of the clients goes from {percent(before.worst_decile)} to {percent(after.worst_decile)}."
    )
    common = [client for client in personal if client in zero_shot]
    better = sum(personal[client] > zero_shot[client] for client in common)
    worse = sum(personal[client] < zero_shot[client] for client in common)
    sentences.append(f"{better} of {format_count(len(common), 'client')} gained, {worse} lost.")
    chosen = record.results.get("selected_round")
    if chosen is not None:
        ends = [str(extension["from"]) for extension in record.config.get("longer") or []]
        read = f"read then, and after round {' and '.join(ends)} before" if ends else "read once"
        # A choice on validation data would tell of them.
        how = "the last" if record.results.get("privacy") else "chosen on validation"
        sentences.append(f"The adapters are those of round {chosen}, {how}; test was {read}.")
    lost = describe_lost(record.results)
    return [*sentences, *([lost] if lost else []), *describe_rounds(record.rounds), _describe_sharing(record)]


def describe_attack(record: RunRecord) -> list[str]:
    """Say who was hostile in a run, that scores leave them out, how often a backdoor opens, and which rule stood by."""
    sentences = []
    if attackers := record.attackers:
        kind = (record.options.get("participation") or {}).get("attack", "none")
        who = "Attackers of other runs, who behave in this one" if kind == "none" else f"Simulated attackers ({kind})"
        sentences.append(f"{who}: {list_names(attackers)}. No score and no mean over clients has them.")
    attack = record.results.get("attack") or {}
    marked, plain = (
        [rate for rate in (attack.get(part) or {}).values() if rate is not None]
        for part in ("with_mark", "without_mark")
    )
    if marked and plain:
        answer = cut(clean(attack.get("target") or ""), ANSWER)
        sentences.append(
            f"The backdoor's answer is “{answer}”. On test pictures with the mark, where it is wrong, the other "
            f"clients' own models give it in {percent(sum(marked) / len(marked))}, without the mark in "
            f"{percent(sum(plain) / len(plain))}."
        )
    if record.pool != "mean":
        sentences.append(f"In place of the mean of the clients' messages the server took: {record.pool}.")
        sentences += _describe_left_out(record)
        asked = (record.options.get("messages") or {}).get("hostile", 0)
        short = [line for line in record.rounds if line.get(WITHSTANDS, asked) < asked]
        if short:
            sentences.append(
                f"In {len(short)} of {format_count(len(record.rounds), 'round')} too few clients counted for it to "
                f"withstand {asked} hostile ones."
            )
    return sentences


def _describe_left_out(record: RunRecord) -> list[str]:
    rounds = [
        [value for value in line["selection"].values() if value is not None]
        for line in record.rounds
        if line.get("selection")
    ]
    if not any(0 in values for values in rounds):
        return []
    nothing = fmean(values.count(0) for values in rounds)
    return [f"Of {fmean(map(len, rounds)):.3g} clients a round {nothing:.3g} gave nothing to it, on average."]


def _achieves(metric: str, value: float) -> str:
    if metric == "exact_match":
        return f"gets {percent(value)} of the test questions exactly right"
    if metric.startswith("preference_accuracy"):
        return f"finds the preferred of two test answers likelier in {percent(value)} of all pairs"
    return f"reaches a {find_measure(metric).label} of {percent(value)} on test"


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


def describe_runs(records: Sequence[RunRecord]) -> list[str]:
    """Say what may, and what may not, be read out of several runs side by side."""
    best = max(records, key=lambda record: summarise(record.scores("personal")).mean)
    accuracy = percent(summarise(best.scores("personal")).mean)
    sentences = [
        f"{len(records)} runs. The highest mean is that of {best.folder.name} ({best.method}): {accuracy}.",
        "These runs were started one by one, so their clients and seeds may differ, and no interval is given. "
        "`fedvlm compare` compares on equal terms.",
    ]
    known = [record for record in records if record.config.get("fingerprint")]
    found = []
    for record in known[1:]:
        ours, theirs = known[0].config["fingerprint"], record.config["fingerprint"]
        if unlike := [name for key, name in SOURCES.items() if ours.get(key) != theirs.get(key)]:
            found.append(f"{record.folder.name} (other {', '.join(unlike)})")
    if found:
        first = known[0].folder.name
        sentences.append(f"Not on what {first} was trained on: {'; '.join(found)}. Their numbers do not compare.")
    return sentences


def describe_comparison(record: ComparisonRecord) -> list[str]:
    """Describe which method is ahead of which, method by method, against the two rivals that are hard to beat."""
    scores = read_scores(record)
    means = {
        method: sum(summarise(by_client).mean for by_client in by_seed.values()) / len(by_seed)
        for method, by_seed in scores.items()
    }
    ranking = sorted((method for method in means if method != "zero-shot"), key=lambda method: -means[method])
    sentences = [_describe_winner(ranking, means, scores)] if len(ranking) > 1 else []
    for rival in RIVALS:
        if rival not in scores:
            continue
        if len(ranking) > FEW:
            sentences.append(_sum_up(rival, ranking, scores))
            continue
        for method in ranking:
            # The two rivals meet once, from fine-tuning's side.
            if method == rival or (method, rival) == RIVALS:
                continue
            if (difference := compare_paired(scores[method], scores[rival])) is not None:
                ahead = count_seeds_ahead(scores[method], scores[rival])
                sentences.append(_describe_difference(method, rival, difference, ahead))
    if "zero-shot" in means:
        sentences.append(f"Zero-shot, the frozen model alone, has {percent(means['zero-shot'])}.")
    seeds = len(record.seeds)
    if seeds == 1:
        sentences.append("There is one seed: the intervals are over clients and say nothing about other seeds.")
    elif seeds < 3:
        sentences.append(f"There are only {seeds} seeds: the intervals are wide, and only large differences can show.")
    return sentences


def _describe_winner(ranking: Sequence[str], means: Mapping[str, float], scores: Mapping[str, BySeed]) -> str:
    first, second = ranking[:2]
    trained = " of what was trained" if means.get("zero-shot", -math.inf) > means[first] else ""
    sentence = f"The highest mean on test{trained} is that of {first}, {percent(means[first])}"
    difference = compare_paired(scores[first], scores[second])
    if difference is not None and judge(difference) == "ahead":
        return f"{sentence}, ahead of {second} with {percent(means[second])}."
    return f"{sentence}, but its lead over {second} ({percent(means[second])}) is within the noise."


def _sum_up(rival: str, ranking: Sequence[str], scores: Mapping[str, BySeed]) -> str:
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
