"""Memory traffic of a round on a device, and time as its compiler foresees it.

The compiler's own sums (`cost_analysis`) count what stands in a loop once, however often the loop turns, and a round is
loops within loops: waves, steps, layers. So loops are counted here.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fedvlm_jax.analysis.hlo import Array, Computation, Instruction, Program

__all__ = ["Traffic", "count_traffic"]

FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "optimization-barrier", "get-dimension-size", "domain", "add-dependency",
})  # fmt: skip
"""Instructions that move nothing themselves."""

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Traffic(NamedTuple):
    """Of one device, in one round.

    Attributes:
        bytes: read from and written to its main memory by the program's instructions, without padding.
        cycles: as the compiler foresees them for its own instructions; None where it says nothing. Kernels written by
            hand (custom calls) and the network are not among them.
    """

    bytes: int
    cycles: int | None


def count_traffic(program: Program) -> Traffic:
    """Add up what a compiled program's instructions move, each as often as it runs.

    A fused instruction reads its operands and writes its results, once, and nothing between. Of an operand of which it
    takes slices it reads those; of a result into which it writes a slice it writes that.
    """
    fused = {called for one in program.computations.values() for called in _find_inner(one)}
    total, cycles = 0, None
    for name, computation in program.computations.items():
        runs = 0 if name in fused else program.runs[name]
        for instruction in computation.instructions.values() if runs else ():
            if foreseen := _CYCLES.search(instruction.text):
                cycles = (cycles or 0) + runs * int(foreseen[1])
            total += runs * _count_bytes(instruction, computation, program.computations)
    return Traffic(total, cycles)


def _find_inner(computation: Computation) -> Iterable[str]:
    """Computations that run inside an instruction, and so move nothing of their own."""
    for instruction in computation.instructions.values():
        for role, called in instruction.called:
            if (role == "to_apply" and instruction.op != "call") or (
                role == "calls" and not instruction.op.startswith("async")
            ):
                yield called


def _count_bytes(instruction: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> int:
    op = instruction.op
    if op in FREE or op.endswith(("-done", "-update")) or op == "async-start":
        return 0
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if op == "fusion":
        inner = computations[dict(instruction.called)["calls"]]
        return _count_fusion(instruction, operands, inner)
    written = instruction.result
    if op.endswith("-start") and op != "all-reduce-start":
        written = written[:1] if op == "copy-start" else written[len(operands) : 2 * len(operands)]
    if op in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(written)
    if op in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[1 if op == "dynamic-update-slice" else -1].result)
    return _main(written) + sum(_main(one.result) for one in operands)


def _count_fusion(fusion: Instruction, operands: list[Instruction], inner: Computation) -> int:
    """What a fusion's operands are read of and its results written of."""
    parameters = {int(one.literal): one for one in inner.instructions.values() if one.op == "parameter"}
    total = 0
    for number, operand in enumerate(operands):
        main = _main(operand.result)
        total += min(main, _count_read(parameters[number], inner)) if main and number in parameters else main
    root = inner.root
    parts = [inner.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    for part, array in zip(parts, fusion.result, strict=False):
        source = _strip(part, inner)
        size = _main((array,))
        if source.op == "dynamic-update-slice":
            size = min(size, sum(one.bytes for one in inner.instructions[source.operands[1]].result))
        total += size
    return total


def _count_read(parameter: Instruction, inner: Computation) -> int:
    """Bytes that a fusion reads of one operand: slices, where all that it does with it is to take them."""
    total, names = 0, [parameter.name]
    for name in names:
        for user in inner.instructions.values():
            if name not in user.operands:
                continue
            if user.op in ("bitcast", "copy", "convert") and not user.root:
                names.append(user.name)
            elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += sum(array.bytes for array in user.result)
            elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                continue  # written in place
            else:
                return sum(array.bytes for array in parameter.result)
    return total


def _strip(instruction: Instruction, inner: Computation) -> Instruction:
    """What is behind bitcasts."""
    while instruction.op == "bitcast":
        instruction = inner.instructions[instruction.operands[0]]
    return instruction


def _main(arrays: Iterable[Array]) -> int:
    """Bytes of those in the device's main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)
