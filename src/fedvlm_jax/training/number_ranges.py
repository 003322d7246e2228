"""The ranges that all numbers among the options have, whatever else is asked of each."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.untrusted_text import clean

__all__ = ["LARGEST", "LARGEST_SEED", "check_numbers", "shorten"]

LARGEST = 2**31 - 1
"""Counts, and numbers of rounds and clients, are 32-bit integers on the devices."""

LARGEST_SEED = 2**32 - 1
"""jax makes its keys of 32 bits: a seed of 2**32 would draw adapters as seed 0 does."""

SHOWN = 40
"""Characters of what was given that are told."""


UNNAMED = ("run", "comparison", "base", "request")
"""Groups of options whose name is no part of their flags."""


def check_numbers(options: Any) -> None:
    """Refuse whole numbers that are out of range and numbers that are none, in options nested as deeply as they are.

    Args:
        options: a dataclass of options, or names and values.

    Raises:
        UserError: the first of them, with its flag and the range.
    """
    for path, value in _list_numbers(options):
        flag = "--" + path.replace("_", "-")
        if isinstance(value, float):
            if math.isnan(value):
                raise UserError(f"{flag} is nan: it must be a number")
            continue
        largest = LARGEST_SEED if path.rpartition(".")[2] == "seed" else LARGEST
        if abs(value) > largest:
            raise UserError(f"{flag} is {shorten(str(value))}: it must be a whole number of at most {largest}")


def _list_numbers(options: Any, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number with its path, as in `train.rounds`."""
    named = options if isinstance(options, Mapping) else {f.name: getattr(options, f.name) for f in fields(options)}
    for name, value in named.items():
        if is_dataclass(value):
            yield from _list_numbers(value, "" if name in UNNAMED else f"{prefix}{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield prefix + name, number


def shorten(text: str) -> str:
    """Cut what was given, and write out its line breaks, so that the message stays one line."""
    text = clean(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 10]}… ({len(text)} characters)"
