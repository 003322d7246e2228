"""What kind of work a round's operations are: how much of the time the matrix products have, and what has the rest."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fedvlm_jax.analysis.hlo import Program, parse_program
from fedvlm_jax.analysis.profile_scopes import find_own_times, read_trace

__all__ = ["KINDS", "find_kinds", "measure_kinds"]

KINDS: tuple[str, ...] = ("matrix products", "exponentials and the like", "sums and elementwise", "moving data")

PRODUCTS = {"dot", "convolution"}
DEAR = {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "erf", "power", "rsqrt",
        "sqrt", "cosine", "sine"}  # fmt: skip
MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "bitcast-convert", "reshape", "copy", "transpose",
    "broadcast", "iota", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "reverse", "gather",
    "convert", "copy-start", "copy-done", "rng-bit-generator", "call", "fusion",
}  # fmt: skip
CONTROL = {"while", "conditional"}


def find_kinds(program: Program) -> dict[str, str]:
    """operation -> its kind, of all that a program runs but loops, whose time is that of what they run.

    A fusion is a product where there is one in it; else it is dear where it takes an exponential, and moves data where
    it computes nothing.
    """

    def all_ops(name: str) -> set[str]:
        found: set[str] = set()
        for one in program.computations[name].instructions.values():
            found |= ops_of(one)
        return found

    def ops_of(one: Any) -> set[str]:
        own = "dot" if one.op == "custom-call" and ("matmul" in one.text or "gemm" in one.text) else one.op
        return {own}.union(*(all_ops(name) for role, name in one.called if role in ("calls", "to_apply")))

    kinds: dict[str, str] = {}
    for computation in program.computations.values():
        for one in computation.instructions.values():
            if one.op in CONTROL:
                continue
            ops = ops_of(one)
            place = 0 if ops & PRODUCTS else 1 if ops & DEAR else 3 if ops <= MOVES else 2
            kinds[one.name] = KINDS[place]
    return kinds


def measure_kinds(run: Callable[[], Any], text: str) -> Mapping[str, float]:
    """Run something once under jax's profiler; kind -> its share of the operations' time, summed over threads.

    Args:
        run: runs the compiled program, which it has run before.
        text: the program's.

    Raises:
        ValueError: the profiler named no operation of the program.
    """
    kinds = find_kinds(parse_program(text))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch, profiler_options=options):
            run()
        trace = read_trace(max(Path(scratch).rglob("*.trace.json.gz")))
    events = [event for event in trace["traceEvents"] if event.get("args", {}).get("hlo_op") in kinds]
    found = dict.fromkeys(KINDS, 0.0)
    for event, seconds in find_own_times(events):
        found[kinds[event["args"]["hlo_op"]]] += seconds
    total = sum(found.values())
    if not total:
        raise ValueError("the profiler named no operation of this program")
    return {kind: seconds / total for kind, seconds in found.items()}
