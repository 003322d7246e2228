"""Adapters of a model as folders that PEFT loads, and folders of PEFT's as adapters; without PyTorch."""

from fedvlm_jax.peft.folder import PeftFolder, read_peft, write_peft
from fedvlm_jax.peft.format import Factors, pack, unpack

__all__ = ["Factors", "PeftFolder", "pack", "read_peft", "unpack", "write_peft"]
