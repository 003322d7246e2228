"""The shapes of a round's arguments, with their places on a mesh: all that compiling it takes, no data and no weights.

They are those of the arguments that `simulator.Simulator` hands to `Programs.compile_round`, one for one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.distributed.sharding import cut_base, wave_sharding
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.inputs.feature_cache import is_vision_frozen
from fedvlm_jax.federation.round import RoundArguments, make_arguments
from fedvlm_jax.federation.simulator import start_adapter
from fedvlm_jax.methods import Client
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives import Objective

Shape = jax.ShapeDtypeStruct


def shape_examples(
    vlm: Vlm, objective: Objective, spec: lora.LoRA, *, size: tuple[int, int], views: int = 1, prompt: int, answer: int,
    cached: bool, grid_tokens: int | None = None,
) -> dict[str, Shape]:  # fmt: skip
    """Make the shapes of one example: pictures of `size` (height, width), `prompt` tokens, the images' among them.

    `cached` is whether features of frozen vision are kept; with an adapter in the vision tower they never are.
    `grid_tokens`: image tokens of a picture at most, where each has a grid of its own, whose features are always read.
    """
    pixels, several = Shape((1, *size, 3), jnp.float32), (views,) if views > 1 else ()
    adapter = jax.eval_shape(lambda key: lora.init(key, vlm.sites, spec), shape_key())
    example = {name: Shape((prompt,), jnp.int32) for name in ("input_ids", "attention_mask")}
    example |= {"labels": Shape((answer,), jnp.int32)}
    if objective.pairs:
        example |= {"rejected_labels": Shape((answer,), jnp.int32)}
    if objective.reference:
        example |= {name: Shape((), jnp.float32) for name in ("reference_chosen", "reference_rejected")}
    if grid_tokens is not None:
        grids = {"image_grids": Shape((views, 2), jnp.int32)}
        return example | grids | {"image_features": Shape((views * grid_tokens, vlm.image_width), vlm.dtype)}
    if cached and is_vision_frozen(vlm, adapter):
        made = jax.eval_shape(lambda params, pixels: vlm.image_features(params, None, pixels), vlm.shapes(), pixels)
        return example | {"image_features": Shape((*several, *made.shape[1:]), made.dtype)}
    return example | {"pixel_values": Shape((*several, *pixels.shape[1:]), pixels.dtype)}


def shape_round(
    programs: Programs, vlm: Vlm, spec: lora.LoRA, layout: Layout, example: dict[str, Shape]
) -> RoundArguments:
    """Make the arguments of a compiled round, as shapes; `example` is one of `shape_examples`."""
    mesh, method, key = programs.mesh, programs.method, shape_key()
    everywhere, across = NamedSharding(mesh, PartitionSpec()), wave_sharding(mesh)
    params = jax.tree.map(_place, vlm.shapes(), cut_base(mesh, vlm.shapes(), vlm.cuts))
    server = jax.eval_shape(lambda key: method.init(adapter=start_adapter(key, vlm.sites, spec)), key)
    server = jax.tree.map(lambda leaf: _place(leaf, everywhere), server)
    personal = jax.eval_shape(lambda key, server: start_personal(method, key, server, jnp.int32(0)), key, server)
    if (base := method.base) is not None:
        moved = jax.eval_shape(lambda params, server: base(params=params, server=server), params, server)
        params = jax.tree.map(lambda leaf, old: _place(leaf, old.sharding), moved, params)

    def spread(tree: PyTree) -> PyTree:
        places = (layout.waves, layout.wave)
        return jax.tree.map(lambda leaf: Shape((*places, *leaf.shape), leaf.dtype, sharding=across), tree)

    return make_arguments(
        params=params,
        server=server,
        personal=spread(personal),
        clients=spread(shape_client(example, layout.rows, layout.steps, layout.batch)),
        weights=Shape((layout.places,), jnp.float32),
        key=key,  # type: ignore[arg-type]
    )


def shape_client(example: Mapping[str, Shape], rows: int, steps: int, batch: int) -> Client:
    """Make the shapes of a client that has so many rows like this example."""
    return Client(
        examples={name: Shape((rows, *leaf.shape), leaf.dtype) for name, leaf in example.items()},
        indices=Shape((steps, batch), jnp.int32),
        mask=Shape((steps, batch), jnp.bool_),
        weight=Shape((), jnp.float32),
        number=Shape((), jnp.int32),
        new=Shape((), jnp.bool_),
        share=Shape((), jnp.float32),
    )  # type: ignore[arg-type]


def shape_key() -> Shape:
    """Make the shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _place(leaf: Any, sharding: Any) -> Shape:
    return Shape(leaf.shape, leaf.dtype, sharding=sharding)
