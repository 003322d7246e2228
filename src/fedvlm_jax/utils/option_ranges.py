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
from fedvlm_jax.utils.untrusted_text import clean

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

SHOWN = 40
"""Characters of a value that a message shows."""

TESTS: dict[type, Callable[[Any, Any], bool]] = {Gt: operator.gt, Ge: operator.ge, Lt: operator.lt, Le: operator.le}
WORDS: dict[type, str] = {Gt: "above {}", Ge: "{} or more", Lt: "below {}", Le: "at most {}"}


class Option(NamedTuple):
    """One option.

    Attributes:
        flag: on the command line, `--train.batch-size`.
        value: the current one.
        default: the field's own; None where a factory makes it.
        bounds: the declared ones.
    """

    flag: str
    value: Any
    default: Any
    bounds: tuple[Any, ...]


def check_ranges(options: Any, prefix: str = "") -> None:
    """Refuse numbers outside of their range, in options nested as deeply as they are.

    Args:
        options: a dataclass of options.
        prefix: the group that it is in, `data` for `--data.limit`.

    Raises:
        UserError: the first of them, with its flag and the range.

    Examples:
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
    """Do the same for the arguments of a function that is a command.

    Raises:
        UserError: as `check_ranges`.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        for option in _open(name, value, None, hints[name], ""):
            _check(option)


def list_options(options: Any, prefix: str = "") -> Iterator[Option]:
    """List all options of a dataclass of options, those of nested groups in their place."""
    hints = _find_hints(type(options))
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
def _find_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _list_notes(hint: Any) -> Iterator[Any]:
    """List what `Annotated` says of a type, and of those inside of it."""
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
        if math.isnan(value):
            raise UserError(f"{option.flag} is nan: it must be a number")
        most = LARGEST if highest is None else highest
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"{option.flag} is {shorten(str(value))}: it must be a whole number of at most {most}")
        held = [TESTS[type(bound)](value, _limit(bound)) for bound in option.bounds]
        if not all(held) or (math.isinf(value) and highest is None):
            raise UserError(f"{option.flag} is {value}: it must be {_describe(option.bounds)}")


def _limit(bound: Any) -> Any:
    return getattr(bound, type(bound).__name__.lower())


def _describe(bounds: tuple[Any, ...]) -> str:
    if [type(bound) for bound in bounds] == [Ge, Le]:
        return f"from {_limit(bounds[0])} to {_limit(bounds[1])}"
    told = [WORDS[type(bound)].format(_limit(bound)) for bound in bounds if _limit(bound) != math.inf]
    return " and ".join(told) or "finite"


def shorten(text: str) -> str:
    """Cut what was given, and write out its line breaks, so that the message stays one line."""
    text = clean(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 10]}… ({len(text)} characters)"
