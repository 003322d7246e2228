"""Find the family of a model: each is a package beside this file that holds a `Family` called `FAMILY`."""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from fedvlm_jax import models
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Family


def list_families() -> list[Family]:
    """Import every package beside this file for its `FAMILY`."""
    packages = [found.name for found in pkgutil.iter_modules(models.__path__) if found.ispkg]
    return [importlib.import_module(f"{models.__name__}.{name}").FAMILY for name in packages]


def find_family(values: dict[str, Any], file: Path) -> Family:
    """The family whose model `values`, the content of a config.json, describe; refuse a `model_type` of none.

    Raises:
        UserError: its `model_type` is no family's.
    """
    kind, families = values.get("model_type"), list_families()
    for family in families:
        if kind in family.model_types:
            return family
    known = ", ".join(kind for family in families for kind in family.model_types)
    raise UserError(f"{file} has model_type={kind!r}; known are {known}")
