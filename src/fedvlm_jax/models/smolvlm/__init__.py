"""SmolVLM, SmolVLM2 and Idefics3 (arXiv 2504.05299, 2408.12637): SigLIP, pixel shuffle, and Llama."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.processor_files import read_size_or_tower
from fedvlm_jax.models.smolvlm.config import MODEL_TYPES, read_config
from fedvlm_jax.models.smolvlm.model import build
from fedvlm_jax.models.smolvlm.processor import open_processor, read_size

__all__ = ["FAMILY", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=open_processor,
    read_size=lambda folder: read_size_or_tower(folder, read_config, read_size),
    cuts=True,
)
