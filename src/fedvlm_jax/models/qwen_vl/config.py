"""The configurations of Qwen2.5-VL and Qwen3-VL: read from config.json, and refused where they are not implemented."""

from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.models.configuration import (
    DEPTH,
    WIDTH,
    parse_config,
    read_positive,
    read_text_shape,
    require,
    require_sizes,
)
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.layers import activation
from fedvlm_jax.models.qwen_vl.grid import FRAMES, choose_axes
from fedvlm_jax.models.qwen_vl.tower import GridShape
from fedvlm_jax.models.text_shape import TextShape

MODEL_TYPES = ("qwen3_vl", "qwen2_5_vl")
_CLASSES = {"qwen3_vl": "Qwen3VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig"}
_SIZES = {
    "depth": DEPTH,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size", "out_hidden_size"), WIDTH
    ),
}
_WHOLE = (
    "model_type", "architectures", "image_token_id", "video_token_id", "tie_word_embeddings", "quantization_config",
    "transformers_version", "torch_dtype", "dtype",
)  # fmt: skip
_THETA = 10_000.0  # which transformers fills in later than it reads the file


def read_config(values: dict[str, Any], file: Path) -> Any:
    """Make transformers' configuration of a config.json; refuse what is not implemented."""
    if values["model_type"] == "qwen2_5_vl" and "text_config" not in values and "hidden_size" in values:
        values = _part_text(values)
    return parse_config(values, file, _CLASSES[values["model_type"]], check_config)


def _part_text(values: dict[str, Any]) -> dict[str, Any]:
    """Part the fields of the text model from a config.json that has them beside its `vision_config`, as published."""
    own = {name: value for name, value in values.items() if name in _WHOLE or name.startswith("vision_")}
    text = {name: value for name, value in values.items() if name not in own}
    return own | {"text_config": text | {"model_type": "qwen2_5_vl_text"}}


def check_config(config: Any) -> None:
    """Refuse a configuration that the model does not implement.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    kind = config.model_type
    require("text_config", config.text_config, {"model_type": (f"{kind}_text",)})
    require("vision_config", config.vision_config, {"model_type": (f"{kind}_vision",)})
    text, vision = read_shape(config), read_tower(config.vision_config)
    if vision.made != text.width:
        raise UserError(
            f"vision_config.out_hidden_size={vision.made} is another width than text_config.hidden_size={text.width}"
        )
    if len(vision.deep) > text.layers:
        raise UserError(
            f"vision_config.deepstack_visual_indexes names {format_count(len(vision.deep), 'layer')}, "
            "more than the text model has"
        )
    require_integer("image_token_id", config.image_token_id, 0, text.vocabulary - 1)
    read_axes(config)


def is_new(config: Any) -> bool:
    """Tell Qwen3-VL from Qwen2.5-VL."""
    return config.model_type == "qwen3_vl"


def read_shape(config: Any) -> TextShape:
    """Read the text model's shape."""
    text, new = config.text_config, is_new(config)
    if new:
        require("text_config", text, {"attention_bias": (False,)})
    else:
        require("text_config", text, {"sliding_window": (None,)})
    return read_text_shape(text, tied=bool(config.tie_word_embeddings), qkv_bias=not new, head_norms=new)


def read_axes(config: Any) -> tuple[int, ...]:
    """Read which axis of a picture every frequency of the text model turns with.

    Raises:
        UserError: the sections do not share the frequencies of a head.
    """
    name, rope = "text_config.rope_parameters", dict(config.text_config.rope_parameters or {})
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UserError(f"{name} has rope_type={kind!r}; only 'default' is supported")
    new, half = is_new(config), read_shape(config).head_width // 2
    sections = rope.get("mrope_section", [24, 20, 20] if new else None)
    whole = isinstance(sections, list | tuple) and len(sections) == 3 and all(type(part) is int for part in sections)
    if not whole or min(sections) < 1 or sum(sections) != half:
        raise UserError(f"{name} has mrope_section={sections!r}; expected three numbers whose sum is {half}")
    if "mrope_interleaved" in rope and rope["mrope_interleaved"] is not new:
        raise UserError(f"{name} has mrope_interleaved={rope['mrope_interleaved']!r}; only {new} is supported")
    first, second, third = sections
    return choose_axes((first, second, third), interleaved=new)


def read_tower(vision: Any) -> GridShape:
    """Read a `vision_config`.

    Raises:
        UserError: a field that no tower has, or that is not implemented.
    """
    require_sizes("vision_config", vision, _SIZES)
    require("vision_config", vision, {"in_channels": (3,), "temporal_patch_size": (FRAMES,)})
    if vision.hidden_size % (4 * vision.num_heads):
        raise UserError(
            f"vision_config.hidden_size={vision.hidden_size} does not make {vision.num_heads} heads, each of a "
            "multiple of 4 numbers"
        )
    activation(vision.hidden_act)  # for its error
    rope = dict(vision.rope_parameters or {})
    if (kind := rope.get("rope_type", "axial")) not in ("axial", "default"):
        raise UserError(f"vision_config.rope_parameters has rope_type={kind!r}; only 'axial' is supported")
    theta = read_positive("vision_config.rope_parameters.rope_theta", rope.get("rope_theta", _THETA))
    return GridShape(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        width=vision.hidden_size,
        heads=vision.num_heads,
        hidden=vision.intermediate_size,
        layers=vision.depth,
        activation=vision.hidden_act,
        made=vision.out_hidden_size,
        theta=theta,
        deviation=vision.initializer_range,
        **(_read_new(vision) if vision.model_type == "qwen3_vl_vision" else _read_old(vision)),
    )


def _read_new(vision: Any) -> dict[str, Any]:
    require_integer("vision_config.num_position_embeddings", vision.num_position_embeddings, 1, WIDTH)
    side = round(vision.num_position_embeddings**0.5)
    if side * side != vision.num_position_embeddings:
        raise UserError(f"vision_config.num_position_embeddings={vision.num_position_embeddings} is no square")
    deep = _read_layers(vision, "deepstack_visual_indexes")
    return {"gated": False, "learned": side, "deep": deep}


def _read_old(vision: Any) -> dict[str, Any]:
    require_integer("vision_config.window_size", vision.window_size, 1, WIDTH)
    step = vision.patch_size * vision.spatial_merge_size
    if vision.window_size % step:
        raise UserError(f"vision_config.window_size={vision.window_size} does not divide by {step} pixels")
    whole = _read_layers(vision, "fullatt_block_indexes")
    return {"gated": True, "window": vision.window_size // vision.patch_size, "whole": whole}


def _read_layers(vision: Any, name: str) -> tuple[int, ...]:
    layers = tuple(getattr(vision, name, None) or ())
    for layer in layers:
        require_integer(f"vision_config.{name}", layer, 0, vision.depth - 1)
    if sorted(set(layers)) != list(layers):
        raise UserError(f"vision_config.{name}={list(layers)} is not in order, each layer once")
    return layers
