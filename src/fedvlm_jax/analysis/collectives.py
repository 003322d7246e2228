"""Collectives of a compiled program, read from its text (XLA's HLO): between which devices, how often, how many bytes.

The text names a loop's body once, however often it runs. The number of turns is `known_trip_count` where the compiler
wrote it (a TPU's does not), else the one integer in the loop's condition: jax's scans count from 0 to it.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)(.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\]")  # f32[16], s8[], f8e4m3[2,2]: an element's width is in its name
_CALLED = re.compile(r"\b(body|calls|to_apply|condition|\w+_computations?)=(\{[^}]*\}|[^,]+)")
_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class Collective:
    """All collectives of a round of one kind between the same devices."""

    kind: str  # as HLO names it
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
    devices_per_group: int
    runs_per_round: int
    bytes_per_round: int  # of all a device's results, or of its operands where that is more, without padding


class Line(NamedTuple):
    """An instruction: its name, result's type, operation, operands and what follows them."""

    name: str
    result: str
    op: str
    operands: str
    rest: str

    @property
    def called(self) -> dict[str, list[str]]:
        """Role -> computations.

        >>> Line("loop", "s32[]", "while", "%start", ", condition=%until, body=%turn").called
        {'condition': ['until'], 'body': ['turn']}
        """
        return {role: _NAME.findall(names) for role, names in _CALLED.findall(self.rest)}


def read_program(text: str) -> tuple[str, dict[str, dict[str, Line]]]:
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
    """Find a program's collectives on a mesh, asynchronous halves as one, and count the loops of unknown turns."""
    entry, computations = read_program(text)
    found = defaultdict[tuple[str, tuple[str, ...], int], list[int]](list)  # bytes of every run
    unknown: set[str] = set()

    def enter(name: str, times: int) -> None:
        lines = computations[name]
        for line in lines.values():
            kind = line.op.removesuffix("-start")
            groups = read_groups(line.rest, mesh.devices.size) if kind in KINDS else [[0]]
            devices = max(map(len, groups))
            if devices > 1:
                places = [np.unravel_index(group, mesh.devices.shape) for group in groups]
                differ = [any(len(set(place[axis])) > 1 for place in places) for axis in range(mesh.devices.ndim)]
                axes = tuple(str(name) for name, differs in zip(mesh.axis_names, differ, strict=True) if differs)
                found[kind, axes, devices] += [_count_bytes(line, lines)] * times
            turns = _count_turns(line, computations) if line.op == "while" else 1
            if turns is None:
                unknown.add(line.name)
            if line.op.endswith(("-done", "-update")):  # what started it has called already
                continue
            for role, called in line.called.items():
                for inner in called if role != "condition" else ():
                    enter(inner, times * (1 if turns is None else turns))

    enter(entry, 1)
    return tuple(Collective(*key, len(sizes), sum(sizes)) for key, sizes in sorted(found.items())), len(unknown)


def _count_turns(loop: Line, computations: Mapping[str, Mapping[str, Line]]) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    (condition,) = loop.called["condition"]
    lines = computations[condition].values()
    bounds = {int(line.operands) for line in lines if line.op == "constant" and line.operands.isdecimal()}
    return bounds.pop() if len(bounds) == 1 else None


def _count_bytes(line: Line, lines: Mapping[str, Line]) -> int:
    """Count the bytes of the results, or of the operands where that is more."""
    given = _count_bits(" ".join(lines[name].result for name in _NAME.findall(line.operands) if name in lines))
    made = _count_bits(line.result.replace("u32[]", ""))
    if line.op.endswith("-start") and not line.op.startswith("all-reduce"):
        made -= given  # its result holds the operands, too, and counters
    return math.ceil(max(given, made) / 8)


def _count_bits(types: str) -> int:
    bits = 0
    for element, width, lengths in _ARRAY.findall(types):
        size = 8 if element == "pred" else int(width or 0)
        bits += size * math.prod(int(length.lstrip("<=")) for length in lengths.split(",") if length)
    return bits


def read_groups(text: str, devices: int) -> list[list[int]]:
    """Read the groups of device numbers from any of the ways in which HLO writes them; unwritten, all are one group.

    Raises:
        ValueError: they are written in a way that is not known here.

    >>> read_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    [[0, 2], [1, 3]]
    """
    everything = [list(range(devices))]
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=(\{(?:\{[\d,]*\},?)*\})", text):
        groups = json.loads(listed[1].replace("{", "[").replace("}", "]"))
        return [group for group in groups if group] or everything
    if flat := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _read_order(flat[2]).reshape(json.loads(flat[1])).tolist()
    if axes := re.search(r"replica_groups=mesh\[(\S+?)\](?:, device_ids=\((\S+)\))? \{('\w+'(?:,'\w+')*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", axes[1])}
        order = _read_order(axes[2]) if axes[2] else np.arange(devices)
        inside = [list(sizes).index(name) for name in axes[3].split(",")]
        moved = np.moveaxis(order.reshape(list(sizes.values())), inside, range(-len(inside), 0))
        return moved.reshape(-1, math.prod(moved.shape[-len(inside) :])).tolist()
    if "replica_groups" not in text:
        return everything
    raise ValueError(f"unknown way to write groups: {text[:200]}")


def _read_order(text: str) -> np.ndarray:
    """Read `[4,2]T(1,0)`: numbers 0, 1, … laid out so and transposed so."""
    shape, _, axes = text.partition("T")
    order = np.arange(math.prod(json.loads(shape))).reshape(json.loads(shape))
    return order.transpose(json.loads(axes.replace("(", "[").replace(")", "]"))) if axes else order
