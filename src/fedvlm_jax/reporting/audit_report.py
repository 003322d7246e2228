"""The audit of a run as tables and sentences: what attacks on its messages found, and what that does not show."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.metric_labels import percent
from fedvlm_jax.reporting.tables import Table
from fedvlm_jax.run_dir.validated_files import Form, check_form, read_json

NAME = "audit.json"
BASE = "base"
TESTS: dict[str, str] = {
    "loss": "loss",
    "projection": "projection",
    "span": "span of inputs",
    BASE: "bare base (control)",
}
"""Tests, as tables call them."""
KNOWN: dict[str, str] = {"": "no message", "start": "the start", "others": "others' mean", "own": "the client's own"}
"""What an attacker takes for the private factor."""

_SCORES: Form = {"auroc": list[float], "tpr": list[float], "members": int, "others": int}
_TESTED: Form = {**_SCORES, "test": str, "knows": str, "curve": list[list[float]], "clients": {"*": _SCORES}}
_RANKED: Form = {"test": str, "knows": str, "top": list[float], "chance": float, "rankings": int}
_SPANNED: Form = {
    "knows": str,
    **dict.fromkeys(("batch", "unrelated", "random", "dimension"), float),
    "above_unrelated": int,
    "spans": int,
}
AUDIT: Form = {
    "method": str,
    "shares": str,
    "others": str,
    "private_a": str,
    "rounds": list[int],
    "clients": list[str],
    "membership": [_TESTED],
    "attribution": [_RANKED],
    "reconstruction": [_SPANNED],
    "epsilon": dict[str, float | int | str | None] | None,
}
EPSILON: Form = {
    "lower": float | None,
    "accounted": float | None,
    "delta": float,
    "why?": str,
    "correct?": int,
    "guesses?": int,
    "canaries?": int,
}


def read_audit(folder: Path) -> dict[str, Any] | None:
    """Read a run's audit; None where it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    found = read_json(path, AUDIT)
    if found["epsilon"] is not None:
        check_form(path, found["epsilon"], EPSILON, before="epsilon.")
    for entry in found["membership"]:
        for one in (entry, *entry["clients"].values()):
            _check_shares(path, one["auroc"], one["tpr"])
        _check_shares(path, *([*point, 0.0] for point in entry["curve"]))
    _check_shares(path, *(entry["top"] for entry in found["attribution"]))
    return found


def _check_shares(path: Path, *shares: Sequence[float]) -> None:
    for share in shares:
        check_form(path, {"shares": share}, {"shares": list[float]})
        if len(share) != 3 or not all(0 <= value <= 1 for value in share):
            check_form(path, {"shares": None}, {"shares": list[float]})  # for its message


def tabulate_audit(found: Mapping[str, Any]) -> list[Table]:
    """Tabulate an audit: membership over all clients and by client, attribution, reconstruction, ε."""
    tables = [
        _tabulate_membership(found),
        _tabulate_attribution(found),
        _tabulate_reconstruction(found),
        _tabulate_epsilon(found["epsilon"]),
        _tabulate_clients(found),
    ]
    return [table for table in tables if table is not None and table.rows]


def _tabulate_membership(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (_name_test(one["test"]), _name_known(found, one["knows"]), _area(one["auroc"]), _share(one["tpr"]))
        for one in found["membership"]
    )
    first = found["membership"][0] if found["membership"] else {"members": 0, "others": 0}
    note = (
        f"{first['members']} rows that were trained on against {first['others']} of the {found['others']} split, "
        f"{format_count(len(found['clients']), 'client')}, {format_count(len(found['rounds']), 'round')}; AUROC 0.5 is "
        "chance. In brackets: 95 %."
    )
    return Table(
        f"Was a row trained on? {found['method']}, {found['shares']} shared",
        ("test", "private factor", "AUROC", "TPR at 1 % FPR"),
        rows,
        note=note,
    )


def _tabulate_attribution(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            _name_test(one["test"]),
            _name_known(found, one["knows"]),
            _share(one["top"]),
            percent(one["chance"]),
            str(one["rankings"]),
        )
        for one in found["attribution"]
    )
    note = "How often the row that stands first was in the batch of that client and round, among rows that were not."
    return Table(
        "Which row was in the batch?", ("by", "private factor", "first is", "by chance", "rankings"), rows, note=note
    )


def _tabulate_reconstruction(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            _name_known(found, one["knows"]),
            f"{one['dimension']:.1f}",
            percent(one["batch"]),
            percent(one["unrelated"]),
            percent(one["random"]),
            f"{one['above_unrelated']} of {one['spans']}",
        )
        for one in found["reconstruction"]
    )
    note = (
        "Share of layer inputs' energy in the span of what a message tells of a layer's inputs: of the batch, of other "
        "rows of the client, and in a random span of that dimension; in how many messages the batch had more."
    )
    return Table(
        "Layer inputs in the update's span",
        ("private factor", "dimension", "batch", "unrelated", "random", "batch above"),
        rows,
        note=note,
    )


def _tabulate_epsilon(epsilon: Mapping[str, Any] | None) -> Table | None:
    if epsilon is None:
        return None
    accounted = "–" if epsilon["accounted"] is None else f"{epsilon['accounted']:.3g}"
    lower = "–" if epsilon["lower"] is None else f"{epsilon['lower']:.3g}"
    guesses = f"{epsilon.get('correct', 0)} of {epsilon.get('guesses', 0)}"
    row = (lower, accounted, f"{epsilon['delta']:g}", guesses, str(epsilon.get("canaries", 0)))
    note = epsilon.get("why") or (
        "The mechanism replayed with canaries for clients, each in or out by a coin: a bound above the accounted ε "
        "means that one of them is wrong; below, it says nothing of how far the truth is."
    )
    columns = ("ε at least (95 %)", "ε accounted", "δ", "right guesses", "canaries")
    return Table("ε from canaries", columns, (row,), note=str(note))


def _tabulate_clients(found: Mapping[str, Any]) -> Table | None:
    tested = [one for one in found["membership"] if one["test"] != BASE]
    if not tested:
        return None
    best = max(tested, key=lambda one: one["auroc"][0])
    rows = tuple(
        (name, _area(one["auroc"]), _share(one["tpr"]), str(one["members"]), str(one["others"]))
        for name, one in sorted(best["clients"].items(), key=lambda item: -item[1]["auroc"][0])
    )
    title = f"By client: {_name_test(best['test'])}, {_name_known(found, best['knows'])}"
    return Table(title, ("client", "AUROC", "TPR at 1 % FPR", "members", "others"), rows)


def _name_test(test: str) -> str:
    return TESTS.get(test, test)


def _name_known(found: Mapping[str, Any], knows: str) -> str:
    """Name what an attacker takes for the private factor; where there is none to guess, all is known."""
    alone = not any(one["knows"] in ("others", "own") for one in found["membership"])
    if alone and knows == "start":
        return "none to guess"
    return KNOWN.get(knows, knows)


def _area(share: Sequence[float]) -> str:
    value, low, high = share
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _share(share: Sequence[float]) -> str:
    value, low, high = (100 * part for part in share)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def describe_audit(found: Mapping[str, Any]) -> list[str]:
    """Say what an audit shows, and what it does not."""
    tested = [one for one in found["membership"] if one["test"] != BASE]
    if not tested:
        return ["No client had rows of both kinds, so nothing could be attacked."]
    server = [one for one in tested if one["knows"] == "start"]
    best = max(server, key=lambda one: one["auroc"][0])
    sentences = [
        f"What left the clients was attacked as the server can: {found['shares']} shared by {found['method']}. Its "
        f"best test of membership ({_name_test(best['test'])}) has an AUROC of {_area(best['auroc'])} and finds "
        f"{_share(best['tpr'])} of the members where 1 % of the others pass."
    ]
    wider = max(tested, key=lambda one: one["auroc"][0])
    if wider["knows"] != "start":
        whose = "the private factor" if wider["knows"] == "own" else "the mean of the others' private factors"
        sentences.append(f"Who knows {whose} has up to {_area(wider['auroc'])} ({_name_test(wider['test'])}).")
    control = next((one for one in found["membership"] if one["test"] == BASE), None)
    if control is not None:
        apart = control["auroc"][1] > 0.5 or control["auroc"][2] < 0.5
        sentences.append(
            f"Without any message the bare base's loss has {_area(control['auroc'])}: "
            + (
                "members and others are not alike to begin with, so the AUROC of a test is to be held against that."
                if apart
                else "members and others are alike to begin with."
            )
        )
    if found["epsilon"] is not None:
        sentences.append(
            "These messages are as they left the clients, before the server clipped them and added noise: they are "
            "what the server sees. ε bounds what can be told from what it releases."
        )
    sentences.append(
        "Attacks are lower bounds: that these find little does not say that others would not find more, and an audit "
        "proves no privacy. Intervals are over rows; they know nothing of other seeds, rounds or data."
    )
    return sentences
