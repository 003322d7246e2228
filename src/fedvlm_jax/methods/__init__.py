"""Federated methods as records of pure functions: the record, its registry, shared components and the zoo.

The command line reads the options beside them, so the record, which knows jax, is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvlm_jax.methods.base import Client, Context, Method, Setup
    from fedvlm_jax.methods.registry import load_method

__all__ = ["Client", "Context", "Method", "Setup", "load_method"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "registry" if name == "load_method" else "base"
        return getattr(importlib.import_module(f"fedvlm_jax.methods.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
