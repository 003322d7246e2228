"""What one more client takes of a device, as the compiler says: a wave of n + 1 clients against one of n."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedvlm_jax.models import Vlm
from harness.ours import Ours
from harness.world import SETTINGS, Settings, Shape, World, start_factors


def measure_clients(
    vlm: Vlm,
    params: Any,
    shape: Shape,
    *,
    size: tuple[int, int],
    prompt: int,
    answer: int,
    wide: int = 4,
    settings: Settings = SETTINGS,
) -> dict[str, float]:
    """Compile rounds of 1, `wide` and `wide` + 1 clients side by side, vision cached, and run none.

    Args:
        vlm, params: the model.
        shape: local steps and batch size; its number of clients is not looked at.
        size, prompt, answer: of the data, as for `world.draw_world`.
        wide: clients of the wave to which one is added.
        settings: of the adapter.

    Returns:
        Bytes: `alone`, of a round of one client beside the base's weights that it reads; `marginal`, of the client
        after `wide`; and `marginal_over_alone`.
    """

    def measure(clients: int) -> Ours:
        world = _blank(vlm, Shape(clients, shape.steps, shape.batch), size, prompt, answer, settings)
        return Ours(vlm, params, world, "cached", clients)

    alone, narrow, wider = (measure(clients).measure_without_base() for clients in (1, wide, wide + 1))
    marginal = wider - narrow
    return {"alone": alone, "marginal": marginal, "marginal_over_alone": round(marginal / alone, 3)}


def _blank(vlm: Vlm, shape: Shape, size: tuple[int, int], prompt: int, answer: int, settings: Settings) -> World:
    """A world of zeros: only its shapes are of interest."""
    rows, tokens = (shape.clients, shape.steps * shape.batch), vlm.image_tokens(*size)
    ids = np.zeros((*rows, tokens + prompt), np.int32)
    features = jax.eval_shape(
        lambda params, pixels: vlm.image_features(params, None, pixels),
        vlm.shapes(),
        jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),
    )
    examples = {
        "image_features": np.zeros((*rows, *features.shape[1:]), np.float32),
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": np.zeros((*rows, answer), np.int32),
    }
    indices = np.zeros((shape.clients, shape.steps, shape.batch), np.int32)
    weights = np.full(shape.clients, 1 / shape.clients, np.float32)
    return World(shape, examples, indices, weights, start_factors(vlm, settings), settings, {})
