"""Frozen dataclasses to JSON and back, exactly.

The folder of a run must bring back the very options that made it. So nothing is guessed: every field is written, an
unknown or missing key is an error, and a value of another type than its field's is an error that names the field.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.utils.untrusted_text import clean, cut

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Turn a dataclass into what `json.dumps` takes: nested dictionaries, lists, strings, numbers, `None`.

    >>> from fedvlm_jax.methods.config import LocalOptions
    >>> encode(LocalOptions(proximal=0.1))
    {'proximal': 0.1, 'scaffold': False}
    """
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value


def decode(kind: type[T], stored: Any, where: str = "", chosen: Mapping[str, Any] | None = None) -> T:
    """Rebuild a dataclass from what `encode` made of it.

    Args:
        where: the path of the enclosing field, for messages.
        chosen: path of a field -> its type, where that is a subclass of the declared one.

    Raises:
        UserError: a key is unknown or missing, or a value does not fit its field.
    """
    if not isinstance(stored, Mapping):
        raise UserError(f"{where or 'the configuration'} should be a group of options, not {stored!r}")
    hints, chosen = typing.get_type_hints(kind), chosen or {}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # T is a dataclass
    prefix = f"{where}." if where else ""
    unknown = sorted(set(stored) - set(names))
    if unknown:
        raise UserError(
            f"unknown option {_show(prefix + unknown[0])} in the stored configuration; there are {', '.join(names)}. "
            "Was it written by another version?"
        )
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"the stored configuration lacks {prefix}{missing[0]}; was it written by another version?")
    return kind(
        **{name: fit(chosen.get(prefix + name, hints[name]), stored[name], prefix + name, chosen) for name in names}
    )


def fit(hint: Any, value: Any, where: str, chosen: Mapping[str, Any] | None = None) -> Any:
    """Rebuild a value of the type that a hint names from what JSON gave.

    Raises:
        UserError: it is of another type; `where` names its place.

    >>> fit(tuple[float, ...], [1, "inf"], "rates")
    (1.0, inf)
    """
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast("type[Any]", hint), value, where, chosen)
    if origin in (typing.Union, types.UnionType):
        for member in inner:
            with contextlib.suppress(UserError):
                return fit(member, value, where)
        raise _misfit(where, value, " or ".join(getattr(member, "__name__", str(member)) for member in inner))
    if origin is typing.Literal:
        if value in inner:
            return value
        raise _misfit(where, value, " or ".join(map(repr, inner)))
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _misfit(where, value, "a list")
        kinds = inner[:1] * len(value) if origin is list or inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            raise _misfit(where, value, format_count(len(kinds), "value"))
        return origin(fit(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _misfit(where, value, "a group")
        return {name: fit(inner[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and (type(value) is int or value in ("inf", "-inf", "nan")):
        try:
            return float(value)
        except OverflowError:
            raise _misfit(where, value, "a number that float64 has") from None
    # `type(...) is`, because True is an int to isinstance.
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise _misfit(where, value, getattr(hint, "__name__", str(hint)))


def _misfit(where: str, value: Any, expected: str) -> UserError:
    shown = "[…]" if isinstance(value, list) else "{…}" if isinstance(value, dict) else repr(value)
    return UserError(f"{_show(where)} = {cut(shown, 80)}; expected {expected}")


def _show(path: str) -> str:
    """Show the path of an entry, whose names may be a stranger's."""
    return cut(clean(path), 120)
