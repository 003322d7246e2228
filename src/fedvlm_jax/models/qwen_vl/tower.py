"""The towers of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1) and Qwen3-VL (arXiv 2511.21631), and their mergers.

Both turn patches by their row and column. The former has RMS norms, gated feed-forward parts and windows in most
layers, the latter learned positions, and gives out the states of some layers beside the last one's (DeepStack).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedvlm_jax.distributed.sharding import Cut, Cuts
from fedvlm_jax.models.causal_decoder import RmsNorm, Rotation, rotate
from fedvlm_jax.models.layers import HIDDEN, Norm, Stacking, activation, dot_attention, scanned, widen
from fedvlm_jax.models.qwen_vl.grid import blend_positions, cut_patches, number_windows, rotate_axes

EPSILON = 1e-6  # of all norms


@dataclass(frozen=True, kw_only=True)
class GridShape:
    """Sizes and options of a tower, as the family reads them off its configuration.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches a side that become one image token.
        width, heads, hidden, layers, activation: as of any transformer.
        made: width of an image token.
        theta: base of the rotary positions' wavelengths.
        gated: has it Qwen2.5-VL's layers, with RMS norms and gated feed-forward parts, or Qwen3-VL's?
        window: patches a side of a window; 0 for none.
        whole: layers that have no windows.
        learned: side of the grid of learned positions; 0 for none.
        deep: layers whose states are given out, too.
        deviation: of random weights.
    """

    patch: int
    merge: int
    width: int
    heads: int
    hidden: int
    layers: int
    activation: str
    made: int
    theta: float
    gated: bool
    window: int = 0
    whole: tuple[int, ...] = ()
    learned: int = 0
    deep: tuple[int, ...] = ()
    deviation: float = 0.02

    def norm(self, dtype: Any, name: str) -> nn.Module:
        """Make a norm."""
        return RmsNorm(EPSILON, dtype, name=name) if self.gated else Norm(dtype, EPSILON, name=name)

    def dense(self, dtype: Any) -> Callable[..., nn.Module]:
        """Make products, of a width and a name."""
        return partial(nn.Dense, dtype=dtype, kernel_init=nn.initializers.normal(self.deviation))


class Places(NamedTuple):
    """Where the patches [N] of a picture lie, or [B, N] of several that are filled up to a length.

    Attributes:
        taps, weights: [..., N, 4], of learned positions; None where none are learned.
        cos, sin: [..., N, d], of rotary angles.
        windows: number of a patch's window; None where there are none. Padding lies in none, -1.
        real: false of padding; None where there is none.
    """

    taps: Any
    weights: Any
    cos: Any
    sin: Any
    windows: Any
    real: Any = None


def place_patches(vision: GridShape, rows: int, columns: int) -> Places:
    """Make the places of a picture that has so many rows and columns of patches."""
    merge = vision.merge
    taps, weights = blend_positions(rows, columns, merge, vision.learned) if vision.learned else (None, None)
    cos, sin = rotate_axes(rows, columns, merge, vision.width // vision.heads, vision.theta)
    windows = number_windows(rows, columns, merge, vision.window) if vision.window else None
    return Places(taps, weights, cos, sin, windows)


def place_on_grid(vision: GridShape, rows: int, columns: int, length: int) -> Places:
    """Make the places of a picture of so many rows and columns of image tokens, filled up to `length` patches."""
    places = place_patches(vision, rows * vision.merge, columns * vision.merge)
    missing = length - len(places.cos)

    def fill(leaf: np.ndarray | None, value: int = 0) -> np.ndarray | None:
        if leaf is None:
            return None
        return np.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)], constant_values=value)

    taps, weights, cos, sin = (fill(leaf) for leaf in places[:4])
    return Places(taps, weights, cos, sin, fill(places.windows, -1), np.arange(length) < length - missing)


class Block(nn.Module):
    """One layer: attention of the patches of a picture, or of a window where `windows` is given and `whole` is not set.

    `padding` is added to the scores of layers without windows. States go through with those of `deep` layers [K, B, N,
    D], which the layer puts its own into if it is one of them, at `slot`.
    """

    vision: GridShape
    dtype: Any

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array],
        whole: Array,
        slot: Array,
        rotation: Rotation,
        windows: Array | None,
        padding: Array | None,
    ) -> tuple[tuple[Array, Array], None]:
        vision, dense = self.vision, self.vision.dense(self.dtype)
        x, deep = carry
        qkv = dense(3 * vision.width, name="qkv")(vision.norm(self.dtype, "norm1")(x))
        qkv = qkv.reshape(*x.shape[:2], 3, vision.heads, -1).transpose(2, 0, 3, 1, 4)
        query, key = (rotate(widen(part), rotation).astype(self.dtype) for part in qkv[:2])
        bias = padding if windows is None else jnp.where(whole, 0.0 if padding is None else padding, windows)
        x = x + dense(vision.width, name="proj")(dot_attention(query, key, qkv[2], bias))
        x = x + self._feed(vision.norm(self.dtype, "norm2")(x))
        if vision.deep:
            deep = jnp.where((jnp.arange(len(deep)) == slot)[:, None, None, None], x, deep)
        return (x, deep), None

    def _feed(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        vision, dense = self.vision, self.vision.dense(self.dtype)
        turn = activation(vision.activation)
        if not vision.gated:
            return dense(vision.width, name="linear_fc2")(turn(dense(vision.hidden, name="linear_fc1")(x)))
        gate = turn(dense(vision.hidden, name="gate_proj")(x))
        return dense(vision.width, name="down_proj")(gate * dense(vision.hidden, name="up_proj")(x))


class GridTower(nn.Module):
    """A tower from pictures [B, H, W, 3] to states of their patches [1 + K, B, N, D], the last layer's first.

    With `places`, pictures on grids of their own are given as patches [B, N, F].
    """

    vision: GridShape
    dtype: Any
    stacking: Stacking

    @nn.compact
    def __call__(self, pictures: Float[Array, "B ..."], places: Places | None = None) -> Float[Array, "K B N D"]:
        vision, patches = self.vision, pictures.astype(self.dtype)
        if places is None:
            places = place_patches(vision, *(length // vision.patch for length in pictures.shape[1:3]))
            patches = cut_patches(patches, vision.patch, vision.merge)
        dense = vision.dense(self.dtype)
        x: Array = dense(vision.width, use_bias=not vision.gated, name="patch_embed")(patches)
        if vision.learned:
            init = nn.initializers.normal(vision.deviation)
            table = nn.Embed(vision.learned**2, vision.width, dtype=self.dtype, embedding_init=init, name="pos_embed")
            x = x + (widen(table(jnp.asarray(places.taps))) * places.weights[..., None]).sum(-2).astype(self.dtype)
        windows, padding = _hide(places)
        layers, count = np.arange(vision.layers), len(vision.deep)
        slots = [vision.deep.index(layer) if layer in vision.deep else count for layer in layers]
        whole = jnp.asarray(np.isin(layers, vision.whole))
        axes = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
        blocks = scanned(Block, vision.layers, axes, self.stacking)(vision, self.dtype, name="blocks")
        deep = jnp.zeros((count, *x.shape), x.dtype)
        turns = (jnp.asarray(turn) for turn in (places.cos, places.sin))
        rotation = Rotation(*(turn[None, None] if turn.ndim == 2 else turn[:, None] for turn in turns))
        (x, deep), _ = blocks((x, deep), whole, jnp.asarray(slots), rotation, windows, padding)
        return jnp.concatenate([x[None], deep])


def _hide(places: Places) -> tuple[Array | None, Array | None]:
    """Numbers to add to scores: 0 where a patch is in the same window; and 0 where it is none of the padding."""
    padding = None if places.real is None else jnp.where(places.real, 0.0, HIDDEN)[:, None, None]
    numbers = places.windows
    if numbers is None or (padding is None and not numbers.any()):
        return None, padding
    # Made on the device: as a constant of the program it would have as many numbers as patches squared.
    near = jnp.asarray(numbers)[..., None] == (numbers if padding is None else numbers[:, None])
    windows = jnp.where(near, 0.0, HIDDEN)
    return windows if padding is None else windows[:, None], padding


class Merger(nn.Module):
    """Two products that make an image token of the states of a block of patches; `late`: they are normed as one."""

    vision: GridShape
    dtype: Any
    late: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B P E"]:
        vision, dense = self.vision, self.vision.dense(self.dtype)
        wide, norm = vision.width * vision.merge**2, vision.norm(self.dtype, "norm")
        x = (x if self.late else norm(x)).reshape(len(x), -1, wide)
        x = norm(x) if self.late else x
        return dense(vision.made, name="fc2")(jax.nn.gelu(dense(wide, name="fc1")(x), approximate=False))


class Mergers(nn.Module):
    """A merger for each of the tower's states [1 + K, B, N, D], their image tokens side by side [B, P, (1 + K)·E]."""

    vision: GridShape
    dtype: Any

    @nn.compact
    def __call__(self, states: Float[Array, "K B N D"]) -> Float[Array, "B P E"]:
        made = [Merger(self.vision, self.dtype, name="merger")(states[0])]
        for number, state in enumerate(states[1:]):
            made.append(Merger(self.vision, self.dtype, late=True, name=f"deepstack_{number}")(state))
        return jnp.concatenate(made, -1)


def cut_grid_tower(vision: GridShape) -> Cuts:
    """Cut tower and mergers over devices: columns of a pair's first product, rows of its second.

    Attention stays whole, whose queries, keys and values come from one product.
    """
    block = "vision_tower/blocks"
    first, second = ("(gate|up)_proj", "down_proj") if vision.gated else ("linear_fc1", "linear_fc2")
    return (
        Cut(rf"{block}/{first}/(kernel|bias)", (-1,)),
        Cut(rf"{block}/{second}/kernel", (-2,)),
        Cut(r"image_projector/\w+/fc1/(kernel|bias)", (-1,)),
        Cut(r"image_projector/\w+/fc2/kernel", (-2,)),
    )
