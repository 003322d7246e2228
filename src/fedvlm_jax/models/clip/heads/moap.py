"""The head of pFedMoAP (arXiv 2410.10114): a gate mixes the classes' embeddings under several soft prompts.

    logits_c = λ s ⟨I, T_0c⟩ + s ⟨pool(I), T̃_c⟩,    T̃_c = W_o MHA(W_q pool(I), W_k K_c, W_v K_c), K_c = pool(T_0c…T_Nc)

T_0 is of the client's own prompt, the others are its experts. `pool` takes every (E/W)-th number of an embedding. As in
the authors' code attention scores are multiplied by 10 and not divided by √d, there is no residual and what is mixed is
not brought back to length 1. Without an expert the logits are plain CLIP's under the own prompt.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedvlm_jax.errors import UserError

ABSENT = -1e9
"""The score of an expert who is not there."""


def pool(x: Float[Array, "*batch E"], width: int) -> Float[Array, "*batch W"]:
    """Take every (E / width)-th number.

    Raises:
        UserError: E is no multiple of the width.

    >>> pool(jnp.arange(6), 3).tolist()
    [0, 2, 4]
    """
    if x.shape[-1] % width:
        raise UserError(
            f"--method.gate-width {width}: the model's embeddings have {x.shape[-1]} numbers, no multiple of it"
        )
    return x[..., :: x.shape[-1] // width]


def logits(
    images: Float[Array, "B P E"], texts: Float[Array, "N C E"], leaves: Mapping[str, Any], scale: Float[Array, ""]
) -> Float[Array, "B C"]:
    """Compute logits; arguments are those of `Head`.

    Leaves: `gate`, with `query`, `key` and `value` [W, H, W/H] and `output` [W, W], each with its bias; `weight` is λ,
    `scaling` that of scores; `present` [N] says which experts are there, the own first; and, where texts are of the
    own prompt alone, `experts` [N-1, C, E], the embeddings under the others'.
    """
    gate, image = leaves["gate"], images[:, 0]
    experts = jnp.concatenate([texts, leaves["experts"]]) if "experts" in leaves else texts
    width, precision = gate["query"].shape[0], "highest"
    query, keys = pool(image, width), pool(experts, width)
    q = jnp.einsum("bw,whd->bhd", query, gate["query"], precision=precision) + gate["query_bias"]
    k, v = (jnp.einsum("ncw,whd->nchd", keys, gate[name], precision=precision) for name in ("key", "value"))
    # These biases move all scores of a query alike, or the logits of all classes: their gradients are 0, and AdamW
    # would make whole steps of the rounding of that.
    key_bias, value_bias, output_bias = (
        jax.lax.stop_gradient(gate[f"{name}_bias"]) for name in ("key", "value", "output")
    )
    k, v = k + key_bias, v + value_bias
    scores = jnp.einsum("bhd,nchd->bchn", q, k, precision=precision) * jax.lax.stop_gradient(leaves["scaling"])
    present = jax.lax.stop_gradient(leaves["present"]) > 0
    shares = jax.nn.softmax(jnp.where(present, scores, ABSENT), axis=-1)
    heads = jnp.einsum("bchn,nchd->bchd", shares, v, precision=precision)
    mixed = jnp.matmul(heads.reshape(*heads.shape[:2], width), gate["output"], precision=precision)
    local = scale * jnp.matmul(image, texts[0].T, precision=precision)
    gated = scale * jnp.einsum("bw,bcw->bc", query, mixed + output_bias, precision=precision)
    return jnp.where(present[1:].any(), jax.lax.stop_gradient(leaves["weight"]) * local + gated, local)
