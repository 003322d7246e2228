"""Vision-language models as records of facts and pure functions: a package per family, found by `model_type`."""

from fedvlm_jax.models.base import Batch, Family, GridVision, Params, PictureGrids, Processor, Vlm
from fedvlm_jax.models.hub import (
    load_vlm,
    load_weights,
    open_model,
    open_processor,
    read_size,
    read_vlm,
    resolve_folder,
    save_checkpoint,
)
from fedvlm_jax.models.layers import Stacking

__all__ = [
    "Batch", "Family", "GridVision", "Params", "PictureGrids", "Processor", "Stacking", "Vlm", "load_vlm",
    "load_weights", "open_model", "open_processor", "read_size", "read_vlm", "resolve_folder", "save_checkpoint",
]  # fmt: skip
