"""Names in Florence-2's checkpoints: those that transformers writes, with `model.` before them or not, or Microsoft's.

The tables that are tied to the token table, the head and two constant buffers may be there or not; where they are they
must hold what the model uses.
"""

import math
import re
from typing import Any

import numpy as np

from fedvlm_jax.models.florence2.microsoft_layout import ALIASES, RULES
from fedvlm_jax.models.weight_table import Constant, Rule, Table, conv, dense, weights

_FIELDS = {
    "stage": r"\d+",
    "half": r"spatial_block|channel_block",
    "conv": r"conv[12]",
    "visual": r"window_attn.qkv|window_attn.proj|channel_attn.qkv|channel_attn.proj|ffn.fc1|ffn.fc2",
    "visual_norm": r"norm[12]",
    "axis": r"row_embeddings|column_embeddings",
    "side": r"encoder|decoder",
    "dense": r"(?:self_attn|encoder_attn).(?:q|k|v|out)_proj|fc1|fc2",
    "norm": r"(?:self_attn|encoder_attn|final)_layer_norm",
}
_CONV, _BLOCK = "vision_tower.convs.{stage}", "vision_tower.blocks.{stage}.{layer}.{half}"
_CONVS, _BLOCKS = "vision_tower/convs_{stage}", "vision_tower/blocks_{stage}/{half}"
_PROJECTOR, _SIDE = "multi_modal_projector", "language_model.{side}"
_TOKENS = "language_model.shared.weight"


_RULES: tuple[Rule, ...] = (
    *conv(f"{_CONV}.conv", f"{_CONVS}/conv"),
    *weights(f"{_CONV}.norm", f"{_CONVS}/norm", "scale"),
    *conv(_BLOCK + ".{conv}", _BLOCKS + "/{conv}"),
    *weights(_BLOCK + ".{visual_norm}", _BLOCKS + "/{visual_norm}", "scale"),
    *dense(_BLOCK + ".{visual}", _BLOCKS + "/{visual}"),
    dense(f"{_PROJECTOR}.image_projection", "image_projector/image_projection")[0],
    *weights(f"{_PROJECTOR}.image_proj_norm", "image_projector/image_proj_norm", "scale"),
    Rule(_PROJECTOR + ".image_position_embed.{axis}.weight", "image_projector/{axis}/embedding"),
    Rule(_TOKENS, "language_model/shared/embedding"),
    Rule(f"{_SIDE}.embed_positions.weight", "language_model/{side}/embed_positions/embedding"),
    *weights(f"{_SIDE}.layernorm_embedding", "language_model/{side}/layernorm_embedding", "scale"),
    *weights(_SIDE + ".layers.{layer}.{norm}", "language_model/{side}/layers/{norm}", "scale"),
    *dense(_SIDE + ".layers.{layer}.{dense}", "language_model/{side}/layers/{dense}"),
)
_TIES = re.compile(
    r"(?:language_model\.)?lm_head\.weight|shared\.weight"
    r"|(?:language_model\.)?(?:(?:encoder|decoder)\.)?embed_tokens\.weight"
)


def temporal_embedding(length: int, width: int) -> np.ndarray:
    """Sine in even and cosine in odd columns, wavelengths geometric up to 10000: float32 [length, width].

    >>> temporal_embedding(1, 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    frequency = np.exp(np.arange(width // 2, dtype=np.float32) * np.float32(-math.log(10000) / (width // 2)))
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, -1).astype(np.float32)


def _is_temporal(tensor: np.ndarray) -> bool:
    even = tensor.ndim == 2 and tensor.shape[1] >= 2 and tensor.shape[1] % 2 == 0
    # Files in bfloat16 hold three digits.
    return even and np.allclose(tensor.astype(np.float32), temporal_embedding(*tensor.shape), atol=1e-2)


def make_table(config: Any) -> Table:
    """The table of a `Florence2Config`, which decides the size of one constant."""
    length, width = config.vision_config.max_temporal_embeddings, config.vision_config.embed_dim[-1]
    return Table(
        rules=(*_RULES, *RULES),
        fields=_FIELDS,
        prefix="model.",
        aliases=ALIASES,
        ties=_TIES,
        tied=_TOKENS,
        constants={
            f"{_PROJECTOR}.visual_temporal_embed.pos_idx_to_embed": Constant(
                _is_temporal, lambda: temporal_embedding(length, width)
            ),
            "language_model.final_logits_bias": Constant(lambda tensor: not np.any(tensor)),
        },
        lookups=("model.language_model.decoder.embed_tokens",),
        counted=re.compile(r"language_model\.(en|de)coder\.embed_positions\.weight"),
    )
