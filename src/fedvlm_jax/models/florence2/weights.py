"""Florence-2 checkpoints: one table from tensor names to parameters, used for reading and for writing.

A rule pairs a checkpoint name with a parameter path. Both are templates over the same fields (`FIELDS`), so that a
name determines a path and a path, with a layer number where layers are stacked, determines a name. Reading is strict:
every tensor is used exactly once, every parameter is filled, every shape is right, or an error lists the names.

Names are those that transformers writes (`model.` before them or not); the tables that it ties to the token table, the
head and a constant buffer may be there or not, and where they are they must hold what the model uses. Of tied tables
one is enough, under any of their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.florence2.model import temporal_embedding
from fedvlm_jax.models.safetensors_io import Tensor, list_tensors, read_tensors
from fedvlm_jax.utils.tree import flatten, unflatten

FIELDS = {
    "stage": r"\d+",
    "layer": r"\d+",
    "half": r"spatial_block|channel_block",
    "conv": r"conv[12]",
    "visual": r"window_attn.qkv|window_attn.proj|channel_attn.qkv|channel_attn.proj|ffn.fc1|ffn.fc2",
    "visual_norm": r"norm[12]",
    "axis": r"row_embeddings|column_embeddings",
    "side": r"encoder|decoder",
    "dense": r"(?:self_attn|encoder_attn).(?:q|k|v|out)_proj|fc1|fc2",
    "norm": r"(?:self_attn|encoder_attn|final)_layer_norm",
}


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transpose(array: np.ndarray) -> np.ndarray:
    return array.T


def _conv_in(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0)


def _conv_out(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1)


@dataclass(frozen=True)
class Rule:
    """One line of the table: checkpoint name, parameter path, and what turns one's tensor into the other's."""

    name: str
    path: str
    read: Callable[[np.ndarray], np.ndarray] = _same
    write: Callable[[np.ndarray], np.ndarray] = _same


def _weights(name: str, path: str, leaf: str, read: Any = _same, write: Any = _same) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{path}/{leaf}", read, write), Rule(f"{name}.bias", f"{path}/bias")


_CONV, _BLOCK = "vision_tower.convs.{stage}", "vision_tower.blocks.{stage}.{layer}.{half}"
_CONVS, _BLOCKS = "vision_tower/convs_{stage}", "vision_tower/blocks_{stage}/{half}"
_PROJECTOR, _SIDE = "multi_modal_projector", "language_model.{side}"

TABLE: tuple[Rule, ...] = (
    *_weights(f"{_CONV}.conv", f"{_CONVS}/conv", "kernel", _conv_in, _conv_out),
    *_weights(f"{_CONV}.norm", f"{_CONVS}/norm", "scale"),
    *_weights(_BLOCK + ".{conv}", _BLOCKS + "/{conv}", "kernel", _conv_in, _conv_out),
    *_weights(_BLOCK + ".{visual_norm}", _BLOCKS + "/{visual_norm}", "scale"),
    *_weights(_BLOCK + ".{visual}", _BLOCKS + "/{visual}", "kernel", _transpose, _transpose),
    Rule(f"{_PROJECTOR}.image_projection.weight", "image_projector/image_projection/kernel", _transpose, _transpose),
    *_weights(f"{_PROJECTOR}.image_proj_norm", "image_projector/image_proj_norm", "scale"),
    Rule(_PROJECTOR + ".image_position_embed.{axis}.weight", "image_projector/{axis}/embedding"),
    Rule("language_model.shared.weight", "language_model/shared/embedding"),
    Rule(f"{_SIDE}.embed_positions.weight", "language_model/{side}/embed_positions/embedding"),
    *_weights(f"{_SIDE}.layernorm_embedding", "language_model/{side}/layernorm_embedding", "scale"),
    *_weights(_SIDE + ".layers.{layer}.{norm}", "language_model/{side}/layers/{norm}", "scale"),
    *_weights(
        _SIDE + ".layers.{layer}.{dense}", "language_model/{side}/layers/{dense}", "kernel", _transpose, _transpose
    ),
)

NAMED = 12
"""So many tensors are named of those that have something wrong."""

_TIED = re.compile(
    r"(?:language_model\.)?lm_head\.weight|shared\.weight"
    r"|(?:language_model\.)?(?:(?:encoder|decoder)\.)?embed_tokens\.weight"
)
_TABLE, _SHARED = "language_model.shared", "language_model/shared/embedding"
_KINDS = ("F64", "F32", "F16", "BF16")
_TEMPORAL = "multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
_LOGITS_BIAS = "language_model.final_logits_bias"


def _pattern(template: str, separator: str) -> re.Pattern[str]:
    """The template as a regular expression with a named group per field; in a field `.` stands for the separator."""
    parts = re.split(r"\{(\w+)\}", template)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"(?P<{part}>{FIELDS[part].replace('.', re.escape(separator))})"
        else:
            parts[index] = re.escape(part)
    return re.compile("".join(parts))


_NAMES = tuple(_pattern(rule.name, ".") for rule in TABLE)
_PATHS = tuple(_pattern(rule.path, "/") for rule in TABLE)


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes: parameter path, layer in the stack (None where not stacked), and how."""

    path: str
    layer: int | None
    rule: Rule


def find_slot(name: str) -> Slot | None:
    """The slot of a checkpoint tensor called `name`, or None where the table has no line for it."""
    for pattern, rule in zip(_NAMES, TABLE, strict=True):
        if match := pattern.fullmatch(name):
            fields = match.groupdict()
            layer = fields.pop("layer", None)
            path = rule.path.format(**{key: value.replace(".", "/") for key, value in fields.items()})
            return Slot(path, None if layer is None else int(layer), rule)
    return None


def checkpoint_names(path: str, layers: int) -> list[tuple[str, Slot]]:
    """The checkpoint names, without `model.`, that the parameter at `path` is written to: one per layer if stacked."""
    for pattern, rule in zip(_PATHS, TABLE, strict=True):
        if match := pattern.fullmatch(path):
            fields = {key: value.replace("/", ".") for key, value in match.groupdict().items()}
            if "{layer}" not in rule.name:
                return [(rule.name.format(**fields), Slot(path, None, rule))]
            return [(rule.name.format(layer=n, **fields), Slot(path, n, rule)) for n in range(layers)]
    raise KeyError(f"no checkpoint name is known for the parameter {path}")


def load_params(shapes: Any, files: list[Path], dtype: Any) -> dict[str, Any]:
    """Parameters of the given shapes, filled from safetensors files.

    All names and shapes are compared first, from the files' headers; only then is memory asked for.

    Args:
        shapes: what `Vlm.shapes()` returns.
        files: the safetensors files; together they must hold every parameter once and nothing that is unknown.
        dtype: of the returned arrays.

    Raises:
        UserError: naming all tensors that are unknown, doubled, misshapen or missing, that hold no finite numbers, or
            that differ from what they should be tied to; or a file that is no safetensors file.
    """
    expected = flatten(shapes)
    slots, ties, problems = _plan(expected, [tensor for file in files for tensor in list_tensors(file)])
    _refuse(problems, files)
    filled = {path: np.empty(shape.shape, dtype) for path, shape in expected.items()}
    tied: dict[str, np.ndarray] = {}
    for file in files:
        for name, tensor in read_tensors(file):
            if name in ties:
                tied[name] = tensor
                continue
            slot = slots[name]
            with np.errstate(over="ignore"):  # an overflow is no finite number, which is told
                value = slot.rule.read(tensor).astype(dtype, copy=False)
            if not np.isfinite(value).all():
                problems.append(f"not finite in {np.dtype(dtype).name}: {name} in {file.name}")
            filled[slot.path][... if slot.layer is None else slot.layer] = value
    problems += _check_ties(tied, filled[_SHARED], dtype)
    _refuse(problems, files)
    return unflatten(filled)


def _refuse(problems: list[str], files: list[Path]) -> None:
    if problems:
        more = [f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
        shown = "\n  ".join([*problems[:NAMED], *more])
        where = ", ".join(sorted({str(file.parent) for file in files}))
        raise UserError(f"the checkpoint in {where} does not fit its configuration:\n  {shown}")


def _plan(expected: dict[str, Any], tensors: list[Tensor]) -> tuple[dict[str, Slot], frozenset[str], list[str]]:
    """Where every tensor goes, which are only compared, and what is wrong with the others."""
    stacks = {path: shape.shape[0] for path, shape in expected.items() if _is_stacked(path)}
    wanted = {(path, n) for path in expected for n in (range(stacks[path]) if path in stacks else [None])}
    table = _find_table([tensor.name for tensor in tensors])
    slots: dict[str, Slot] = {}
    done: set[tuple[str, int | None]] = set()
    ties: set[str] = set()
    problems: list[str] = []
    for name, shape, kind in tensors:
        short = name.removeprefix("model.")
        slot = find_slot(f"{_TABLE}.weight" if name == table else short)
        key = None if slot is None else (slot.path, slot.layer)
        if name != table and (_TIED.fullmatch(short) or short in (_TEMPORAL, _LOGITS_BIAS)):
            ties.add(name)
            problems += _check_kind(name, kind)
        elif slot is None or key not in wanted:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif key in done:
            problems.append(f"twice: {name}")
        else:
            done.add(key)
            slots[name] = slot
            problems += _check_tensor(name, shape, kind, slot, expected[slot.path].shape)
    for path, layer in sorted(wanted - done, key=str):
        names = {slot.layer: name for name, slot in checkpoint_names(path, stacks.get(path, 1))}
        problems.append(f"missing: model.{names[layer]}")
    return slots, frozenset(ties), problems


def _find_table(names: list[str]) -> str | None:
    """The tensor that serves as token table where only one of those that are tied to it was saved, else None."""
    if any(name.removeprefix("model.") == f"{_TABLE}.weight" for name in names):
        return None
    return next((name for name in sorted(names) if _TIED.fullmatch(name.removeprefix("model."))), None)


def _check_tensor(name: str, shape: tuple[int, ...], kind: str, slot: Slot, wanted: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor of this shape and type for its slot."""
    wanted = wanted if slot.layer is None else wanted[1:]
    asked = slot.rule.write(np.broadcast_to(np.empty(()), wanted)).shape
    if wrong := _check_kind(name, kind):
        return wrong
    return [] if shape == asked else [f"misshapen: {name} is {list(shape)}, the configuration says {list(asked)}"]


def _check_kind(name: str, kind: str) -> list[str]:
    return [] if kind in _KINDS else [f"of type {kind}: {name}; weights must be one of {', '.join(_KINDS)}"]


def _is_stacked(path: str) -> bool:
    return any("{layer}" in rule.name and pattern.fullmatch(path) for pattern, rule in zip(_PATHS, TABLE, strict=True))


def _check_ties(ties: dict[str, np.ndarray], shared: np.ndarray, dtype: Any) -> list[str]:
    """What is wrong with the tensors that repeat something else."""
    problems = []
    for name, tensor in ties.items():
        short = name.removeprefix("model.")
        if short == _LOGITS_BIAS:
            fits = not np.any(tensor)
        elif short == _TEMPORAL:
            even = tensor.ndim == 2 and tensor.shape[1] >= 2 and tensor.shape[1] % 2 == 0
            fits = even and np.allclose(tensor.astype(np.float32), temporal_embedding(*tensor.shape), atol=1e-2)
        else:
            fits = np.array_equal(tensor.astype(dtype), shared)
        if not fits:
            problems.append(f"not as the model has it (tied to the token table, or constant): {name}")
    return problems


def save_checkpoint(vlm: Any, params: Any, folder: Path | str, dtype: Any = np.float32) -> None:
    """Writes `model.safetensors`, `config.json` and `generation_config.json`, which transformers itself can load.

    Args:
        vlm: whose configurations are written.
        params: as `vlm.init` or `load_vlm` return them; written as they are, so merge an adapter first.
        folder: made if it is not there; files of these names are replaced.
        dtype: of the tensors in the file.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for path, value in flatten(params).items():
        array = np.asarray(value).astype(dtype)
        for name, slot in checkpoint_names(path, array.shape[0] if array.ndim else 1):
            part = array if slot.layer is None else array[slot.layer]
            tensors[f"model.{name}"] = np.ascontiguousarray(slot.rule.write(part))
    vision = vlm.config.vision_config
    tensors[f"model.{_TEMPORAL}"] = temporal_embedding(vision.max_temporal_embeddings, vision.embed_dim[-1]).astype(
        dtype
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vlm.config.save_pretrained(folder)
    # safetensors leaves its file readable by its owner alone, whatever the umask says.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o666)
    vlm.generation_config.save_pretrained(folder)
