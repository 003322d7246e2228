"""Reads the text of a compiled program (XLA's HLO): its computations, their instructions, and how often each runs.

The text names a loop's body once, however often it runs, and so do the compiler's own sums (`cost_analysis`). Here the
number of turns is read from the loop: from `known_trip_count` where the compiler wrote it, else from the comparison
that ends it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

__all__ = ["Array", "Computation", "Instruction", "Program", "parse_program"]

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
"""Of the element types whose name does not end in their width; what is left is read off the name."""

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """An array as the text writes it.

    Attributes:
        kind: of its elements, as HLO names them.
        shape: lengths.
        space: memory space of its layout; 0 is the device's main memory.
    """

    kind: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = BITS.get(self.kind)
        if bits is None:
            width = re.match(r"[a-z]+?(\d+)", self.kind)
            bits = int(width[1]) if width else 0
        return math.ceil(math.prod(self.shape) * bits / 8)


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        name: without the percent sign.
        op: what it does, `all-reduce` say.
        result: its arrays; several for a tuple.
        operands: names of what it reads.
        text: all that follows the operands.
        literal: what stands between its brackets, for constants and parameters.
        root: is it what the computation returns?
    """

    name: str
    op: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    literal: str
    root: bool

    @property
    def called(self) -> tuple[tuple[str, str], ...]:
        """(role, computation) of all computations that it runs."""
        branches = _BRANCHES.search(self.text)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return (*_CALLED.findall(self.text), *(("branch", name) for name in names))


@dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(one for one in self.instructions.values() if one.root)


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the first.
        runs: how often each runs in one execution of the program; 0 for those that nothing calls.
        unknown: loops whose number of turns could not be read; their bodies count once.
    """

    computations: Mapping[str, Computation]
    entry: str
    runs: Mapping[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def parse_program(text: str) -> Program:
    """Read what `compiled.as_text()` returns."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", dict[str, Instruction]()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, lines = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name], name = Computation(name, lines), ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _read_instruction(found[2], found[3], bool(found[1]))
            lines[instruction.name] = instruction
    return _count_runs(computations, entry)


def _read_instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _find_end(rest) if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    op, _, rest = rest.partition("(")
    end = _find_end("(" + rest) - 1
    inside, text = rest[: end - 1], rest[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, op, read_arrays(result), operands, text, inside, root)


def _find_end(text: str) -> int:
    """Behind the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return place + 1
    return len(text)


def read_arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`, in their order."""
    found: list[Array] = []
    for kind, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        lengths = tuple(int(length.lstrip("<=")) for length in dims.split(",")) if dims else ()
        found.append(Array(kind, lengths, int(space[1]) if space else 0))
    return tuple(found)


def _count_runs(computations: Mapping[str, Computation], entry: str) -> Program:
    """Runs of every computation: those of its callers, times a loop's turns."""
    order: list[str] = []  # a computation stands before what it calls
    _visit(entry, computations, order, set())
    runs, unknown = dict.fromkeys(computations, 0), list[str]()
    runs[entry] = 1
    for name in reversed(order):
        computation = computations[name]
        for instruction in computation.instructions.values():
            if instruction.op.endswith(("-done", "-update")):
                continue  # the start of it has called already
            turns = 1
            if instruction.op == "while":
                counted = count_turns(instruction, computation, computations)
                turns = 1 if counted is None else counted
                unknown += [instruction.name] if counted is None else []
            for role, called in instruction.called:
                runs[called] += runs[name] * (turns + 1 if role == "condition" else turns)
    return Program(computations, entry, runs, tuple(unknown))


def _visit(name: str, computations: Mapping[str, Computation], order: list[str], seen: set[str]) -> None:
    seen.add(name)
    for instruction in computations[name].instructions.values():
        for _, called in instruction.called:
            if called not in seen:
                _visit(called, computations, order, seen)
    order.append(name)


def count_turns(loop: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a loop's body runs; None where its text does not tell.

    Args:
        loop: a `while`.
        inside: the computation that it stands in.
        computations: of the program.
    """
    if known := _KNOWN.search(loop.text):
        return int(known[1])
    roles = dict(loop.called)
    condition, body = computations[roles["condition"]], computations[roles["body"]]
    found = _find_comparison(condition, computations)
    start = inside.instructions.get(loop.operands[0])
    if found is None or start is None or start.op != "tuple" or body.root.op != "tuple":
        return None
    counter, bound, direction = found
    place = _read_place(counter)
    first = None if place is None else _read_constant(start.operands[place], inside)
    last = _read_constant(bound.name, condition)
    if last is None and (other := _read_place(bound)) is not None:
        last = _read_constant(start.operands[other], inside)
    step = None if place is None else _read_step(body, place)
    if first is None or last is None or not step:
        return None
    gap = last - first + {"LT": 0, "LE": 1, "GT": 0, "GE": -1}.get(direction, 0)
    return max(0, math.ceil(gap / step)) if direction in ("LT", "LE", "GT", "GE", "NE") else None


def _find_comparison(
    condition: Computation, computations: Mapping[str, Computation]
) -> tuple[Instruction, Instruction, str] | None:
    """What a loop's condition compares: the counter, its bound, and how."""
    root = condition.root
    operands: Sequence[str] = root.operands
    compare = root
    if root.op == "fusion":
        inner = computations[dict(root.called)["calls"]]
        compare = inner.root
        places = [inner.instructions[name] for name in compare.operands if name in inner.instructions]
        if len(places) != 2 or any(one.op != "parameter" for one in places):
            return None
        operands = [root.operands[int(one.literal)] for one in places]
    direction = re.search(r"direction=(\w+)", compare.text)
    if compare.op != "compare" or direction is None or len(operands) != 2:
        return None
    counter, bound = (condition.instructions[name] for name in operands)
    return counter, bound, direction[1]


def _read_place(instruction: Instruction) -> int | None:
    """Which element of the loop's tuple a `get-tuple-element` takes."""
    index = re.search(r"index=(\d+)", instruction.text)
    return int(index[1]) if instruction.op == "get-tuple-element" and index else None


def _read_constant(name: str, computation: Computation) -> int | None:
    """The integer behind a name, through copies."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.op in ("copy", "bitcast", "convert", "reshape", "copy-done"):
        instruction = computation.instructions.get(instruction.operands[0])
        if instruction is not None and instruction.op == "copy-start":
            instruction = computation.instructions.get(instruction.operands[0])
    if instruction is None or instruction.op != "constant" or not re.fullmatch(r"-?\d+", instruction.literal):
        return None
    return int(instruction.literal)


def _read_step(body: Computation, place: int) -> int | None:
    """What a turn adds to that element: 1 in every loop that jax makes, or what an addition in plain sight says."""
    added = body.instructions.get(body.root.operands[place])
    if added is not None and added.op == "add":
        constants = [_read_constant(name, body) for name in added.operands]
        return next((constant for constant in constants if constant is not None), 1)
    return 1 if added is not None and added.op == "fusion" else None
