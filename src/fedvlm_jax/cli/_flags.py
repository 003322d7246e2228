"""Options and their flags: `train.batch_size` is `--train.batch-size`."""

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "name_flag"]

SHORT = {"data.source": "data"}
"""Options whose flag is not their path."""


def name_flag(name: str) -> str:
    """The flag of an option: `--data.images-per-client`."""
    return "--" + SHORT.get(name, name).replace("_", "-")


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options: `train.rounds` -> value."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
