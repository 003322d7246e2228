"""Sentences about training that went wrong: clients whose numbers are not finite, rounds in which nobody counted.

A client is *unfit* in a round if its loss, its message or its state after training is not finite. It has no weight in
that round and keeps the state that it had; the line of the round names it under `unfit`.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedvlm_jax.errors import UserError, format_count

UNFIT = "unfit"
SHOWN = 3
"""Names in a sentence; the round's line has all of them."""
RATES = "lower --train.learning-rate-a and --train.learning-rate-b"


def list_names(names: Sequence[str]) -> str:
    """Name some in a sentence, and say how many more there are.

    >>> list_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def describe_unfit(round_: int, names: Sequence[str], from_the_start: Collection[str]) -> str:
    """Say who did not count in a round, and what to look at; `from_the_start`: who would not at rates of 0 either.

    >>> describe_unfit(3, ["a"], ["a"]).partition("; ")[2]
    'a has such numbers before a step is taken: look at its examples'
    """
    data = [name for name in names if name in from_the_start]
    rates = [name for name in names if name not in from_the_start]
    advice = [f"{list_names(data)} has such numbers before a step is taken: look at its examples"] if data else []
    advice += [f"{list_names(rates)} has them from its training: {RATES}, or look at its examples"] if rates else []
    who = f"round {round_}: {len(names)} of its clients did not count, for numbers that are not finite"
    return "; ".join([who, *advice])


def explain_all_unfit(round_: int, names: Sequence[str], from_the_start: Collection[str], model: str, good: str) -> str:
    """Say why a run ends in a round in which no client's training gave finite numbers.

    Args:
        round_, names: of the round and of its clients.
        from_the_start: the clients for whom it is so at learning rates of 0 too.
        model, good: the base, as the options name it; and which checkpoint is left, in words.
    """
    who = f"of {list_names(names)}" if len(names) <= SHOWN else f"of all {len(names)} clients"
    if len(from_the_start) < len(names):
        return f"round {round_}: the training {who} gives numbers that are not finite: {RATES}; {good}"
    if round_ == 1:
        return (
            f"round 1: the loss {who} is not finite before anything is trained, so it is not the learning rates: what "
            f"--model {model} puts out is not finite. Look at its weights, and at these clients' examples; {good}"
        )
    return (
        f"round {round_}: the loss {who} is not finite before the round's training: what earlier rounds added to the "
        f"model is too large, {RATES}; {good}"
    )


def explain_aggregate(round_: int, good: str) -> str:
    """Say why a run ends in a round whose clients gave finite numbers, and whose aggregate is not finite.

    >>> explain_aggregate(2, "there is no checkpoint yet").partition(". ")[0]
    "round 2: what the server made of the clients' updates is not finite, and was not taken"
    """
    return (
        f"round {round_}: what the server made of the clients' updates is not finite, and was not taken. "
        f"{RATES.capitalize()}, or --server.learning-rate where it is above 1; {good}"
    )


def describe_lost(results: Mapping[str, Any]) -> str:
    """Name the clients whose own model has a loss that is not finite, where the frozen model has one; "" if none has.

    >>> results = {"selected_round": 4, "zero_shot": {"test": {"loss": {"a": 0.5, "b": 0.5}}}}
    >>> describe_lost({**results, "personal": {"test": {"loss": {"a": 0.4, "b": math.inf}}}}).partition(" for ")[2][:1]
    'b'

    Raises:
        UserError: so it is with every client that was evaluated.
    """
    personal, base = results["personal"], results["zero_shot"]
    finite: dict[str, bool] = {}
    for split in personal:
        losses, before = (((scores.get(split) or {}).get("loss") or {}) for scores in (personal, base))
        for name, loss in losses.items():
            if loss is not None and before.get(name) is not None and math.isfinite(before[name]):
                finite[name] = finite.get(name, True) and math.isfinite(loss)
    lost = [name for name, is_finite in finite.items() if not is_finite]
    sentence = (
        f"The models of round {results.get('selected_round')} have a loss that is not finite for {list_names(lost)}: "
        f"what was added to the frozen model is too large; {RATES}."
    )
    if lost and len(lost) == len(finite):
        raise UserError(f"{sentence} That is every client: these are no results.")
    return sentence if lost else ""


def describe_rounds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what a finished run's lines show: rounds in which nobody trained, clients that were unfit.

    >>> describe_rounds([{"loss": 0.5}, {"loss": None}])
    ["In 1 of 2 rounds nobody's training counted: these changed nothing."]
    """
    sentences = []
    empty = [line for line in lines if line.get("loss") is None]
    if lines and len(empty) == len(lines):
        sentences.append(
            f"Nothing was trained: in none of the {format_count(len(lines), 'round')} did a client's "
            "training count, so the adapters "
            "are those of the start. A lower --participation.dropout or a larger --cohort changes that."
        )
    elif empty:
        effect = "released noise alone" if "noise_norm" in empty[0] else "changed nothing"
        sentences.append(
            f"In {len(empty)} of {format_count(len(lines), 'round')} nobody's training counted: these {effect}."
        )
    often = Counter(name for line in lines for name in line.get(UNFIT, ()))
    if often:
        counted = [f"{name} ({count})" for name, count in often.most_common()]
        sentences.append(
            f"For numbers that are not finite {format_count(len(often), 'client')} did not count in some "
            "rounds (how many): "
            f"{list_names(counted)}. Look at their examples, or {RATES}."
        )
    return sentences
