"""Florence-2 (arXiv 2311.06242), as transformers has it: DaViT, a projector, and BART."""

from fedvlm_jax.models.base import Family
from fedvlm_jax.models.florence2.config import MODEL_TYPES, read_config
from fedvlm_jax.models.florence2.model import build
from fedvlm_jax.models.florence2.processor import Processor
from fedvlm_jax.models.processor_files import read_size

__all__ = ["FAMILY", "Processor", "build"]

FAMILY = Family(
    model_types=MODEL_TYPES,
    read_config=read_config,
    build=build,
    open_processor=Processor.from_folder,
    read_size=read_size,
)
