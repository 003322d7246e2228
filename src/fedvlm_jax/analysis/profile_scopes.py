"""A profiler's trace by the parts of the model: which part asked for an operation, and how much time each part took.

An operation of a compiled program still knows where it comes from: the path of `jax.named_scope`s and linen modules
that its line of the program's text carries as `op_name`. On a CPU the trace does not have it, so it is put in.

A part's time is the self time of its operations (less what runs inside them), summed over threads. Loops are left out:
what their bodies do is counted with the bodies.
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

SHOWN = 24
"""Rows of a table."""


class Shares(NamedTuple):
    """Time of a traced round, by part."""

    seconds: float  # of the round, as the host saw it
    inside: float  # of them, from the first operation of the programs to the last
    parts: Mapping[str, tuple[float, float]]  # part -> seconds of its forward and its backward operations


def find_scopes(text: str) -> dict[str, str]:
    """Return operation -> the path of what asked for it, out of a compiled program's text.

    >>> find_scopes('  ROOT %tanh.2 = f32[2]{0} tanh(%x), metadata={op_name="jit(run)/decoder/fc1/tanh"}')
    {'tanh.2': 'jit(run)/decoder/fc1/tanh'}
    """
    line = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]+)"', re.MULTILINE)
    return dict(line.findall(text))


def name_part(path: str) -> tuple[str, bool]:
    """Name the part of the model in an operation's path, and say whether this is its backward pass.

    >>> name_part("jit(run)/transpose(jvp(decoder))/layers/fc1/tanh")
    ('decoder/fc1', True)
    """
    *frames, _ = path.split("/")  # the last is the operation itself
    # transpose(jvp(decoder)) -> decoder; nothing is left of jit(f), a function that was traced apart.
    names = [re.sub(r"^(?:\w+\()+|\)+$", "", frame) for frame in frames if "jit(" not in frame]
    kept = [name for name in names if name and name not in FRAMES and "." not in name]  # a.b: method b of module a
    return "/".join(kept) or REST, any(frame.startswith("transpose(") for frame in frames)


def read_trace(file: Path) -> Trace:
    """Read a profiler's `*.trace.json.gz`."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return json.load(opened)


def label_trace(trace: Trace, scopes: Mapping[str, str]) -> Trace:
    """Name every operation of a trace by its part, as `part · operation`, and leave out what says nothing."""
    events: list[dict[str, Any]] = []
    for event in trace["traceEvents"]:
        if not event or event["name"].startswith(("ThreadpoolListener", "end: ")):
            continue
        operation = event.get("args", {}).get("hlo_op")
        if operation is not None:
            path = scopes.get(operation, "")
            part, backward = name_part(path)
            args = {**event["args"], "part": part, "pass": "backward" if backward else "forward", "scope": path}
            event = {**event, "name": f"{part}{' (backward)' if backward else ''} · {operation}", "args": args}
        events.append(event)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def share_out_time(trace: Trace) -> Shares:
    """Share out the time of a labelled trace."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    seconds = sum(event["dur"] for event in events if event["name"] == "round") / 1e6
    operations = [event for event in events if "part" in event.get("args", {})]
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, self_time in find_self_times(operations):
        if not event["args"]["hlo_op"].startswith(("while", "conditional")):
            parts[event["args"]["part"]][event["args"]["pass"] == "backward"] += self_time / 1e6
    ends = [event["ts"] + event["dur"] for event in operations]
    inside = max(ends) - min(event["ts"] for event in operations) if operations else 0.0
    return Shares(seconds, inside / 1e6, {part: (times[0], times[1]) for part, times in parts.items()})


def find_self_times(events: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Find every event's self time in microseconds: its time less that of the events inside it on its thread."""
    times: list[float] = []
    open_: dict[Any, list[tuple[float, int]]] = defaultdict(list)  # thread -> ends and places of events under way
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    for place, event in enumerate(ordered):
        stack = open_[event.get("pid"), event.get("tid")]
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            times[stack[-1][1]] -= event["dur"]
        times.append(event["dur"])
        stack.append((event["ts"] + event["dur"], place))
    return [(event, max(time, 0.0)) for event, time in zip(ordered, times, strict=True)]


def tabulate_shares(round_: int, shares: Shares) -> str:
    """Write a table in Markdown: a row per part, the largest first."""
    total = sum(map(sum, shares.parts.values()))
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
    ranked = sorted(shares.parts.items(), key=lambda item: -sum(item[1]))
    rows = ranked[:SHOWN]
    if left := [times for _, times in ranked[SHOWN:]]:
        rows.append((f"{len(left)} more", (sum(forward for forward, _ in left), sum(backward for _, backward in left))))
    for part, (forward, backward) in rows:
        share = (forward + backward) / total
        lines.append(f"| {part} | {1e3 * forward:.1f} ms | {1e3 * backward:.1f} ms | {share:.1%} |")
    if not rows:
        lines.append("| the profiler named no operation | – | – | – |")
    return "\n".join(lines) + "\n"
