"""A LoRA adapter as PEFT (github.com/huggingface/peft, 0.21) keeps it: configuration and tensors, by PyTorch's modules.

`pack` makes both of the factors of every module, `unpack` reads them again. No PyTorch and no model is needed: where a
module lies in a model is the table of its family, see `fedvlm_jax.peft.folder`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.peft.patterns import LONGEST, is_number, read_patterns, show

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

_KEY = re.compile(r"(?P<module>.+?)\.(?P<kind>lora_embedding_|lora_)(?P<side>[AB])(?:\.weight)?")

# Fields of a LoraConfig that say nothing of what the adapter computes once its tensors are there.
_SILENT = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules", "bias",
    "lora_dropout", "fan_in_fan_out", "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
))  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA's magnitudes are no LoRA: train it again without use_dora",
    "modules_to_save": "whole modules were trained beside the factors: merge it with PEFT first",
    "trainable_token_indices": "rows of the token table were trained themselves: merge it with PEFT first",
    "lora_bias": "it has biases of its own: merge it with PEFT first",
    "target_parameters": "it adapts parameters that are no module's weight",
    "layer_replication": "its base has layers more than once",
    "alora_invocation_tokens": "it begins to work at a token (aLoRA)",
}
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to start a LoRA (`init_lora_weights`) that leave the base as it is."""


class Factors(NamedTuple):
    """The pair of one module, in PyTorch's layouts; it adds `scale · b a`.

    Attributes:
        a: [r, in] of a linear layer, [r, in, *window] of a convolution, [r, n] of a table of n rows.
        b: [out, r], [out, r, 1, …], [width, r].
        scale: PEFT's alpha / r.
        table: whether rows are looked up, as in an embedding.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    table: bool = False


def pack(modules: Mapping[str, Factors], base: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    r"""Make the content of `adapter_config.json`, and the tensors by name.

    The rank and the alpha that most modules have stand for all, others in patterns; alpha carries the scale, so that
    rsLoRA needs no flag. Modules are named in full: PEFT would find `fc1` in the vision tower as well.

    Args:
        modules: by their names in PyTorch.
        base: name or folder of the model that they adapt.

    >>> pair = Factors(np.ones((2, 4)), np.ones((3, 2)), 0.5)
    >>> config, tensors = pack({"decoder.fc1": pair}, "base")
    >>> config["lora_alpha"], config["target_modules"], list(tensors)[0]
    (1, ['decoder.fc1'], 'base_model.model.decoder.fc1.lora_A.weight')
    """
    ranks = {name: pair.a.shape[0] for name, pair in modules.items()}
    alphas = {name: _shorten(pair.scale * ranks[name]) for name, pair in modules.items()}
    rank = max(ranks.values())  # servers reserve room for the largest
    alpha = Counter(alphas[name] for name in sorted(ranks) if ranks[name] == rank).most_common(1)[0][0]
    config = {
        "alpha_pattern": {re.escape(name): value for name, value in sorted(alphas.items()) if value != alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(name): value for name, value in sorted(ranks.items()) if value != rank},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors: dict[str, np.ndarray] = {}
    for name, pair in sorted(modules.items()):
        kind, ending = ("lora_embedding_", "") if pair.table else ("lora_", ".weight")
        for side, factor in (("A", pair.a), ("B", pair.b)):
            tensors[f"{PREFIX}{name}.{kind}{side}{ending}"] = np.require(factor, requirements="C")
    return config, tensors


def unpack(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Factors]:
    """Read the factors of every module, as float32; the inverse of `pack`, and for what PEFT itself wrote.

    Args:
        config: content of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`.
        where: the folder, for messages.

    Raises:
        UserError: it is no LoRA, or more than LoRA (DoRA, modules trained beside it), its base was changed when it
            began, or its files do not fit each other.
    """
    _check_config(config, where)
    found: dict[str, dict[str, np.ndarray]] = {}
    tables: set[str] = set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX)) if len(key) <= LONGEST else None
        if key.endswith(".base_layer.weight"):
            continue  # the base's own table, which PEFT saves beside the factors of one
        if match is None:
            reason = _REFUSED["use_dora"] if "magnitude" in key else "expected names as …q_proj.lora_A.weight"
            raise UserError(f"{where} holds a tensor {show(key)} beside the factors of LoRA: {reason}")
        sides = found.setdefault(match["module"], {})
        if match["side"] in sides:
            raise UserError(f"{where} holds {match['side']} of {show(match['module'])} twice, by two names")
        sides[match["side"]] = tensor
        if match["kind"] == "lora_embedding_":
            tables.add(match["module"])
    if not found:
        raise UserError(f"{where} holds no factors at all")
    modules = dict[str, Factors]()
    find_rank, find_alpha = (read_patterns(config.get(name), where) for name in ("rank_pattern", "alpha_pattern"))
    for name, pair in sorted(found.items()):
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{where}: {show(name)} has but one of its two factors; is the file cut short?")
        with np.errstate(over="ignore"):  # an overflow is no finite number, which is refused below
            a, b = (pair[side].astype(np.float32) for side in "AB")
        rank = find_rank(name, config["r"])
        fits = min(a.ndim, b.ndim) >= 2 and 1 <= rank == a.shape[0] == b.shape[1] and not set(b.shape[2:]) - {1}
        if not fits:
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise UserError(f"{where}: {show(name)} has {shapes}, and adapter_config.json says rank {rank}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{where}: {show(name)} holds numbers that are not finite")
        alpha = find_alpha(name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[name] = Factors(a, b, scale, name in tables)
    return modules


def _check_config(config: Mapping[str, Any], where: str) -> None:
    file = f"{where}: adapter_config.json"
    if config.get("peft_type") != "LORA":
        kind = show(config.get("peft_type"))
        raise UserError(f"{where} is a PEFT folder of {kind}, and of all PEFT's methods LORA alone is read")
    for name, value in config.items():
        if value and name not in _SILENT:
            reason = _REFUSED.get(name, "it is not known here what that adds")
            raise UserError(f"{file} has {show(name)}={show(value)}, so it is not read: {reason}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where} trained biases too (bias={show(config['bias'])}): merge it with PEFT first")
    start = config.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise UserError(
            f"{where} began with init_lora_weights={show(start)}, which changes the base, and the folder does not "
            "hold that base: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for name in ("r", "lora_alpha"):
        if not is_number(config.get(name)) or (name == "r" and config["r"] < 1):
            raise UserError(f"{file} has {name}={show(config.get(name))}, expected a number; is it damaged?")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{file} has {name}={show(config[name])}, expected an object; is it damaged?")


def _shorten(value: float) -> float:
    """Write a whole number without a point, as people write alphas."""
    return int(value) if float(value).is_integer() else float(value)
