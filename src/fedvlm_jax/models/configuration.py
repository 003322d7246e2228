"""Reading of config.json for every family: transformers' record of it, whole, possible and implemented.

Nonsense is refused before anything is made of it, so bounds are checked of every size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.models.folder_files import require_integer
from fedvlm_jax.models.layers import activation
from fedvlm_jax.models.text_shape import Reach, TextShape
from fedvlm_jax.models.vision_transformer import VisionShape

DEPTH, WIDTH, VOCABULARY = 512, 2**17, 2**24
"""Most layers of a stack, most numbers along an axis, most tokens: ten times those of any model and far from what
memory has to be asked for."""

_TEXT = {
    "vocab_size": VOCABULARY, "max_position_embeddings": VOCABULARY, "num_hidden_layers": DEPTH,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), WIDTH),
}  # fmt: skip
_STACK = {
    "num_hidden_layers": DEPTH,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), WIDTH),
}


def parse_config(values: dict[str, Any], file: Path, kind: str, check: Callable[[Any], None]) -> Any:
    """Make transformers' record of a config.json, and check it.

    Args:
        values: content of the file.
        kind: name of transformers' class.
        check: raises `UserError` for what is not implemented.

    Raises:
        UserError: it is cut short, of quantised weights, nothing that transformers reads, or not implemented.
    """
    import transformers

    check_whole(values, file)
    try:
        config = getattr(transformers, kind).from_dict(values)
    except Exception as error:  # transformers and its validators raise many kinds
        raise UserError(f"{file} is no configuration that transformers reads ({explain_error(error)})") from None
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def check_whole(values: Mapping[str, Any], file: Path) -> None:
    """Refuse what is no configuration of a whole model's weights as they were trained, before transformers sees it.

    Raises:
        UserError: it has no text model or no tower, or weights are quantised.
    """
    if not all(isinstance(part := values.get(name), dict) and part for name in ("text_config", "vision_config")):
        raise UserError(f"{file} has no text_config or no vision_config: is it cut short?")
    for name in ("text_config", "vision_config"):
        # transformers lists the kinds of all layers, so that a file of a line could ask for all memory.
        if isinstance(layers := values[name].get("num_hidden_layers"), int) and layers > DEPTH:
            raise UserError(f"{file}: {name}.num_hidden_layers is {layers}, expected a whole number from 1 to {DEPTH}")
    if "quantization_config" in values:
        raise UserError(f"{file} is of quantised weights, which are not supported: take them as they were before")


def require(where: str, part: Any, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a configuration of which a field is none of the values that are implemented.

    Raises:
        UserError: naming the field, its value and what it may be.

    >>> from types import SimpleNamespace
    >>> require("text_config", SimpleNamespace(mlp_bias=False), {"mlp_bias": (False,)})
    """
    for name, known in wanted.items():
        value = getattr(part, name, None)
        if value not in known:
            names = ", ".join(repr(one) for one in known)
            raise UserError(f"{where}.{name}={value!r} is not supported, only {names}")


def require_sizes(where: str, part: Any, most: Mapping[str, int]) -> None:
    """Refuse a configuration of which a field is no whole number from 1 to the most that is known of it.

    Raises:
        UserError: naming the field, its value and what it may be.

    >>> from types import SimpleNamespace
    >>> require_sizes("text_config", SimpleNamespace(hidden_size=64), {"hidden_size": WIDTH})
    """
    for name, largest in most.items():
        require_integer(f"{where}.{name}", getattr(part, name, None), 1, largest)


def read_text_shape(text: Any, *, tied: bool, **options: Any) -> TextShape:
    """Read a Llama-like `text_config`.

    Args:
        tied: is the head the token table?
        options: further fields of `TextShape`.

    Raises:
        UserError: a size, an activation or rotary positions that no model has.
    """
    require_sizes("text_config", text, _TEXT)
    width, heads = text.hidden_size, text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or width // heads
    require_integer("text_config.head_dim", head_width, 2, WIDTH)
    if head_width % 2 or heads % text.num_key_value_heads:
        raise UserError(
            f"text_config has {heads} heads of {head_width} numbers and {text.num_key_value_heads} heads of keys: "
            "heads must be of even width, and share keys evenly"
        )
    named = text.hidden_activation if hasattr(text, "hidden_activation") else text.hidden_act
    activation(named)  # for its error
    rope = dict(text.rope_parameters or {})
    reach = read_reach(rope.get("full_attention", rope))
    return TextShape(
        width=width,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_width=head_width,
        hidden=text.intermediate_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        activation=named,
        epsilon=read_positive("text_config.rms_norm_eps", text.rms_norm_eps),
        theta=reach.theta,
        factor=reach.factor,
        tied=tied,
        deviation=text.initializer_range,
        **options,
    )


def read_reach(rope: Mapping[str, Any], window: int | None = None) -> Reach:
    """Read the rotary positions of a kind of layers.

    Raises:
        UserError: they are scaled otherwise than by a factor, or have no base.

    >>> read_reach({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})
    Reach(theta=1000000.0, factor=8.0, window=None)
    """
    name, kind = "text_config.rope_parameters", rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise UserError(f"{name} has rope_type={kind!r}; only 'default' and 'linear' are supported")
    factor = read_positive(f"{name}.factor", rope.get("factor")) if kind == "linear" else 1.0
    return Reach(read_positive(f"{name}.rope_theta", rope.get("rope_theta")), factor, window)


def read_vision_shape(vision: Any) -> VisionShape:
    """Read a `vision_config` like SigLIP's; what CLIP has besides, its families add.

    Raises:
        UserError: a size or an activation that no tower has, or pictures smaller than a patch.
    """
    require_sizes("vision_config", vision, dict.fromkeys(("image_size", "patch_size"), WIDTH))
    require("vision_config", vision, {"num_channels": (3,)})
    if vision.image_size < vision.patch_size:
        raise UserError(f"vision_config.image_size={vision.image_size} is below its patch_size={vision.patch_size}")
    return VisionShape(image=vision.image_size, patch=vision.patch_size, **read_stack("vision_config", vision))


def read_stack(where: str, part: Any) -> dict[str, Any]:
    """Read the fields of a `StackShape` off a configuration like SigLIP's and CLIP's, of pictures or of text.

    Raises:
        UserError: a size or an activation that no model has.
    """
    require_sizes(where, part, _STACK)
    if part.hidden_size % part.num_attention_heads:
        raise UserError(f"{where}.hidden_size={part.hidden_size} does not divide by {part.num_attention_heads} heads")
    activation(part.hidden_act)  # for its error
    return {
        "width": part.hidden_size,
        "heads": part.num_attention_heads,
        "hidden": part.intermediate_size,
        "layers": part.num_hidden_layers,
        "activation": part.hidden_act,
        "epsilon": read_positive(f"{where}.layer_norm_eps", part.layer_norm_eps),
        "deviation": getattr(part, "initializer_range", 0.02),
    }


def read_positive(name: str, value: Any) -> float:
    """Check that a value is a number above 0.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{name} is {value!r}, expected a number above 0")
    return float(value)
