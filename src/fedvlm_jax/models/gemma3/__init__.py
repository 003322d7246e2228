"""Gemma 3 and MedGemma (arXiv 2503.19786, 2507.05201): SigLIP, pooled, and Gemma 3."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.gemma3.config import MODEL_TYPES, read_config
from fedvlm_jax.models.gemma3.model import build
from fedvlm_jax.models.gemma3.processor import open_processor
from fedvlm_jax.models.processor_files import read_size, read_size_or_tower

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=lambda folder: read_size_or_tower(folder, read_config, read_size),
)
