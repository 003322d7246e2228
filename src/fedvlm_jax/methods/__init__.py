"""Methods: one file each, found by name (`fedavg-lora` is `fedavg_lora.py`'s `make`).

The command line reads the options beside them, so the record, which knows jax, is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvlm_jax.methods.record import Client, Context, Method, Setup

__all__ = ["Client", "Context", "Method", "Setup", "load_method"]


def load_method(name: str, setup: "Setup") -> "Method":
    """The method of this name, `plora` say, made for a setup."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").make(setup)


def __getattr__(name: str) -> Any:
    if name in ("Client", "Context", "Method", "Setup"):
        return getattr(importlib.import_module(f"{__name__}.record"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
