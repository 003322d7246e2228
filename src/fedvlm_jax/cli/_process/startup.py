"""Begin sooner: what a command may choose for its process because nobody else runs in it.

Until its first round a command imports, traces and compiles. What was compiled before is kept (`kept_programs`).
Tracing makes many objects and drops few: Python's collector looks through them a thousand times, and jax notes for
every operation by which lines of source it came about; each takes a second or two of twenty. Results depend on none of
it. No heavy package is imported here.
"""

import gc
import os
import sys

from fedvlm_jax.utils.compilation_cache import keep_programs

RARELY = (100_000, 20, 20)  # thresholds of Python's three generations of garbage; its own first is 700
LINES = "jax_traceback_in_locations_limit"  # jax's setting: frames of source that an operation remembers


def start_quickly(lines: bool = False) -> None:
    """Keep compiled programs, collect rarely, note no lines of source; call it before the first program is traced.

    The environment may say how many lines (`JAX_TRACEBACK_IN_LOCATIONS_LIMIT`); with `lines` they are noted all the
    same, for profilers, which show them. Nothing in this package calls it on import: libraries leave that choice to the
    program.
    """
    keep_programs()
    gc.set_threshold(*RARELY)
    if lines or LINES.upper() in os.environ:
        return
    os.environ[LINES.upper()] = "0"
    if "jax" in sys.modules:  # which reads the environment when it is imported
        sys.modules["jax"].config.update(LINES, 0)
