"""A profiler's trace by the parts of the model: which part asked for an operation, and how much time each part took.

An operation of a compiled program still knows where it comes from: the path of `jax.named_scope`s and linen modules
that its line of the program's text carries as `op_name`. On a CPU the trace does not tell it, so it is put there.

A part's time is that of its operations without what runs inside them, summed over threads. Loops are left out: what
their bodies do is counted with the bodies.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Trace = dict[str, Any]
"""A trace in Chrome's format, which Perfetto reads: `traceEvents`, with times in microseconds."""

REST = "(other)"
FRAMES = frozenset({"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "layers"})
"""Parts of a path that say how something is computed, and not what; all layers of a stack are one."""

NOISE = ("ThreadpoolListener", "end: ")
LOOPS = ("while", "conditional")
SHOWN = 24
"""Rows of a table."""


class Shares(NamedTuple):
    """Where the time of a traced round went.

    Attributes:
        seconds: of the round, as the host saw it.
        inside: of them, from the first operation of the programs to the last.
        parts: part -> seconds of its forward and its backward operations, summed over threads.
    """

    seconds: float
    inside: float
    parts: Mapping[str, tuple[float, float]]


def find_scopes(text: str) -> dict[str, str]:
    """operation -> the path of who asked for it, out of a compiled program's text."""
    line = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]+)"', re.MULTILINE)
    return dict(line.findall(text))


def name_part(path: str) -> tuple[str, bool]:
    """Of a path what a reader wants: the part's name, and whether this is its backward pass."""
    *frames, _ = path.split("/")  # the last is the operation itself
    named = [_strip(frame) for frame in frames]
    kept = [name for name in named if name and name not in FRAMES and "." not in name]  # a.b: method b of module a
    return "/".join(kept) or REST, any(frame.startswith("transpose(") for frame in frames)


def _strip(frame: str) -> str:
    """`transpose(jvp(decoder))` -> `decoder`; nothing is left of a function that was traced apart."""
    if "jit(" in frame:
        return ""
    return re.sub(r"^(?:\w+\()+|\)+$", "", frame) if "(" in frame else frame


def read_trace(file: Path) -> Trace:
    """A profiler's `*.trace.json.gz`."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return json.load(opened)


def write_trace(file: Path, trace: Trace) -> None:
    """Write what `ui.perfetto.dev` opens."""
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        json.dump(trace, opened)


def label_trace(trace: Trace, scopes: Mapping[str, str]) -> Trace:
    """The trace with every operation named by its part, as `part · operation`, and without what says nothing."""
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            _label(event, scopes) for event in trace["traceEvents"] if event and not event["name"].startswith(NOISE)
        ],
    }


def _label(event: Mapping[str, Any], scopes: Mapping[str, str]) -> dict[str, Any]:
    operation = event.get("args", {}).get("hlo_op")
    if operation is None:
        return dict(event)
    path = scopes.get(operation, "")
    part, backward = name_part(path)
    args = {**event["args"], "part": part, "pass": "backward" if backward else "forward", "scope": path}
    return {**event, "name": f"{part}{' (backward)' if backward else ''} · {operation}", "args": args}


def share_out_time(trace: Trace) -> Shares:
    """Where the time of a labelled trace went."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    rounds = [event["dur"] for event in events if event["name"] == "round"]
    operations = [event for event in events if "part" in event.get("args", {})]
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, own in find_own_times(operations):
        if not event["args"]["hlo_op"].startswith(LOOPS):
            parts[event["args"]["part"]][event["args"]["pass"] == "backward"] += own / 1e6
    ends = [event["ts"] + event["dur"] for event in operations]
    inside = max(ends) - min(event["ts"] for event in operations) if operations else 0.0
    return Shares(sum(rounds) / 1e6, inside / 1e6, {part: (there, back) for part, (there, back) in parts.items()})


def find_own_times(events: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Every event of a trace with its own time in microseconds, less that of the events inside it on its thread."""
    own: list[list[Any]] = []
    open_: dict[Any, list[tuple[float, list[Any]]]] = defaultdict(list)  # thread -> (end, entry) of who is under way
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = open_[event.get("pid"), event.get("tid")]
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1][1][1] -= event["dur"]
        entry = [event, event["dur"]]
        own.append(entry)
        stack.append((event["ts"] + event["dur"], entry))
    return [(event, max(seconds, 0.0)) for event, seconds in own]


def tabulate_shares(round_: int, shares: Shares) -> str:
    """Markdown: a row per part, the largest first."""
    total = sum(there + back for there, back in shares.parts.values())
    host = 1 - shares.inside / shares.seconds if shares.seconds else 0.0
    lines = [
        f"# Round {round_}",
        "",
        f"{shares.seconds:.3f} s while it was traced, {host:.1%} of it before the first operation of a compiled "
        "program and after the last.",
        "",
        "| part | forward | backward | of all operations |",
        "| --- | ---: | ---: | ---: |",
    ]
    ranked = sorted(shares.parts.items(), key=lambda one: -sum(one[1]))
    for part, (there, back) in ranked[:SHOWN]:
        lines.append(f"| {part} | {1e3 * there:.1f} ms | {1e3 * back:.1f} ms | {(there + back) / total:.1%} |")
    if left := ranked[SHOWN:]:
        there, back = (sum(one[1][place] for one in left) for place in (0, 1))
        lines.append(
            f"| {len(left)} more | {1e3 * there:.1f} ms | {1e3 * back:.1f} ms | {(there + back) / total:.1%} |"
        )
    if not ranked:
        lines.append("| the profiler named no operation | – | – | – |")
    return "\n".join(lines) + "\n"
