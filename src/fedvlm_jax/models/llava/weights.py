"""Names in the checkpoints of LLaVA and LLaVA-OneVision.

The table has the names of transformers' modules. Files of the hub have others, and so has what transformers 5 saves:
`language_model.model.layers…`, `vision_tower.vision_model.encoder…`, `language_model.lm_head`.
"""

import re
from typing import Any

from fedvlm_jax.models.llava.config import has_newline, read_tower
from fedvlm_jax.models.transformer_names import ALIASES, FIELDS, name_text, name_tower
from fedvlm_jax.models.weight_table import Rule, Table, dense

_TEXT, _TOWER, _PROJECTOR = "model.language_model", "model.vision_tower", "model.multi_modal_projector"


def make_table(config: Any) -> Table:
    """The table of a configuration.

    Image tokens are taken from a layer of the tower. What comes behind it is in the files and never read: the layers
    after that one, the norm after the last, and SigLIP's head.
    """
    tower, layers = read_tower(config), config.vision_config.num_hidden_layers
    behind = "|".join(map(str, range(tower.layers, layers))) or "(?!)"
    rules: tuple[Rule, ...] = (
        *name_tower(_TOWER, class_token=tower.class_token),
        *dense(f"{_PROJECTOR}.linear_1", "image_projector/linear_1"),
        *dense(f"{_PROJECTOR}.linear_2", "image_projector/linear_2"),
        *([Rule("model.image_newline", "image_projector/image_newline")] if has_newline(config) else []),
        *name_text(_TEXT),
        *([] if config.tie_word_embeddings else dense("lm_head", "language_model/lm_head")[:1]),
    )
    return Table(
        rules=rules,
        fields=FIELDS,
        aliases=ALIASES,
        ties=re.compile(r"lm_head\.weight" if config.tie_word_embeddings else "(?!)"),
        tied=f"{_TEXT}.embed_tokens.weight" if config.tie_word_embeddings else "",
        unread=re.compile(rf"{re.escape(_TOWER)}\.(encoder\.layers\.({behind})|post_layernorm|head)\..+"),
    )
