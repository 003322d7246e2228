"""Nodes' replies, read as what a stranger wrote: forms, names, sizes and numbers are looked at before they are used."""

import math
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
from fedvlm_jax.run_dir.validated_files import VALIDATION, Form, check_form
from fedvlm_jax.training.failures import UNFIT
from fedvlm_jax.utils.serialization import fit
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
RESERVED = frozenset({*VALIDATION, UNFIT})
"""Names of a line's entries that are no numbers."""

LARGEST_FLOAT = float(np.finfo(np.float32).max)
LARGEST = 10**9
"""The most that an option may be which a node says it evaluated with."""

Score = tuple[float, float]
"""The metric by which rounds are compared, and the loss with its sign turned, which decides between equals."""
NO_SCORE: Score = (-math.inf, -math.inf)

Headers = dict[int, Mapping[str, Any]]
Faults = dict[int, str]
"""client number -> what is wrong with its reply, in a line."""


class Trained(NamedTuple):
    """The replies of a round, by client number: those that can count, and who has numbers that are not finite."""

    headers: Headers
    messages: dict[int, PyTree]
    unfit: list[int]


def read_header(source: Path, header: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Return the entries of a form, numbers as float64: JSON may have texts for them, and integers without end.

    Raises:
        UserError: an entry is missing or of another type; names `source`.

    >>> read_header(REPLY, {"largest": "inf", "round": 3, "odd": []}, {"largest": float, "round": int})
    {'largest': inf, 'round': 3}
    """
    check_form(source, header, form)
    return _convert(header, form)


def _convert(stored: Mapping[str, Any], form: Form) -> dict[str, Any]:
    kinds = dict.fromkeys(stored, form["*"]) if "*" in form else {name.removesuffix("?"): form[name] for name in form}
    return {
        name: _convert(stored[name], kind) if isinstance(kind, dict) else fit(kind, stored[name], name)
        for name, kind in kinds.items()
        if name in stored
    }


def check_replies(replies: Mapping[int, Packet], form: Form) -> tuple[Headers, Faults]:
    """Return the headers that have a form, and what is wrong with the others."""
    found, faults = Headers(), Faults()
    for number, reply in sorted(replies.items()):
        try:
            found[number] = read_header(REPLY, reply.header, form)
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
            if header["finite"] and not 0 <= header["largest"] < math.inf:
                raise UserError("it says that its largest entry is none that can be")
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

    Numbers that are not finite are left out as well, unless all are: one node would take everybody's with it.

    >>> mean_by_name([{"loss": 1.0, "cider": None, "<b>": 7.0}, {"loss": 3.0}, {"loss": math.nan}])
    {'loss': 2.0}
    """
    values: dict[str, list[float]] = {}
    for each in found:
        for name, value in _list_named(each):
            if value is not None:
                values.setdefault(name, []).append(value)
    finite = {name: list(filter(math.isfinite, held)) or held for name, held in values.items()}
    return {name: sum(value / len(held) for value in held) for name, held in finite.items()}


def read_score(scores: Mapping[str, float | None], metric: str) -> Score | None:
    """Return what a round is compared by; None where a client lacks it, or has numbers that are not finite.

    >>> read_score({"cider": 0.5, "loss": 2.0}, "cider"), read_score({"cider": 0.5, "loss": math.inf}, "cider")
    ((0.5, -2.0), None)
    """
    named = dict(_list_named(scores))
    value, loss = named.get(metric), named.get("loss")
    if value is None or loss is None or not (math.isfinite(value) and math.isfinite(loss)):
        return None
    return value, -loss


def mean_scores(scores: Sequence[Score]) -> Score:
    """Average scores of clients.

    >>> mean_scores([(0.5, -2.0), (1.0, -1.0)]), mean_scores([])
    ((0.75, -1.5), (-inf, -inf))
    """
    if not scores:
        return NO_SCORE
    values, losses = zip(*scores, strict=True)
    return sum(values) / len(scores), sum(losses) / len(scores)


def join_results(replies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the results of clients, by name, to those of a run.

    >>> scores = {"zero_shot": {}, "personal": {"test": {"loss": 0.5}}}
    >>> join_results({"ann": {"results": scores, "gains": {}, "generation": {"num_beams": 1}}})["personal"]
    {'test': {'loss': {'ann': 0.5}}}
    """
    results: dict[str, Any] = {"zero_shot": {}, "personal": {}, "generation": {}}
    for client, reply in replies.items():
        plain = {name: value for name, value in _list_named(reply["generation"]) if _is_plain(value)}
        results["generation"] = results["generation"] or plain
        for model in MODELS:
            for split in SPLITS:
                for metric, value in _list_named(reply["results"].get(model, {}).get(split, {})):
                    results.setdefault(model, {}).setdefault(split, {}).setdefault(metric, {})[client] = value
        for metric, ends in _list_named(reply["gains"]):
            if len(ends) == 2 and all(map(_is_float32, ends)):
                results.setdefault("gain_intervals", {}).setdefault(metric, {})[client] = ends
    return results


def add_results(stored: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Add the results of further clients to those of a run.

    >>> add_results({"personal": {"test": {"loss": {"ann": 0.5}}}}, {"personal": {"test": {"loss": {"bob": 0.4}}}})
    {'personal': {'test': {'loss': {'ann': 0.5, 'bob': 0.4}}}}
    """
    joined = dict(stored)
    for name, value in more.items():
        before = joined.get(name)
        joined[name] = add_results(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return joined


def _list_named(numbers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    shown = list(numbers.items())[:MOST_NUMBERS]
    return ((name, value) for name, value in shown if _is_name(name) and _is_float32(value))


def _is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and name not in RESERVED


def _is_float32(value: Any) -> bool:
    """Tell whether a float could have been computed in float32, as all are; squares of what is larger overflow."""
    return not isinstance(value, float) or not LARGEST_FLOAT < abs(value) < math.inf


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST
