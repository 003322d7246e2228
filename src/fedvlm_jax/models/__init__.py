"""Vision-language models as records of pure functions; today Florence-2 (arXiv 2311.06242)."""

from fedvlm_jax.models.base import Batch, Params, Vlm
from fedvlm_jax.models.florence2.consistency import open_model
from fedvlm_jax.models.florence2.model import build, image_tokens
from fedvlm_jax.models.florence2.processor import Processor, read_size
from fedvlm_jax.models.florence2.weights import save_checkpoint
from fedvlm_jax.models.hub import load_vlm, load_weights, read_vlm, resolve_folder
from fedvlm_jax.models.layers import Stacking

__all__ = [
    "Batch",
    "Params",
    "Processor",
    "Stacking",
    "Vlm",
    "build",
    "image_tokens",
    "load_vlm",
    "load_weights",
    "open_model",
    "read_size",
    "read_vlm",
    "resolve_folder",
    "save_checkpoint",
]
