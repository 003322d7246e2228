"""Names in the checkpoints of SmolVLM and Idefics3, which are those of transformers' modules."""

import re

from fedvlm_jax.models.transformer_names import FIELDS, name_text, name_tower
from fedvlm_jax.models.weight_table import Rule, Table, dense

_HEAD, _TEXT = "lm_head.weight", "model.text_model"

_RULES: tuple[Rule, ...] = (
    *name_tower("model.vision_model"),
    dense("model.connector.modality_projection.proj", "image_projector/proj")[0],
    *name_text(_TEXT),
)


def make_table(tied: bool) -> Table:
    """The table of a model whose head is the token table, or has a weight of its own."""
    if tied:
        ties = re.compile(re.escape(_HEAD))
        return Table(rules=_RULES, fields=FIELDS, ties=ties, tied=f"{_TEXT}.embed_tokens.weight")
    return Table(rules=(*_RULES, dense("lm_head", "language_model/lm_head")[0]), fields=FIELDS)
