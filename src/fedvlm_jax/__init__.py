"""Federated fine-tuning of vision-language models in JAX/Flax (FedVLM, arXiv 2507.17088).

The public names; each is imported when it is first used, so that importing the package costs nothing and touches no
device:

    load_vlm        (path) -> (vlm, params): a model from a Hugging Face folder, or one that ships
    open_processor  (path) -> its processor: text and images to arrays and back
    Vlm             the model as a record of pure functions
    build           (config) -> vlm: Florence-2's architecture without weights; `Processor` is its processor
    lora            low-rank adapters for any linen model: find_sites, LoRA, init, inject, merge, partition, combine
    tree            nested dictionaries of arrays by path
    methods         federated methods as records of pure functions, and how to load one by name
    UserError       what bad input raises
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvlm_jax import lora, methods
    from fedvlm_jax.errors import UserError
    from fedvlm_jax.models import Vlm, load_vlm, open_processor
    from fedvlm_jax.models.florence2 import Processor, build
    from fedvlm_jax.utils import tree

__all__ = ["Processor", "UserError", "Vlm", "build", "load_vlm", "lora", "methods", "open_processor", "tree"]
__version__ = "0.1.0"

_HOMES = {
    "Processor": "fedvlm_jax.models.florence2",
    "UserError": "fedvlm_jax.errors",
    "Vlm": "fedvlm_jax.models",
    "build": "fedvlm_jax.models.florence2",
    "load_vlm": "fedvlm_jax.models",
    "open_processor": "fedvlm_jax.models",
}
_MODULES = {"lora": "fedvlm_jax.lora", "methods": "fedvlm_jax.methods", "tree": "fedvlm_jax.utils.tree"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedvlm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
