"""Names that transformers gives to the parts which families share: a vision transformer and a Llama-like text model."""

from fedvlm_jax.models.weight_table import Rule, conv, dense, weights

FIELDS = {
    "attention": r"q_proj|k_proj|v_proj|out_proj|o_proj",
    "biased": r"q_proj|k_proj|v_proj",
    "wide": r"fc1|fc2|gate_proj|up_proj|down_proj",
    "visual_norm": r"layer_norm[12]",
    "text_norm": r"input_layernorm|post_attention_layernorm|(pre|post)_feedforward_layernorm",
    "head_norm": r"q_norm|k_norm",
}
"""What stands for the names in braces: `fields` of a `Table` with these rules."""

ALIASES = (
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(language_model|vision_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^model\.language_model\.model\.", "model.language_model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
"""LLaVA's and Gemma's spellings on the hub, and those of transformers 5 when it saves, for the names of its modules."""


def name_layers(name: str, path: str) -> tuple[Rule, ...]:
    """The rules of a stack of `vision_transformer.Layer`s.

    >>> name_layers("text_model.encoder.layers", "text_model/layers")[0].path
    'text_model/layers/self_attn/{attention}/kernel'
    """
    return (
        *dense(name + ".{layer}.self_attn.{attention}", path + "/self_attn/{attention}"),
        *dense(name + ".{layer}.mlp.{wide}", path + "/mlp/{wide}"),
        *weights(name + ".{layer}.{visual_norm}", path + "/{visual_norm}", "scale"),
    )


def name_tower(name: str, path: str = "vision_tower", *, class_token: bool = False) -> tuple[Rule, ...]:
    """The rules of a `VisionTransformer`: of SigLIP's, or with a class token of CLIP's, `pre_layrnorm` [sic].

    >>> name_tower("model.vision_tower")[0].name
    'model.vision_tower.embeddings.patch_embedding.weight'
    """
    first: tuple[Rule, ...] = ()
    if class_token:
        first = (
            Rule(f"{name}.embeddings.class_embedding", f"{path}/class_embedding"),
            *weights(f"{name}.pre_layrnorm", f"{path}/pre_layernorm", "scale"),
        )
    return (
        *conv(f"{name}.embeddings.patch_embedding", f"{path}/patch_embedding"),
        *first,
        Rule(f"{name}.embeddings.position_embedding.weight", f"{path}/position_embedding/embedding"),
        *name_layers(f"{name}.encoder.layers", f"{path}/layers"),
        *weights(f"{name}.post_layernorm", f"{path}/post_layernorm", "scale"),
    )


def name_text(name: str, path: str = "language_model") -> tuple[Rule, ...]:
    """The rules of a `CausalDecoder`, but for a head that has a weight of its own.

    >>> name_text("model.text_model")[0].name
    'model.text_model.embed_tokens.weight'
    """
    layers = f"{path}/layers"
    kernel, _ = dense(name + ".layers.{layer}.self_attn.{attention}", layers + "/self_attn/{attention}")
    _, bias = dense(name + ".layers.{layer}.self_attn.{biased}", layers + "/self_attn/{biased}")
    return (
        Rule(f"{name}.embed_tokens.weight", f"{path}/embed_tokens/embedding"),
        kernel,
        bias,
        dense(name + ".layers.{layer}.mlp.{wide}", layers + "/mlp/{wide}")[0],
        Rule(name + ".layers.{layer}.{text_norm}.weight", layers + "/{text_norm}/scale"),
        Rule(name + ".layers.{layer}.self_attn.{head_norm}.weight", layers + "/self_attn/{head_norm}/scale"),
        Rule(f"{name}.norm.weight", f"{path}/norm/scale"),
    )
