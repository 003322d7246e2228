"""PaliGemma and PaliGemma 2 (arXiv 2407.07726, 2412.03555): SigLIP, one product, and Gemma or Gemma 2."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.paligemma.config import MODEL_TYPES, read_config
from fedvlm_jax.models.paligemma.model import build
from fedvlm_jax.models.paligemma.processor import open_processor
from fedvlm_jax.models.processor_files import read_size, read_size_or_tower

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=lambda folder: read_size_or_tower(folder, read_config, read_size),
)
