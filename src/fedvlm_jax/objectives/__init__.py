"""Objectives: one file each, found by name (`sft+dpo` is `sft_dpo.py`'s `make`)."""

import importlib

from fedvlm_jax.objectives.base import Objective
from fedvlm_jax.objectives.config import PreferenceOptions

__all__ = ["Objective", "PreferenceOptions", "load_objective"]


def load_objective(name: str, options: PreferenceOptions | None = None) -> Objective:
    """The objective of this name, `dpo` say, made from options (by default the default ones)."""
    return importlib.import_module(f"{__name__}.{name.replace('+', '_')}").make(options or PreferenceOptions())
