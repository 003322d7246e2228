"""Names in CLIP's checkpoints, which are those of transformers' modules.

Files of the hub hold the numbers of positions, too, which the model counts itself.
"""

from typing import Any

import numpy as np

from fedvlm_jax.models.clip.config import read_tower
from fedvlm_jax.models.transformer_names import FIELDS, name_layers, name_tower
from fedvlm_jax.models.weight_table import Constant, Rule, Table, dense, weights

_TEXT = "text_model"

_RULES: tuple[Rule, ...] = (
    *name_tower("vision_model", class_token=True),
    dense("visual_projection", "visual_projection")[0],
    Rule(f"{_TEXT}.embeddings.token_embedding.weight", f"{_TEXT}/token_embedding/embedding"),
    Rule(f"{_TEXT}.embeddings.position_embedding.weight", f"{_TEXT}/position_embedding/embedding"),
    *name_layers(f"{_TEXT}.encoder.layers", f"{_TEXT}/layers"),
    *weights(f"{_TEXT}.final_layer_norm", f"{_TEXT}/final_layer_norm", "scale"),
    dense("text_projection", "text_projection")[0],
    Rule("logit_scale", "logit_scale"),
)


def make_table(config: Any) -> Table:
    """The table of a `CLIPConfig`, which decides how many positions there are."""
    counts = {"text_model": config.text_config.max_position_embeddings, "vision_model": read_tower(config).tokens}
    return Table(
        rules=_RULES,
        fields=FIELDS,
        constants={f"{name}.embeddings.position_ids": _count_up_to(count) for name, count in counts.items()},
    )


def _count_up_to(count: int) -> Constant:
    return Constant(lambda tensor: np.array_equal(tensor.reshape(-1), np.arange(count)))
