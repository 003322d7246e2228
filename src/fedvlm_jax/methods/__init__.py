"""Methods: one file each, found by name (`fedavg-lora` is `fedavg_lora.py`'s `make`)."""

import importlib

from fedvlm_jax.methods.record import Client, Context, Method, Setup

__all__ = ["Client", "Context", "Method", "Setup", "load_method"]


def load_method(name: str, setup: Setup) -> Method:
    """The method of this name, `plora` say, made for a setup."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").make(setup)
