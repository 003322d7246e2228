"""InternVL as transformers has it (arXiv 2504.10479): InternViT, pixel shuffle, and Qwen2."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.internvl.config import read_config
from fedvlm_jax.models.internvl.model import build
from fedvlm_jax.models.internvl.processor import open_processor
from fedvlm_jax.models.processor_files import read_size, read_size_or_tower

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=("internvl",),
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=lambda folder: read_size_or_tower(folder, read_config, read_size),
)
