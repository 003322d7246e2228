"""Names in InternVL's checkpoints: those of transformers' modules, and those that it saves and reads."""

import re

from fedvlm_jax.models.transformer_names import ALIASES, FIELDS, name_text
from fedvlm_jax.models.weight_table import Rule, Table, conv, dense, weights

_HEAD, _TEXT, _TOWER = "lm_head.weight", "model.language_model", "model.vision_tower"
_LAYER, _LAYER_PATH = _TOWER + ".encoder.layer.{layer}", "vision_tower/layers"

_RULES: tuple[Rule, ...] = (
    *conv(f"{_TOWER}.embeddings.patch_embeddings.projection", "vision_tower/patch_embedding"),
    Rule(f"{_TOWER}.embeddings.cls_token", "vision_tower/class_embedding", lambda x: x[0, 0], lambda x: x[None, None]),
    Rule(
        f"{_TOWER}.embeddings.position_embeddings", "vision_tower/position_embedding/embedding",
        lambda x: x[0], lambda x: x[None],
    ),
    *dense(_LAYER + ".attention.{biased}", _LAYER_PATH + "/self_attn/{biased}"),
    *dense(_LAYER + ".attention.projection_layer", _LAYER_PATH + "/self_attn/out_proj"),
    *dense(_LAYER + ".mlp.{wide}", _LAYER_PATH + "/mlp/{wide}"),
    *weights(_LAYER + ".layernorm_before", _LAYER_PATH + "/layer_norm1", "scale"),
    *weights(_LAYER + ".layernorm_after", _LAYER_PATH + "/layer_norm2", "scale"),
    Rule(_LAYER + ".{layer_scale}", _LAYER_PATH + "/{layer_scale}"),
    *weights(f"{_TOWER}.layernorm", "vision_tower/post_layernorm", "scale"),
    *weights("model.multi_modal_projector.layer_norm", "image_projector/layer_norm", "scale"),
    *dense("model.multi_modal_projector.{linear}", "image_projector/{linear}"),
    *name_text(_TEXT),
)  # fmt: skip
_FIELDS = {**FIELDS, "layer_scale": "lambda_[12]", "linear": "linear_[12]"}


def make_table(tied: bool) -> Table:
    """The table of a model whose head is the token table, or has a weight of its own."""
    if tied:
        ties = re.compile(re.escape(_HEAD))
        return Table(rules=_RULES, fields=_FIELDS, aliases=ALIASES, ties=ties, tied=f"{_TEXT}.embed_tokens.weight")
    head = dense("lm_head", "language_model/lm_head")[0]
    return Table(rules=(*_RULES, head), fields=_FIELDS, aliases=ALIASES)
