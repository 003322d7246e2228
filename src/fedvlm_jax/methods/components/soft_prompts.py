"""Soft prompts in a method's trees: where the vectors lie, and adapters of several prompts and a head.

A soft prompt is the leaf `prompt` [n, width] of an adapter, at `Setup.spec.prompt_at`. Where an adapter has several
they are stacked, [N, n, width]; how they are compared with pictures then says its head (`models.clip.heads`).
"""

import jax
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Setup
from fedvlm_jax.utils import tree

DEVIATION = 0.02
"""Of vectors that are drawn: CoOp's (arXiv 2109.01134), and that of CLIP's token embeddings."""

PROMPT_ALONE = {
    "lora.ranks": "a soft prompt has no rank",
    "lora.targets": "it trains soft prompts alone: take promptfl for low-rank factors beside one",
    "start": "a folder of PEFT's has no soft prompt for it",
}
"""Refusals of a method whose adapters are soft prompts and nothing else."""


def find_path(setup: Setup, name: str = lora.PROMPT) -> str:
    """Find the path of a soft prompt, or of another leaf at its place.

    >>> find_path(Setup(sites={}, spec=lora.LoRA(prompt_at="text/embedding"), start_optimizer=lambda *_: {}))
    'text/embedding/prompt'
    """
    return f"{setup.spec.prompt_at}/{name}"


def get_leaf(part: PyTree, path: str) -> Array:
    """Return the leaf at a path.

    >>> get_leaf({"text": {"prompt": 1}}, "text/prompt")
    1
    """
    return tree.flatten(part)[path]


def set_leaf(part: PyTree, path: str, leaf: Array) -> PyTree:
    """Return a tree with another leaf at a path.

    >>> set_leaf({"text": {"prompt": 1}}, "text/prompt", 2)
    {'text': {'prompt': 2}}
    """
    return tree.unflatten({**tree.flatten(part), path: leaf})


def draw_like(prompt: Float[Array, "n width"], seed: int, *shape: int) -> Array:
    """Draw N(0, 0.02²) of a prompt's type; in its shape unless another is given. All clients and runs draw alike."""
    return DEVIATION * jax.random.normal(jax.random.key(seed), shape or prompt.shape, prompt.dtype)
