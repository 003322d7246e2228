"""Ranges of options, declared where the option is: `Annotated[float, Gt(0)]`, checked by one walker.

Counts, and numbers of rounds and clients, are 32-bit integers on the devices, so whole numbers have a bound even where
none is declared; numbers with a decimal point must be finite unless an upper bound of inf is declared.
"""

import functools
import math
import operator
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.untrusted_text import clean, cut

LARGEST = 2**31 - 1
LARGEST_SEED = 2**32 - 1
"""jax makes its keys of 32 bits: a seed of 2**32 would draw adapters as seed 0 does."""

Count = Annotated[int, Ge(1)]
Amount = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Chance = Annotated[float, Ge(0), Lt(1)]

TESTS: dict[type, Callable[[Any, Any], bool]] = {Gt: operator.gt, Ge: operator.ge, Lt: operator.lt, Le: operator.le}
WORDS: dict[type, str] = {Gt: "above {}", Ge: "{} or more", Lt: "below {}", Le: "at most {}"}


class Option(NamedTuple):
    """An option with its flag, `--train.batch-size`, and the bounds that are declared for it.

    The default is that of the field: None where a factory makes it.
    """

    flag: str
    value: Any
    default: Any
    bounds: tuple[Any, ...]


def check_ranges(options: Any, prefix: str = "") -> None:
    """Refuse numbers outside of their range, in a dataclass of options, nested as deeply as they are.

    Args:
        prefix: the group that they are in, `data` for `--data.limit`.

    Raises:
        UserError: the first of them, with its flag and the range.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     rank: Count = 0
    >>> check_ranges(Options())
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: --rank is 0: it must be 1 or more
    """
    for option in list_options(options, prefix):
        _check(option)


def check_arguments(function: Callable[..., None], arguments: Mapping[str, Any]) -> None:
    """Refuse numbers outside of their range in the arguments of a function that is a command.

    Raises:
        UserError: as `check_ranges`.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        for option in _open(name, value, None, hints[name], ""):
            _check(option)


def list_options(options: Any, prefix: str = "") -> Iterator[Option]:
    """List all options of a dataclass of options, those of nested groups in their place."""
    hints = _read_hints(type(options))
    for field in fields(options):
        yield from _open(field.name, getattr(options, field.name), field.default, hints[field.name], prefix)


def _open(name: str, value: Any, default: Any, hint: Any, prefix: str) -> Iterator[Option]:
    notes = tuple(_list_notes(hint))
    # `tyro.conf.arg(name=...)` is the one note that has a name; an empty one leaves the group out of the flag.
    shown = next((note.name for note in notes if isinstance(getattr(note, "name", None), str)), name.replace("_", "-"))
    path = f"{prefix}.{shown}".strip(".")
    if is_dataclass(value):
        yield from list_options(value, path)
    elif isinstance(value, Mapping):
        for key, nested in typing.cast("Mapping[str, Any]", value).items():
            yield from list_options(nested, f"{path}.{key}")
    else:
        yield Option("--" + path, value, default, tuple(note for note in notes if type(note) in TESTS))


@functools.cache
def _read_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _list_notes(hint: Any) -> Iterator[Any]:
    """List the notes that `Annotated` gives a type, and those inside of it."""
    yield from getattr(hint, "__metadata__", ())
    inner = (hint.__origin__,) if hasattr(hint, "__metadata__") else typing.get_args(hint)
    for part in inner:
        yield from _list_notes(part)


def _check(option: Option) -> None:
    values: tuple[Any, ...] = option.value if isinstance(option.value, tuple) else (option.value,)
    highest: Any = next((bound.le for bound in option.bounds if isinstance(bound, Le)), None)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, float) and math.isnan(value):  # of a huge integer `isnan` fails
            raise UserError(f"{option.flag} is nan: it must be a number")
        most = LARGEST if highest is None else highest
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"{option.flag} is {shorten(str(value))}: it must be a whole number of at most {most}")
        limits = [(type(bound), getattr(bound, type(bound).__name__.lower())) for bound in option.bounds]
        if not all(TESTS[kind](value, limit) for kind, limit in limits) or (math.isinf(value) and highest is None):
            words = " and ".join(WORDS[kind].format(limit) for kind, limit in limits if limit != math.inf) or "finite"
            if [kind for kind, _ in limits] == [Ge, Le]:
                words = f"from {limits[0][1]} to {limits[1][1]}"
            raise UserError(f"{option.flag} is {value}: it must be {words}")


def shorten(text: str) -> str:
    """Cut what was given, and write out its line breaks, so that the message stays a line.

    >>> shorten("9" * 60)
    '999999999999999999999999999999… (60 characters)'
    """
    text = clean(text)
    return text if len(text) <= 40 else f"{cut(text, 30)} ({len(text)} characters)"
