"""Objectives: one file each, found by name (`sft+dpo` is `sft_dpo.py`'s `make`)."""

import importlib

from fedvlm_jax.objectives.base import Objective
from fedvlm_jax.objectives.config import PreferenceOptions

__all__ = ["Objective", "PreferenceOptions", "load_objective"]


def load_objective(name: str, options: PreferenceOptions | None = None) -> Objective:
    """Make the objective of this name from options, by default the default ones.

    >>> load_objective("sft+dpo").reads
    ('beta', 'variant', 'label_smoothing', 'sft_weight')
    """
    return importlib.import_module(f"{__name__}.{name.replace('+', '_')}").make(options or PreferenceOptions())
