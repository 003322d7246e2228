"""Sentences about training that went wrong: clients whose numbers are not finite, rounds in which nobody counted.

A client is *unfit* in a round if its loss, its message or its state after training is not finite. It has no weight in
that round and keeps the state that it had; the line of the round names it under `unfit`.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedvlm_jax.errors import UserError

UNFIT = "unfit"
"""The key of their names in a round's line."""

SHOWN = 3
"""Names in a sentence; the round's line has all of them."""

RATES = "lower --train.learning-rate-a and --train.learning-rate-b"


def list_names(names: Sequence[str]) -> str:
    """Some names in a sentence, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def describe_unfit(round_: int, names: Sequence[str], from_the_start: Collection[str]) -> str:
    """Say who did not count in a round, and what to look at.

    Args:
        round_: its number.
        names: of the clients, of which some others counted.
        from_the_start: those for whom it is so at learning rates of 0 too.
    """
    data = [name for name in names if name in from_the_start]
    rates = [name for name in names if name not in from_the_start]
    advice = [f"{list_names(data)} has such numbers before a step is taken: look at its examples"] if data else []
    advice += [f"{list_names(rates)} has them from its training: {RATES}, or look at its examples"] if rates else []
    return f"round {round_}: {len(names)} of its clients did not count, for numbers that are not finite; " + "; ".join(
        advice
    )


def explain_all_unfit(round_: int, names: Sequence[str], from_the_start: Collection[str], model: str, good: str) -> str:
    """Say why a run ends in a round in which no client's training gave finite numbers.

    Args:
        round_: its number.
        names: of the clients.
        from_the_start: those for whom it is so at learning rates of 0 too.
        model: the base, as the options name it.
        good: says which checkpoint is left.
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
    """Say why a run ends in a round whose clients gave finite numbers, and whose aggregate is not finite."""
    return (
        f"round {round_}: what the server made of the clients' updates is not finite, and was not taken. "
        f"{RATES.capitalize()}, or --server.learning-rate where it is above 1; {good}"
    )


def describe_lost(results: Mapping[str, Any]) -> str:
    """Name the clients whose own model has a loss that is not finite, where the frozen model has one; "" if none has.

    Args:
        results: of a run, as `results.json` has them.

    Raises:
        UserError: so it is with every client that was evaluated.
    """
    own, base = results["personal"], results["zero_shot"]
    finite: dict[str, bool] = {}
    for split in own:
        for name, loss in ((own[split] or {}).get("loss") or {}).items():
            before = ((base.get(split) or {}).get("loss") or {}).get(name)
            if loss is not None and before is not None and math.isfinite(before):
                finite[name] = finite.get(name, True) and math.isfinite(loss)
    lost = [name for name, is_finite in finite.items() if not is_finite]
    said = (
        f"The models of round {results.get('selected_round')} have a loss that is not finite for {list_names(lost)}: "
        f"what was added to the frozen model is too large; {RATES}."
    )
    if lost and len(lost) == len(finite):
        raise UserError(f"{said} That is every client: these are no results.")
    return said if lost else ""


def describe_rounds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what a finished run's lines show: rounds in which nobody trained, clients that were unfit."""
    said = []
    empty = [line for line in lines if line.get("loss") is None]
    if lines and len(empty) == len(lines):
        said.append(
            f"Nothing was trained: in none of the {len(lines)} rounds did a client's training count, so the adapters "
            "are those of the start. A lower --participation.dropout or a larger --cohort changes that."
        )
    elif empty:
        said.append(f"In {len(empty)} of {len(lines)} rounds nobody's training counted: these changed nothing.")
    often = Counter(name for line in lines for name in line.get(UNFIT, ()))
    if often:
        told = [f"{name} ({count})" for name, count in often.most_common()]
        said.append(
            f"For numbers that are not finite {len(often)} clients did not count in some rounds (how many): "
            f"{list_names(told)}. Look at their examples, or {RATES}."
        )
    return said
