"""LLaVA-1.5 and LLaVA-OneVision (arXiv 2310.03744, 2408.03326): CLIP or SigLIP, two products, a Llama-like model."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.llava.config import MODEL_TYPES, read_config
from fedvlm_jax.models.llava.model import build
from fedvlm_jax.models.llava.processor import open_processor
from fedvlm_jax.models.processor_files import read_crop_size, read_size_or_tower

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=lambda folder: read_size_or_tower(folder, read_config, read_crop_size),
)
