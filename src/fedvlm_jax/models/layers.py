"""Small pieces that the vision tower and the language model share: norms, activations, attention, scanned stacks.

Everything that carries a weight matrix is exactly `nn.Dense`, `nn.Conv` or `nn.Embed`, because those are the types to
which `fedvlm_jax.lora` can add an adapter. Norms and softmax are computed in float32, whatever narrower type the rest
is computed in; where that is float64, in float64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.products import mix, score

# Added to a score to hide a key. Finite, so that a row whose keys are all hidden gives numbers and not NaN.
HIDDEN = -1e9


class Stacking(NamedTuple):
    """Settings for running a stack of like layers; numbers are the same to rounding.

    Attributes:
        remat: the inside of a layer is computed again in the backward pass instead of kept.
        unroll: stacks of up to so many layers are written out one after another; longer ones are a scan, which compiles
            once whatever their length, but writes down what the backward pass needs of every layer and reads it back:
            a sixth of a training step of the shipped model on a CPU, a twentieth at Florence-2-base's shape.
    """

    remat: bool = False
    unroll: int = 3


USUAL = Stacking()

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Look up the activation that Hugging Face calls `name`; refuse others, with a list of those that are known.

    Raises:
        UserError: for a name that is not known here; the message lists those that are.

    >>> activation("relu")(jnp.asarray([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"activation {name!r} is not supported; known are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def widen(x: Array) -> Array:
    """In float32, or in float64 if it is that.

    >>> widen(jnp.ones(1, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Norm(nn.Module):
    """Layer norm over the last axis in float32 at least (epsilon by default PyTorch's), cast back to `dtype`."""

    dtype: Any = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = widen(x)
        centred = wide - wide.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.epsilon)
        return (centred * inverse * widen(scale) + widen(bias)).astype(self.dtype)


class Mlp(nn.Module):
    """Feed-forward part of a tower's layers: a product to `hidden` numbers, the activation, and a product back."""

    hidden: int
    activation: str
    deviation: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(self.deviation))
        wide = activation(self.activation)(dense(self.hidden, name="fc1")(x))
        return dense(x.shape[-1], name="fc2")(wide)


def multiply(indices: str, left: Array, right: Array) -> Array:
    """`einsum` of scores: what narrow types multiply is summed and kept in float32."""
    kind = jnp.promote_types(jnp.result_type(left, right), jnp.float32)
    return jnp.einsum(indices, left, right, preferred_element_type=kind)


def softmax(scores: Float[Array, "... S"], dtype: Any) -> Float[Array, "... S"]:
    """Softmax over the last axis in float32 at least, cast to `dtype`.

    >>> softmax(jnp.zeros(2), jnp.float32).tolist()
    [0.5, 0.5]
    """
    return jax.nn.softmax(widen(scores), axis=-1).astype(dtype)


def dot_attention(
    query: Float[Array, "N H T d"], key: Float[Array, "N H S d"], value: Float[Array, "N H S d"],
    bias: Array | None = None,
) -> Float[Array, "N T D"]:  # fmt: skip
    """Scaled dot-product attention with heads joined again at the end; `bias` is added to the scores.

    Heads come before positions: XLA's CPU backend multiplies batches of contiguous matrices several times faster than
    strided ones, and keys that are kept are laid out so once.
    """
    scores = score(query * query.shape[-1] ** -0.5, key)
    weights = softmax(scores if bias is None else scores + bias, value.dtype)
    mixed = mix(weights, value).transpose(0, 2, 1, 3)
    return mixed.reshape(*mixed.shape[:2], -1)


def scanned(layer: type[nn.Module], length: int, in_axes: tuple[Any, ...], stacking: Stacking) -> Callable[..., Any]:
    """`layer` repeated `length` times: parameters, and adapters, get a leading layer axis [L, ...]."""
    unrolled = length <= stacking.unroll
    # Only a scan keeps XLA from finding the second computation to be the first again.
    body = nn.remat(layer, prevent_cse=unrolled) if stacking.remat else layer
    scan: Any = nn.scan  # its annotations ask for less than it takes
    axes, unroll = {"params": 0, "lora": 0}, length if unrolled else 1
    return scan(
        body, variable_axes=axes, split_rngs={"params": True}, in_axes=in_axes, length=length, unroll=unroll,
        check_constancy_invariants=False,  # tracing every layer a second time would only show that nothing is broadcast
    )  # fmt: skip


def place_features(
    embedded: Float[Array, "B T D"], features: Float[Array, "B P D"], is_image: Array
) -> Float[Array, "B T D"]:
    """Replace the n-th image token of every row by the row's n-th feature; surplus image tokens repeat the last.

    >>> place_features(jnp.zeros((1, 3, 1)), jnp.asarray([[[7.0], [8.0]]]), jnp.asarray([[True, False, True]])).tolist()
    [[[7.0], [0.0], [8.0]]]
    """
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
    return jnp.where(is_image[..., None], jnp.take_along_axis(features, order[..., None], axis=1), embedded)


def take_last(prompts: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """The state after each prompt's last token; of a row without any, that of its first padding."""
    last = jnp.maximum(mask.sum(-1) - 1, 0)
    return jnp.take_along_axis(prompts, last[:, None, None], 1)[:, 0]
