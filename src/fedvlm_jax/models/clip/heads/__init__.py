"""Heads of a model that chooses among classes: from embeddings to logits otherwise than by one cosine.

An adapter that has leaves below `head/NAME` is compared by the file NAME here, whose `logits` reads them. So an adapter
says itself how it is used, in training as in evaluation, and a new head is a new file.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError

HEAD = "head"
"""Where an adapter has the leaves of its head."""

_SMALL = 1e-30  # of a squared length, so that an embedding of zeros gives zeros and not NaN


class Head(Protocol):
    """Compute logits [B, C] of pictures and classes.

    Args:
        images: embeddings [B, P, E] of length 1, that of the whole picture first; the others, of its patches, only
            where the method asks for them (`Method.patches`).
        texts: embeddings [N, C, E] of length 1 of the classes, one for each of the adapter's N soft prompts.
        leaves: of the adapter below `head/NAME`.
        scale: the factor of cosines, which the model learned.
    """

    def __call__(
        self,
        images: Float[Array, "B P E"],
        texts: Float[Array, "N C E"],
        leaves: Mapping[str, Any],
        scale: Float[Array, ""],
    ) -> Float[Array, "B C"]: ...


def split_head(adapter: lora.Adapter | None) -> tuple[Head | None, Mapping[str, Any], lora.Adapter | None]:
    """Split an adapter into its head, the head's leaves, and what sits in the towers.

    Raises:
        UserError: there is no such head, or there are several.

    >>> split_head({"text_model": {"fc": {"a": 1}}})
    (None, {}, {'text_model': {'fc': {'a': 1}}})
    """
    if not adapter or HEAD not in adapter:
        return None, {}, adapter
    heads = adapter[HEAD]
    names = list(heads)
    known = len(names) == 1 and names[0].isidentifier() and importlib.util.find_spec(f"{__name__}.{names[0]}")
    if not known:
        raise UserError(f"the adapter's head is {', '.join(names)}: it must be one file of models/clip/heads")
    head = importlib.import_module(f"{__name__}.{names[0]}").logits
    towers = {name: part for name, part in adapter.items() if name != HEAD}
    return head, heads[names[0]], towers or None


def normalise(x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """Bring embeddings to length 1; one of zeros stays.

    >>> normalise(jnp.asarray([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), _SMALL))
