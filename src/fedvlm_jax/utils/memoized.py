"""Values that are computed once and live as long as the object that they belong to."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar

Holder = TypeVar("Holder")
Key = ParamSpec("Key")
Value = TypeVar("Value")


def memoized(function: Callable[Concatenate[Holder, Key], Value]) -> Callable[Concatenate[Holder, Key], Value]:
    """Keep what a function returns in its first argument, by its other positional arguments.

    The value may depend on nothing but these. What only says how to come by it, such as where to report meanwhile, is
    passed by keyword and is no part of the key; a `/` in the signature keeps the two apart.

    >>> class Powers:
    ...     base = 2
    ...     @memoized
    ...     def compute(self, exponent, /, *, note):
    ...         note(f"computing {exponent}")
    ...         return self.base**exponent
    >>> powers = Powers()
    >>> powers.compute(3, note=print), powers.compute(3, note=print)
    computing 3
    (8, 8)
    """

    # Not functools.cache: it belongs to the class and would keep every object, with its weights, for good.
    @functools.wraps(function)
    def find(holder: Holder, /, *key: Key.args, **how: Key.kwargs) -> Value:
        memo: dict[tuple[Hashable, ...], Any] = vars(holder).setdefault("_memo", {})
        if (find, *key) not in memo:
            memo[find, *key] = function(holder, *key, **how)
        return memo[find, *key]

    return find


def forget(holder: object, function: Callable[..., Any]) -> None:
    """Drop all values of a memoized function that an object holds; those of other functions stay.

    >>> class Model:
    ...     @memoized
    ...     def programs(self, method, /):
    ...         print(f"compiling {method}")
    >>> model = Model()
    >>> model.programs("plora"), forget(model, Model.programs), model.programs("plora")
    compiling plora
    compiling plora
    (None, None, None)
    """
    memo: dict[tuple[Hashable, ...], Any] = vars(holder).get("_memo", {})
    for key in [key for key in memo if key[0] is function]:
        del memo[key]
