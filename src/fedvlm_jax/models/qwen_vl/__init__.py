"""Qwen3-VL and Qwen2.5-VL (arXiv 2511.21631, 2502.13923): a tower on a grid, and a text model that knows it."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.qwen_vl.config import MODEL_TYPES, read_config
from fedvlm_jax.models.qwen_vl.model import build
from fedvlm_jax.models.qwen_vl.processor import open_processor, read_size

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=read_size,
    resizes=True,
    grids=True,
)
