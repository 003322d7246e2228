"""Patterns of a LoRA's configuration (`rank_pattern`, `alpha_pattern`), as PEFT reads them, and numbers in its place.

The expressions are a stranger's: one may take for ever to match, or all memory before it is asked anything.
"""

import math
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.untrusted_text import clean, cut

LONGEST, REPEATS, SECONDS = 1000, 1000, 30.0
"""Characters of a name or a pattern, how often `{m,n}` may repeat in all, and how long all patterns may take."""


def read_patterns(patterns: Any, where: str) -> Callable[[str, float], float]:
    """Read patterns, and return what says their number for a module, or else the number that is given with it.

    As PEFT does: the first that is the module's name, or the end of it, counts.

    Raises:
        UserError: one is no expression, has no number, or could take too long or too much memory.

    >>> find = read_patterns({"fc[12]": 4}, "folder")
    >>> find("decoder.fc1", 8), find("decoder.q_proj", 8)
    (4, 8)
    """
    known = list[tuple[str, Callable[[str, float], bool], float]]()
    for pattern, value in (patterns or {}).items():
        if not is_number(value):
            raise UserError(f"{_name_pattern(pattern, where)} with {show(value)}, expected a number; is it damaged?")
        known.append((pattern, _compile(pattern, where), value))
    end = time.monotonic() + SECONDS

    def find(name: str, otherwise: float) -> float:
        for pattern, fits, value in known:
            try:
                if fits(name, end - time.monotonic()):
                    return value
            except TimeoutError:
                raise UserError(f"{_name_pattern(pattern, where)} that cannot be used: it takes too long") from None
        return otherwise

    return find


def _compile(pattern: str, where: str) -> Callable[[str, float], bool]:
    """Make of a pattern what says, within so many seconds, whether a name fits it."""
    import regex  # not re, which cannot be stopped

    literal = re.sub(r"\\(.)", r"\1", pattern)
    if re.escape(literal) == pattern:  # as `pack` writes them, of every module one
        return lambda name, seconds: name == literal or name.endswith(f".{literal}")
    braces = re.findall(r"\{[^}]*\}?", pattern)
    counts = [re.fullmatch(r"\{(\d{0,4})(?:,(\d{0,4}))?\}", brace) for brace in braces]
    most = math.prod(max(1, *(int(count or 1) for count in match.groups())) for match in counts if match)
    if len(pattern) > LONGEST or most > REPEATS or None in counts:
        raise UserError(f"{_name_pattern(pattern, where)} that cannot be used: it is longer than names of modules ask")
    whole = rf"(.*\.)?({pattern})$"
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(whole)  # for its errors: it knows no expression that calls itself
        expression = regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError):
        raise UserError(f"{_name_pattern(pattern, where)} that cannot be used") from None

    def fits(name: str, seconds: float) -> bool:
        if seconds <= 0:
            raise TimeoutError
        return expression.match(name, timeout=seconds) is not None

    return fits


def _name_pattern(pattern: str, where: str) -> str:
    return f"{where}: adapter_config.json has a pattern {show(pattern)}"


def is_number(value: Any) -> bool:
    """Say whether a value of the configuration is a number of a usual size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def show(value: Any) -> str:
    """Write a value of a stranger's for a message."""
    return cut(clean(str(value)), 100)
