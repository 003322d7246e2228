"""CLIP (arXiv 2103.00020) as a classifier: two towers, and answers that are chosen among those of the data."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.clip.config import MODEL_TYPES, read_config
from fedvlm_jax.models.clip.model import build
from fedvlm_jax.models.clip.processor import open_processor
from fedvlm_jax.models.processor_files import read_crop_size, read_size_or_tower

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=lambda folder: read_size_or_tower(folder, read_config, read_crop_size),
)
