"""Names in the checkpoints of SmolVLM and Idefics3, which are those of transformers' modules."""

import re

from fedvlm_jax.models.weight_table import Rule, Table, conv, dense, weights

_FIELDS = {
    "attention": r"q_proj|k_proj|v_proj|out_proj|o_proj",
    "wide": r"fc1|fc2|gate_proj|up_proj|down_proj",
    "visual_norm": r"layer_norm[12]",
    "text_norm": r"input_layernorm|post_attention_layernorm",
}
_VISION, _TEXT = "model.vision_model", "model.text_model"
_TOWER, _LAYERS = "vision_tower/layers", "language_model/layers"
_HEAD, _TOKENS = "lm_head.weight", f"{_TEXT}.embed_tokens.weight"

_RULES: tuple[Rule, ...] = (
    *conv(f"{_VISION}.embeddings.patch_embedding", "vision_tower/patch_embedding"),
    Rule(f"{_VISION}.embeddings.position_embedding.weight", "vision_tower/position_embedding/embedding"),
    *dense(_VISION + ".encoder.layers.{layer}.self_attn.{attention}", _TOWER + "/self_attn/{attention}"),
    *dense(_VISION + ".encoder.layers.{layer}.mlp.{wide}", _TOWER + "/mlp/{wide}"),
    *weights(_VISION + ".encoder.layers.{layer}.{visual_norm}", _TOWER + "/{visual_norm}", "scale"),
    *weights(f"{_VISION}.post_layernorm", "vision_tower/post_layernorm", "scale"),
    dense("model.connector.modality_projection.proj", "image_projector/proj")[0],
    Rule(_TOKENS, "language_model/embed_tokens/embedding"),
    dense(_TEXT + ".layers.{layer}.self_attn.{attention}", _LAYERS + "/self_attn/{attention}")[0],
    dense(_TEXT + ".layers.{layer}.mlp.{wide}", _LAYERS + "/mlp/{wide}")[0],
    Rule(_TEXT + ".layers.{layer}.{text_norm}.weight", _LAYERS + "/{text_norm}/scale"),
    Rule(f"{_TEXT}.norm.weight", "language_model/norm/scale"),
)


def make_table(tied: bool) -> Table:
    """The table of a model whose head is the token table, or has a weight of its own."""
    if tied:
        return Table(rules=_RULES, fields=_FIELDS, ties=re.compile(re.escape(_HEAD)), tied=_TOKENS)
    return Table(rules=(*_RULES, dense("lm_head", "language_model/lm_head")[0]), fields=_FIELDS)
