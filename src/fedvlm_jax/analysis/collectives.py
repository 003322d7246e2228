"""What devices tell one another in a compiled program: its collectives, between whom, how often, how many bytes."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fedvlm_jax.analysis.hlo import Array, Instruction, Program

__all__ = ["KINDS", "Collective", "find_collectives", "read_groups"]

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: as HLO names it.
        axes: of the mesh, along which its devices differ; empty where each talks to itself alone.
        devices: in a group.
        bytes: of a device's result, or of what it hands in where that is more (a reduce-scatter): the arrays without
            padding, once.
        runs: how often it happens in a round.
        name: in the program.
        arrays: what is told, as HLO writes it.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    bytes: int
    runs: int
    name: str
    arrays: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends for all its runs, if a ring carries them."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return factor.get(self.kind, share) * self.bytes * self.runs

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {
            "kind": self.kind,
            "axes": list(self.axes),
            "devices_per_group": self.devices,
            "bytes": self.bytes,
            "runs_per_round": self.runs,
            "name": self.name,
            "arrays": self.arrays,
        }


def find_collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """All collectives that a program runs, those in fusions included; the two halves of an asynchronous one are one."""
    found: list[Collective] = []
    for name, computation in program.computations.items():
        runs = program.runs[name]
        for instruction in computation.instructions.values() if runs else ():
            kind = instruction.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            groups = read_groups(instruction.text, mesh.devices.size)
            devices = max(len(group) for group in groups)
            if devices < 2:
                continue
            handed = [computation.instructions.get(operand) for operand in instruction.operands]
            given = [array for one in handed if one is not None for array in one.result]
            told = _choose_told(instruction, kind, given)
            size = max(sum(array.bytes for array in told), sum(array.bytes for array in given))
            arrays = " ".join(f"{array.kind}[{','.join(map(str, array.shape))}]" for array in told)
            found.append(Collective(kind, _find_axes(groups, mesh), devices, size, runs, instruction.name, arrays))
    return found


def _choose_told(instruction: Instruction, kind: str, given: list[Array]) -> tuple[Array, ...]:
    """A collective's results: what starts an asynchronous one also returns its operands, first, and two counters."""
    result = instruction.result
    if instruction.op.endswith("-start") and kind != "all-reduce":
        return result[len(given) : 2 * len(given)] or result
    return result


def _find_axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh's axes along which some group's members differ; devices are numbered as they lie in the mesh."""
    places = [np.asarray(np.unravel_index(group, mesh.devices.shape)) for group in groups]
    differ = [any(len(set(place[axis].tolist())) > 1 for place in places) for axis in range(mesh.devices.ndim)]
    return tuple(str(name) for name, held in zip(mesh.axis_names, differ, strict=True) if held)


def read_groups(text: str, devices: int) -> list[list[int]]:
    """Who talks to whom: groups of device numbers, from any of the ways in which HLO writes them.

    Args:
        text: what follows a collective's operands.
        devices: how many there are; all of them are one group where none is written.

    Raises:
        ValueError: they are written in a way that is not known here.
    """
    if pairs := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", pairs[1])]
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
    lengths = json.loads(shape)
    order = np.arange(np.prod(lengths)).reshape(lengths)
    return order.transpose(json.loads(axes.replace("(", "[").replace(")", "]"))) if axes else order
