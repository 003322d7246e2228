"""Collectives of a compiled program, read from its text (XLA's HLO): between which devices, how often, how many bytes.

The text names a loop's body once, however often it runs. The number of turns is `known_trip_count` where the compiler
wrote it (a TPU's does not), else the one integer in the loop's condition: jax's scans count from 0 to it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
BITS = {"pred": 8, "bf16": 16}
"""Element types whose name does not end in their width."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)(.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(body|calls|to_apply|condition|\w+_computations?)=(\{[^}]*\}|[^,]+)")
_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class Collective:
    """All collectives of a round of one kind between the same devices.

    Attributes:
        kind: as HLO names it.
        axes: of the mesh, along which the devices of a group differ.
        devices_per_group: devices that take part together.
        runs_per_round: how often such a collective happens.
        bytes_per_round: of all a device's results, or of what it hands in where that is more, without padding.
    """

    kind: str
    axes: tuple[str, ...]
    devices_per_group: int
    runs_per_round: int
    bytes_per_round: int


class Line(NamedTuple):
    """An instruction: its name, result's type, operation, operands and what follows them."""

    name: str
    result: str
    op: str
    operands: str
    rest: str

    @property
    def called(self) -> dict[str, list[str]]:
        """Role -> computations."""
        return {role: _NAME.findall(names) for role, names in _CALLED.findall(self.rest)}


Computations = Mapping[str, Mapping[str, Line]]


def read_program(text: str) -> tuple[str, Computations]:
    """Split a program's text; returns the first computation's name, and name -> lines of all."""
    computations: dict[str, dict[str, Line]] = {}
    entry, lines = "", dict[str, Line]()
    for row in text.splitlines():
        if header := _HEADER.match(row):
            lines = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(row):
            lines[found[1]] = Line(*found.groups())
    return entry, computations


def find_collectives(text: str, mesh: Mesh) -> tuple[tuple[Collective, ...], int]:
    """Find all collectives that a program runs; the two halves of an asynchronous one are one.

    Args:
        text: of the compiled program.
        mesh: its devices, numbered as they lie in it.

    Returns:
        The collectives, and the number of loops whose turns the text does not give: their bodies count once.
    """
    entry, computations = read_program(text)
    runs, unknown, sizes = Counter[str](), set[str](), dict[tuple[str, tuple[str, ...], int], list[int]]()
    _count_runs(entry, 1, computations, runs, unknown)
    for name, lines in computations.items():
        for line in lines.values() if runs[name] else ():
            kind = line.op.removesuffix("-start")
            groups = read_groups(line.rest, mesh.devices.size) if kind in KINDS else [[0]]
            if (devices := max(map(len, groups))) > 1:
                found = sizes.setdefault((kind, _find_axes(groups, mesh), devices), [])
                found += [_count_bytes(line, lines)] * runs[name]
    return tuple(Collective(*key, len(found), sum(found)) for key, found in sorted(sizes.items())), len(unknown)


def _count_runs(name: str, times: int, computations: Computations, runs: Counter[str], unknown: set[str]) -> None:
    """Add how often a computation and all that it calls run."""
    runs[name] += times
    for line in computations[name].values():
        turns = _count_turns(line, computations) if line.op == "while" else 1
        if turns is None:
            unknown.add(line.name)
        for role, called in line.called.items():
            if role != "condition" and not line.op.endswith(("-done", "-update")):  # the start of these has called
                for inner in called:
                    _count_runs(inner, times * (1 if turns is None else turns), computations, runs, unknown)


def _count_turns(loop: Line, computations: Computations) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    (condition,) = loop.called["condition"]
    lines = computations[condition].values()
    bounds = {int(line.operands) for line in lines if line.op == "constant" and line.operands.isdecimal()}
    return bounds.pop() if len(bounds) == 1 else None


def _count_bytes(line: Line, lines: Mapping[str, Line]) -> int:
    """Bytes of the results, or of the operands where that is more."""
    operands = [lines[name].result for name in _NAME.findall(line.operands) if name in lines]
    given, made = str(operands), line.result
    starts = line.op.endswith("-start") and not line.op.startswith("all-reduce")  # it returns operands and counters too
    sizes = [sum(_count_bits(*array) for array in _ARRAY.findall(part)) for part in (given, made.replace("u32[]", ""))]
    return math.ceil(max(sizes[0], sizes[1] - starts * sizes[0]) / 8)


def _count_bits(element: str, lengths: str) -> int:
    width = re.match(r"[a-z]+?(\d+)", element)
    bits = BITS.get(element, int(width[1]) if width else 0)
    return bits * math.prod(int(length.lstrip("<=")) for length in lengths.split(",") if length)


def _find_axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    places = [np.asarray(np.unravel_index(group, mesh.devices.shape)) for group in groups]
    return tuple(
        str(name) for axis, name in enumerate(mesh.axis_names) if any(len(set(place[axis])) > 1 for place in places)
    )


def read_groups(text: str, devices: int) -> list[list[int]]:
    """Read the groups of device numbers from any of the ways in which HLO writes them.

    Args:
        text: what follows a collective's operands.
        devices: how many there are; all of them are one group where none is written.

    Raises:
        ValueError: they are written in a way that is not known here.

    >>> read_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    [[0, 2], [1, 3]]
    """
    if pairs := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", pairs[1])]
        return groups or [list(range(devices))]
    if flat := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _read_order(flat[2]).reshape(json.loads(flat[1])).tolist()
    if axes := re.search(r"replica_groups=mesh\[(\S+?)\](?:, device_ids=\((\S+)\))? \{('\w+'(?:,'\w+')*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", axes[1])}
        order = _read_order(axes[2]) if axes[2] else np.arange(devices)
        inside = [list(sizes).index(name) for name in axes[3].split(",")]
        moved = np.moveaxis(order.reshape(list(sizes.values())), inside, range(-len(inside), 0))
        return moved.reshape(-1, int(np.prod(moved.shape[-len(inside) :]))).tolist()
    if "replica_groups" not in text:
        return [list(range(devices))]
    raise ValueError(f"unknown way to write groups: {text[:200]}")


def _read_order(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: numbers 0, 1, … laid out so and transposed so."""
    shape, _, axes = text.partition("T")
    order = np.arange(math.prod(json.loads(shape))).reshape(json.loads(shape))
    return order.transpose(json.loads(axes.replace("(", "[").replace(")", "]"))) if axes else order
