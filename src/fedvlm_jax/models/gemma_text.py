"""What PaliGemma and Gemma 3 share: Gemma's text model (arXiv 2403.08295, 2408.00118, 2503.19786) and names."""

import re
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.configuration import VOCABULARY, read_positive, read_reach, read_text_shape, require
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.text_shape import TextShape
from fedvlm_jax.models.transformer_names import ALIASES, FIELDS, name_text, name_tower
from fedvlm_jax.models.weight_table import Rule, Table

PROJECTOR = "model.multi_modal_projector"
_TEXT = "model.language_model"


def read_gemma_shape(text: Any, **options: Any) -> TextShape:
    """Read the `text_config` of any Gemma.

    Args:
        options: further fields of `TextShape`.

    Raises:
        UserError: as `read_text_shape`, or for what is not implemented.
    """
    require("text_config", text, {"attention_bias": (False,)})
    shifted = {"shifted_norms": True, "multiplier": text.hidden_size**0.5, **options}
    return read_text_shape(text, tied=True, **shifted)


def read_local_layers(text: Any) -> dict[str, Any]:
    """Read what Gemma 2 has beyond the first: local layers, norms after sub-layers, another scale of scores.

    Raises:
        UserError: kinds of layers that are not known, or a window or a scale that no model has.
    """
    kinds = tuple(text.layer_types)
    if set(kinds) - {"full_attention", "sliding_attention"} or len(kinds) != text.num_hidden_layers:
        raise UserError(
            f"text_config.layer_types must say for each of {text.num_hidden_layers} layers whether it is "
            "'full_attention' or 'sliding_attention'"
        )
    scale = read_positive("text_config.query_pre_attn_scalar", text.query_pre_attn_scalar) ** -0.5
    local = tuple(kind == "sliding_attention" for kind in kinds)
    options: dict[str, Any] = {"norms_after": True, "scale": scale}
    if any(local):
        require_integer("text_config.sliding_window", text.sliding_window, 1, VOCABULARY)
        rope = dict(text.rope_parameters or {})
        reach = read_reach(rope.get("sliding_attention", rope), text.sliding_window)
        options |= {"local": reach, "local_layers": local}
    return options


def make_table(*projector: Rule) -> Table:
    """The table of a model with these rules for its projector.

    Its head is the token table, and what SigLIP's own head, which some files hold, makes of all patches is not read.
    """
    return Table(
        rules=(*name_tower("model.vision_tower"), *projector, *name_text(_TEXT)),
        fields=FIELDS,
        aliases=ALIASES,
        ties=re.compile(r"lm_head\.weight"),
        tied=f"{_TEXT}.embed_tokens.weight",
        unread=re.compile(r"model\.vision_tower\.head\..+"),
    )
