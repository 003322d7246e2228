"""The records that a family of vision-language models is to the rest of the package: facts and pure functions.

`Vlm` says what a batch holds and what a model computes of it, `Processor` how text and pictures become arrays.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from PIL import Image

from fedvlm_jax import lora
from fedvlm_jax.data.prompts import Grid, Prompt, Tiles
from fedvlm_jax.distributed.sharding import Cuts
from fedvlm_jax.models.beam_search import Settings
from fedvlm_jax.models.weight_table import Table
from fedvlm_jax.utils import tree

Params = dict[str, Any]
Batch = Mapping[str, Any]
"""Arrays by name; `memory` may be a pytree of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GridVision:
    """The vision of a model whose pictures may have grids of their own, for frozen towers.

    Axes: N patches, F numbers of a patch.

    Attributes:
        pixels, patches: of a picture, that become an image token.
        places: (rows and columns of image tokens, N) -> a pytree of arrays [N, …]: where a picture's patches lie, those
            after its last being told apart as padding.
        features: (params, patches [B, N, F], places [B, N, …]) -> image tokens [B, N / patches, D], those of a picture
            first and in their order; what padding makes means nothing.
    """

    pixels: int
    patches: int
    places: Callable[[int, int, int], PyTree]
    features: Callable[[Params, Array, PyTree], Array]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Vlm:
    """A vision-language model. All functions are pure and work under jit, vmap and grad; compared by identity.

    Axes: B batch, A answers, T tokens, P image tokens, D width, V vocabulary, U labels.

    A *batch* is a dict of arrays:
        pixel_values    [B, H, W, 3] float32, normalised as the model's processor does, or [B, N, H, W, 3] where a row
                        has several pictures or tiles, the last ones of which may be filled up; or, in its place,
        image_features  [B, P, D] or [B, N, P, D], what `image_features` returned of each (for frozen towers: computed
                        once and kept); if both are there, these are used
        image_grids     [B, N, 2] int32, where pictures have grids of their own: rows and columns of each one's image
                        tokens, 0 after the last. `image_features` then has a row's tokens one after another, [B, P, D]
        input_ids       [B, T] int32, image tokens included, padded on the right
        attention_mask  [B, T] int32, 0 where padded
        memory          in the place of all these but the mask: what `encode` returned of them, so that the prompt is
                        read once for several uses; the mask is still read
        labels          [B, U] int32, -100 where ignored: the answer's tokens alone. `states[u]` and `logits[u]` predict
                        `labels[u]` from the prompt and the labels before it
    Labels may also be [B, A, U], several answers to each prompt. They are answered as if each were asked alone, but
    the prompt is read once and its A answers share it.

    An *adapter* is a pytree of `fedvlm_jax.lora`, or None for the bare base. The base is an argument always:
    `jax.vmap` over adapters and batches with `in_axes=None` for params keeps each base matmul one over all clients'
    rows.

    Attributes:
        family: its name, `florence2`.
        config: the family's configuration, which nothing outside of its package reads.
        fingerprint: all that makes the same weights another model, for the keys of caches.
        dtype: what matmuls are computed in. Norms, softmax and logits are float32 at least.
        init: (key) -> params: random weights, float32.
        image_features: (params, adapter, pixel_values [B, H, W, 3]) -> image tokens [B, P, D]. Of the adapter, only the
            part that lies in the components `vision` and `connector` is used.
        encode: (params, adapter, batch) -> memory, a pytree whose leaves have a leading axis B: all that answers need
            of the prompt.
        states: (params, adapter, batch) -> last states [B, U, D], or [B, A, U, D], and what `logits` gives.
        logits: (params, adapter, batch) -> float32 logits [B, U, V], or [B, A, U, V], that predict the labels.
        generate: (params, adapter, batch, max_tokens, *, num_beams=None, ...) -> ids [B, max_tokens]; see
            `models.generation`.
        settings: () -> how `generate` searches unless its arguments say otherwise; raises `UserError` where the model's
            folder asks for what is not implemented.
        image_tokens: (height, width) in pixels -> number of image tokens P; raises `UserError` for sizes that the tower
            does not take.
        image_width: numbers D of an image token.
        image_token_id: the token in whose places image tokens are put.
        vocabulary: number of tokens V.
        positions: most tokens of a prompt, image tokens included, and most of an answer; or, where they share
            positions, of both together.
        shared_positions: do an answer's positions go on where the prompt's end, as in a decoder-only model?
        components: part -> regular expression that the paths of its parameters begin with. The parts are `vision`, the
            tower; `connector`, from there to image tokens; `encoder` and `decoder`, the text model's halves (a
            decoder-only one has no encoder); `embedding`, its token table.
        targets: regular expression of the sites that adapters sit on unless a run says otherwise.
        cuts: which weights devices may share, and along which axis; the others each has whole.
        table: the parameters' names in checkpoints.
        write_configs: (folder) -> writes the JSON files that say what the model is, config.json among them.
        example_batch: () -> shapes of a smallest batch, to trace with.
        classes: the answers among which the model chooses, by their token; none where it writes answers, or is not
            bound yet.
        grids: how it sees pictures on grids of their own; None where all have one size.
        bind: (processor, answers, template) -> the model and the processor that choose among these answers, each
            asked as the template with the answer in the place of {}, in this order but for those that cannot be
            asked; its weights are the same. None where the model writes its answers. A fourth argument makes room for
            a soft prompt of so many vectors.
        prompt_at: path of the embedding that a soft prompt is added to, of a model that chooses among classes.
        layers: paths of its stacks of layers, beside which adapters can stand (`lora.parallel`); empty where none can.
        texts: (params, adapter) -> embeddings of the classes, of length 1: [C, E], or [N, C, E] where the adapter has N
            soft prompts. None where the model writes its answers.
        see_patches: () -> the same model with image features of all patches behind that of the picture; None where
            there are none.
    """

    family: str
    config: Any
    fingerprint: str
    dtype: Any
    init: Callable[[Array], Params]
    image_features: Callable[[Params, PyTree, Array], Array]
    encode: Callable[[Params, PyTree, Batch], PyTree]
    states: Callable[[Params, PyTree, Batch], tuple[Array, Array]]
    generate: Callable[..., Array]
    settings: Callable[[], Settings]
    image_tokens: Callable[[int, int], int]
    image_width: int
    image_token_id: int
    vocabulary: int
    positions: int
    shared_positions: bool = False
    components: Mapping[str, str]
    targets: str
    cuts: Cuts
    table: Table
    write_configs: Callable[[Path], None]
    example_batch: Callable[[], dict[str, jax.ShapeDtypeStruct]]
    classes: tuple[str, ...] = ()
    grids: GridVision | None = None
    bind: "Callable[..., tuple[Vlm, Processor]] | None" = None
    prompt_at: str = ""
    layers: tuple[str, ...] = ()
    texts: Callable[[Params, PyTree], Array] | None = None
    see_patches: "Callable[[], Vlm] | None" = None

    def __repr__(self) -> str:
        # Configuration and functions would fill pages.
        return f"Vlm({self.family}, {jnp.dtype(self.dtype).name}, image_width={self.image_width})"

    def logits(self, params: Params, adapter: PyTree, batch: Batch) -> Array:
        """Predict the labels: float32 [B, U, V], or [B, A, U, V]."""
        return self.states(params, adapter, batch)[1]

    def most_prompt_tokens(self, answer: int) -> int:
        """Longest prompt, image tokens included, beside answers of so many tokens; 0 or less where none fits."""
        return self.positions - answer if self.shared_positions else self.positions

    def component(self, path: str) -> str | None:
        """Find the part of the model that a parameter, a site or a leaf of an adapter lies in; None for other paths."""
        return next((name for name, pattern in self.components.items() if re.match(pattern, path)), None)

    @cached_property
    def _traced(self) -> tuple[Params, lora.Sites]:
        return lora.trace_init(self.init, jax.eval_shape(lambda: jax.random.key(0)))

    def shapes(self) -> Params:
        """The parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`s; touches no device."""
        return self._traced[0]

    @property
    def sites(self) -> lora.Sites:
        """The weights that an adapter can sit on, found by tracing once; touches no device."""
        return self._traced[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureGrids:
    """Grids of their own that a processor gives pictures.

    Attributes:
        pixels: of a picture, at most.
        most: its image tokens, at most.
        patches: a picture -> its patches [N, F], float32.
    """

    pixels: int
    most: int
    patches: Callable[[Image.Image], Float[np.ndarray, "N F"]]


class Processor(Protocol):
    """Text and pictures to arrays and back, as a model was trained with.

    Attributes:
        size: height and width in pixels that every picture is brought to; with `grids`, the largest square.
        image_tokens: of a whole picture, or of a tile: `Vlm.image_tokens` of `size`.
        image_token_id: id of the token in whose places image tokens are put; no text yields it.
        eos_token_id: id of the token that ends answers.
        largest_id: the largest id of a token whose embedding is read.
        framing: ids of tokens that stand around texts, or for what is none: `decode` leaves them out.
        fingerprint: a hash of all that decides how a picture becomes pixels, for the keys of caches.
        most_pictures: that a prompt may have.
        reads_turns: does it read the turns of a conversation? Else it is asked their text.
        cut: (height, width) of a picture -> the tiles that it is cut into, or with `grids` the grid of its image
            tokens, where it raises `UserError` for a picture that has none; None where all stay whole and have one
            size.
        grids: how pictures get grids of their own; None where they have none.
        pixels: pictures of any size and mode to normalised float32 pixels, of each its tiles first and then the whole
            of it; none to an array of length 0.
        prompts: texts, or prompts, to `input_ids` and `attention_mask`, image tokens included, padded on the right to
            the longest; raises `UserError` for what cannot be asked.
        answers: texts to labels, each ended by `eos_token_id`, cut to `max_tokens` with it, padded with -100. Where
            a model chooses among answers, one token that nothing ends; raises `UserError` for a text that is none.
        decode: token ids, or labels, to texts: the inverse of `answers` but for white space around them.
    """

    # Properties and not plain attributes, so that a class which computes them fits, too.
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def image_tokens(self) -> int: ...
    @property
    def image_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def largest_id(self) -> int: ...
    @property
    def framing(self) -> frozenset[int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def most_pictures(self) -> int:
        return 1

    @property
    def reads_turns(self) -> bool:
        return False

    @property
    def cut(self) -> Callable[[int, int], Tiles | Grid] | None:
        return None

    @property
    def grids(self) -> PictureGrids | None:
        return None

    def pixels(self, images: Sequence[Image.Image], /) -> Float[np.ndarray, "B H W 3"]: ...
    def prompts(self, asked: Sequence[str | Prompt], /) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]: ...
    def answers(self, texts: Sequence[str], max_tokens: int, /) -> Int[np.ndarray, "B U"]: ...
    def decode(self, ids: Int[np.ndarray, "B U"], /) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models as its folders are read: `FAMILY` of its package in `models/`.

    Attributes:
        model_types: the values of `model_type` in a config.json that are the family's to read, or to refuse; the first
            names it.
        read_config: (content of config.json, its path) -> the family's configuration; raises `UserError` for one that
            is not implemented.
        build: (configuration, dtype=, stacking=, generation_config=) -> the model without weights.
        open_processor: (folder) -> the folder's processor; raises `UserError` where its files are damaged.
        read_size: (folder) -> height and width of its pictures, from JSON alone; None where it states none.
        resizes: may a run bring pictures to a size of its own? Then these two take the side in pixels as `image_size`,
            None where it is not given.
        cuts: may a run have pictures cut into tiles? Then `open_processor` takes how many lie along the longer side as
            `image_tiles`, None where it is not given.
        grids: may a run give pictures grids of their own? Then `open_processor` takes how many pixels a picture has at
            most as `image_pixels`, None where it is not given.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[dict[str, Any], Path], Any]
    build: Callable[..., Vlm]
    open_processor: Callable[..., Processor]
    read_size: Callable[..., tuple[int, int] | None]
    resizes: bool = False
    cuts: bool = False
    grids: bool = False


def select_leaves(adapter: lora.Adapter | None, belongs: Callable[[str], bool]) -> lora.Adapter | None:
    """Select the part of an adapter that one call reads: `lora.inject` refuses leaves that its call never reads.

    >>> select_leaves({"tower": {"fc": {"a": 1}}, "text": {"fc": {"a": 2}}}, lambda path: path.startswith("text/"))
    {'text': {'fc': {'a': 2}}}
    """
    return tree.partition(adapter, belongs)[0] or None if adapter else None
