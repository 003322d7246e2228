"""Flower's packages, imported when they are used: flwr is an extra that wants an environment of its own."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fedvlm_jax.errors import UserError

MISSING = (
    "Flower is not installed here: pip install '.[flower]' in a clone of fedvlm-jax, in an environment of its own, "
    "since it takes older versions of protobuf, rich, typer and packaging"
)
"""A message to whoever lacks the extra."""


def is_installed() -> bool:
    """Tell whether there is a Flower to use."""
    return find_spec("flwr") is not None


def load_flower(name: str) -> Any:
    """Import one of Flower's packages.

    Args:
        name: below `flwr`: `app`, `clientapp`, `serverapp`.

    Raises:
        UserError: Flower is not installed.
    """
    try:
        return import_module(f"flwr.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("flwr", f"flwr.{name}"):
            raise
        raise UserError(MISSING if error.name == "flwr" else f"this flwr has no {name}: {MISSING}") from None
