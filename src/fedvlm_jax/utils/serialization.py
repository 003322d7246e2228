"""Frozen dataclasses to JSON and back, exactly.

The folder of a run must bring back the very options that made it. So nothing is guessed: every field is written, an
unknown or missing key is an error, and a value of another type than its field's is an error that names the field.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.untrusted_text import cut

T = TypeVar("T")


def encode(options: Any) -> dict[str, Any]:
    """Turn a dataclass into what `json.dumps` takes: nested dictionaries, lists, strings, numbers, `None`.

    >>> from fedvlm_jax.methods.config import LocalOptions
    >>> encode(LocalOptions(proximal=0.1))
    {'proximal': 0.1, 'scaffold': False}
    """
    return {field.name: _encode_value(getattr(options, field.name)) for field in dataclasses.fields(options)}


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
            f"unknown option {prefix}{unknown[0]} in the stored configuration; there are {', '.join(names)}. Was it "
            "written by another version?"
        )
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"the stored configuration lacks {prefix}{missing[0]}; was it written by another version?")
    values = dict[str, Any]()
    for name in names:
        hint = chosen.get(prefix + name, hints[name])
        if dataclasses.is_dataclass(hint):
            values[name] = decode(typing.cast("type[Any]", hint), stored[name], prefix + name, chosen)
        else:
            values[name] = fit(hint, stored[name], prefix + name)
    return kind(**values)


def _encode_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return encode(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_encode_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value


def fit(hint: Any, value: Any, where: str) -> Any:
    """Rebuild a value of the type that a hint names from what JSON gave.

    Raises:
        UserError: it is of another type; `where` names its place.

    >>> fit(tuple[float, ...], [1, "inf"], "rates")
    (1.0, inf)
    """
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast("type[Any]", hint), value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(hint), value, where)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise _misfit(where, value, " or ".join(map(repr, typing.get_args(hint))))
    if origin is tuple:
        return _decode_tuple(typing.get_args(hint), value, where)
    if origin is list:
        return list(_decode_tuple((*typing.get_args(hint), ...), value, where))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _misfit(where, value, "a group")
        return {name: fit(typing.get_args(hint)[1], entry, f"{where}.{name}") for name, entry in value.items()}
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


def _decode_union(members: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    for member in members:
        if member is not type(None):
            try:
                return fit(member, value, where)
            except UserError:
                continue
    raise _misfit(where, value, " or ".join(getattr(member, "__name__", str(member)) for member in members))


def _decode_tuple(members: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _misfit(where, value, "a list")
    if len(members) == 2 and members[1] is Ellipsis:
        members = [members[0]] * len(value)
    if len(members) != len(value):
        raise _misfit(where, value, f"{len(members)} values")
    return tuple(fit(member, item, where) for member, item in zip(members, value, strict=True))


def _misfit(where: str, value: Any, expected: str) -> UserError:
    shown = "[…]" if isinstance(value, list) else "{…}" if isinstance(value, dict) else repr(value)
    return UserError(f"{where} = {cut(shown, 80)}; expected {expected}")
