"""Nodes' replies, read as what a stranger wrote: forms, names, sizes and numbers are looked at before they are used."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.deployment.vectors import digest_schema, unpack
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.validated_files import Form, check_form
from fedvlm_jax.utils.untrusted_text import clean, cut

TRAINED: Form = {"round": int, "finite": bool, "metrics": dict[str, float], "schema": str, "largest": float}
SCORED: Form = {"round": int, "scores": dict[str, float | None]}
MODELS = ("zero_shot", "personal", "global")
"""The models that nodes score in the end."""
_MODEL: Form = {"*": dict[str, float | None]}
FINISHED: Form = {
    "results": {"zero_shot": _MODEL, "personal": _MODEL, "global?": _MODEL},
    "gains": dict[str, list[float]],
    "generation": dict[str, Any],
}
REPLY = Path("its reply")
NAME, MOST_NUMBERS = re.compile(r"[a-z][a-z0-9_]{0,39}"), 64
"""Names of numbers that a node may give, and how many."""

Headers = dict[int, Mapping[str, Any]]
Faults = dict[int, str]
"""client number -> what is wrong with its reply, in a line."""


class Trained(NamedTuple):
    """The replies of a round, by client number: those that can count, and who has numbers that are not finite."""

    headers: Headers
    messages: dict[int, PyTree]
    unfit: list[int]


def check_replies(replies: Mapping[int, Packet], form: Form) -> tuple[Headers, Faults]:
    """Return the headers that have a form, and what is wrong with the others."""
    found, faults = Headers(), Faults()
    for number, reply in sorted(replies.items()):
        try:
            check_form(REPLY, reply.header, form)
            found[number] = reply.header
        except UserError as error:
            faults[number] = clean(cut(str(error), 300))
    return found, faults


def read_trained(replies: Mapping[int, Packet], shapes: PyTree, round_: int, *, summed: bool) -> tuple[Trained, Faults]:
    """Read what came of a round.

    Args:
        replies: by client number.
        shapes: of a message.
        round_: the round's number.
        summed: messages come later, in a secure sum.
    """
    schema, found = digest_schema(shapes), Trained({}, {}, [])
    headers, faults = check_replies(replies, TRAINED)
    for number, header in headers.items():
        try:
            if header["round"] != round_ or header["schema"] != schema:
                raise UserError("it is of another round, or of arrays of other shapes")
            message = {} if summed or not header["finite"] else unpack(replies[number].payload, shapes)
        except UserError as error:
            faults[number] = str(error)
            continue
        # Who says that its numbers are finite may be wrong, and would take everybody's with it.
        if not header["finite"] or not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(message)):
            found.unfit.append(number)
            continue
        found.headers[number], found.messages[number] = header, message
    return found, faults


def mean_by_name(found: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Average each number over the clients that have it; names that nodes cannot have from us are left out.

    >>> mean_by_name([{"loss": 1.0, "cider": None, "<b>": 7.0}, {"loss": 3.0}])
    {'loss': 2.0}
    """
    values: dict[str, list[float]] = {}
    for each in found:
        for name, value in _list_named(each):
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: sum(held) / len(held) for name, held in values.items()}


def join_results(replies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the results of clients, by name, to those of a run.

    >>> scores = {"zero_shot": {}, "personal": {"test": {"loss": 0.5}}}
    >>> join_results({"ann": {"results": scores, "gains": {}, "generation": {"num_beams": 1}}})["personal"]
    {'test': {'loss': {'ann': 0.5}}}
    """
    results: dict[str, Any] = {"zero_shot": {}, "personal": {}, "generation": {}}
    for client, reply in replies.items():
        plain = {name: value for name, value in _list_named(reply["generation"]) if isinstance(value, int | float)}
        results["generation"] = results["generation"] or plain
        for model in MODELS:
            for split in SPLITS:
                for metric, value in _list_named(reply["results"].get(model, {}).get(split, {})):
                    results.setdefault(model, {}).setdefault(split, {}).setdefault(metric, {})[client] = value
        for metric, ends in _list_named(reply["gains"]):
            if len(ends) == 2:
                results.setdefault("gain_intervals", {}).setdefault(metric, {})[client] = ends
    return results


def _list_named(numbers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in list(numbers.items())[:MOST_NUMBERS] if NAME.fullmatch(name))
