"""Methods: one file each, found by name (`fedavg-lora` is `fedavg_lora.py`'s `make`).

The command line reads the options beside them, so the record, which knows jax, is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.options import options_known

if TYPE_CHECKING:
    from fedvlm_jax.methods.record import Client, Context, Method, Setup

__all__ = ["Client", "Context", "Method", "Setup", "load_method"]


def load_method(name: str, setup: "Setup") -> "Method":
    """The method of this name, `plora` say, made for a setup.

    Raises:
        UserError: its file has no `make`, or says of the method what cannot be: another name, unknown options.
    """
    stem = name.replace("-", "_")
    file = f"methods/{stem}.py"
    make = getattr(importlib.import_module(f"{__name__}.{stem}"), "make", None)
    if make is None:
        raise UserError(f"{file} defines no make(setup), which every file in methods/ must")
    method = make(setup)
    if method.name != name:
        raise UserError(f"{file} makes a method named {method.name!r}: it must have its file's name, {name!r}")
    known = options_known()
    unknown = sorted({*method.takes, *method.refuses, *method.moot} - known)
    if unknown:
        raise UserError(
            f"{file} names options that there are not: {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    return method


def __getattr__(name: str) -> Any:
    if name in ("Client", "Context", "Method", "Setup"):
        return getattr(importlib.import_module(f"{__name__}.record"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
