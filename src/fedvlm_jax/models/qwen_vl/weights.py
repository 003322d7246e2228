"""Names in the checkpoints of Qwen2.5-VL and Qwen3-VL, which are those of transformers' modules but for a prefix."""

import re

import numpy as np

from fedvlm_jax.models.qwen_vl.grid import FRAMES
from fedvlm_jax.models.qwen_vl.tower import GridShape
from fedvlm_jax.models.transformer_names import FIELDS, name_text
from fedvlm_jax.models.weight_table import Rule, Table, dense, weights

_TEXT, _VISION, _HEAD = "model.language_model", "model.visual", "lm_head.weight"
_BLOCKS, _MADE = "vision_tower/blocks", "image_projector"
_FIELDS = FIELDS | {
    "joint": "qkv|proj",
    "block_norm": "norm[12]",
    "feed": "linear_fc1|linear_fc2|gate_proj|up_proj|down_proj",
    "deep": r"\d+",
    "side": "1|2",
}
_ALIASES = (
    (r"^visual\.", f"{_VISION}."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", f"{_TEXT}."),
)
"""How published files, and those that transformers 4 wrote, spell the names."""


def make_table(vision: GridShape, *, tied: bool) -> Table:
    """The table of a model whose head is the token table (`tied`), or has a weight of its own."""
    norms = weights(_VISION + ".blocks.{layer}.{block_norm}", _BLOCKS + "/{block_norm}", "scale")
    rules: tuple[Rule, ...] = (
        *name_text(_TEXT),
        *_name_patches(vision),
        *dense(_VISION + ".blocks.{layer}.attn.{joint}", _BLOCKS + "/{joint}"),
        *(norms[:1] if vision.gated else norms),
        *dense(_VISION + ".blocks.{layer}.mlp.{feed}", _BLOCKS + "/{feed}"),
        *_name_mergers(vision),
    )
    if not tied:
        return Table(rules=(*rules, dense("lm_head", "language_model/lm_head")[0]), fields=_FIELDS, aliases=_ALIASES)
    ties, tokens = re.compile(re.escape(_HEAD)), f"{_TEXT}.embed_tokens.weight"
    return Table(rules=rules, fields=_FIELDS, aliases=_ALIASES, ties=ties, tied=tokens)


def _name_patches(vision: GridShape) -> tuple[Rule, ...]:
    """The rules of the product that is a convolution over frames, rows and columns in checkpoints."""

    def read(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(array), -1).T

    def write(array: np.ndarray) -> np.ndarray:
        return array.T.reshape(array.shape[1], -1, FRAMES, vision.patch, vision.patch)

    name, path = f"{_VISION}.patch_embed.proj", "vision_tower/patch_embed"
    if vision.gated:
        return (Rule(f"{name}.weight", f"{path}/kernel", read, write),)
    learned = Rule(f"{_VISION}.pos_embed.weight", "vision_tower/pos_embed/embedding")
    return *weights(name, path, "kernel", read, write), learned


def _name_mergers(vision: GridShape) -> tuple[Rule, ...]:
    """The rules of the mergers."""
    if vision.gated:
        return (
            Rule(f"{_VISION}.merger.ln_q.weight", f"{_MADE}/merger/norm/scale"),
            *dense(f"{_VISION}.merger.mlp.0", f"{_MADE}/merger/fc1"),
            *dense(f"{_VISION}.merger.mlp.2", f"{_MADE}/merger/fc2"),
        )
    one, deep = f"{_VISION}.merger", _VISION + ".deepstack_merger_list.{deep}"
    places = ((one, f"{_MADE}/merger"), (deep, _MADE + "/deepstack_{deep}"))
    return tuple(
        rule
        for name, path in places
        for rule in (
            *dense(name + ".linear_fc{side}", path + "/fc{side}"),
            *weights(f"{name}.norm", f"{path}/norm", "scale"),
        )
    )
