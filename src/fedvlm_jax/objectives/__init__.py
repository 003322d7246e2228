"""Objectives: one file each, found by name (`sft` is `sft.py`'s `OBJECTIVE`)."""

import importlib

from fedvlm_jax.objectives.record import Objective

__all__ = ["Objective", "load_objective"]


def load_objective(name: str) -> Objective:
    """The objective of this name, `sft` say."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_').replace('+', '_')}").OBJECTIVE
