"""What kind of work a round's operations are: how much of the time the matrix products have, and what has the rest."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fedvlm_jax.analysis.collectives import Line, read_program
from fedvlm_jax.analysis.profile_scopes import find_self_times, read_trace

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


def find_kinds(text: str) -> dict[str, str]:
    """Classify all operations of a program's text but loops, whose time is that of what they run: operation -> kind.

    A fusion is a product where there is one in it; else it is dear where it takes an exponential, and moves data where
    it computes nothing.
    """
    _, computations = read_program(text)

    def find_ops(line: Line) -> set[str]:
        is_product = line.op == "custom-call" and ("matmul" in line.rest or "gemm" in line.rest)
        inner = [name for role in ("calls", "to_apply") for name in line.called.get(role, ())]
        ops = (find_ops(one) for name in inner for one in computations[name].values())
        return {"dot" if is_product else line.op}.union(*ops)

    kinds: dict[str, str] = {}
    for lines in computations.values():
        for line in lines.values():
            if line.op not in CONTROL:
                ops = find_ops(line)
                place = 0 if ops & PRODUCTS else 1 if ops & DEAR else 3 if ops <= MOVES else 2
                kinds[line.name] = KINDS[place]
    return kinds


def measure_kinds(run: Callable[[], Any], text: str) -> Mapping[str, float]:
    """Run something once under jax's profiler; kind -> its share of the operations' time, summed over threads.

    Args:
        run: runs the compiled program, which it has run before.
        text: the program's.

    Raises:
        ValueError: the profiler named no operation of the program.
    """
    kinds = find_kinds(text)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch, profiler_options=options):
            run()
        trace = read_trace(max(Path(scratch).rglob("*.trace.json.gz")))
    events = [event for event in trace["traceEvents"] if event.get("args", {}).get("hlo_op") in kinds]
    found = dict.fromkeys(KINDS, 0.0)
    for event, seconds in find_self_times(events):
        found[kinds[event["args"]["hlo_op"]]] += seconds
    total = sum(found.values())
    if not total:
        raise ValueError("the profiler named no operation of this program")
    return {kind: seconds / total for kind, seconds in found.items()}
