"""One table per family from checkpoint names to parameters, used for reading and for writing.

A rule pairs a checkpoint name with a parameter path. Both are templates over the same fields, so that a name determines
a path and a path, with a layer number where layers are stacked, determines a name. Reading is strict: every tensor is
used exactly once, every parameter is filled, every shape is right, or an error lists the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.folder_files import Tensor, list_tensors, read_tensors
from fedvlm_jax.utils.tree import flatten, unflatten

NAMED = 12
"""So many tensors are named of those that have something wrong."""

_KINDS = ("F64", "F32", "F16", "BF16")

Change = Callable[[np.ndarray], np.ndarray]


def _keep(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Rule:
    """One line of a table: checkpoint name, parameter path, and what turns one's tensor into the other's."""

    name: str
    path: str
    read: Change = _keep
    write: Change = _keep


def weights(name: str, path: str, leaf: str, read: Change = _keep, write: Change = _keep) -> tuple[Rule, Rule]:
    """The rules of a module's `weight`, which is called `leaf` here, and of its `bias`."""
    return Rule(f"{name}.weight", f"{path}/{leaf}", read, write), Rule(f"{name}.bias", f"{path}/bias")


def dense(name: str, path: str) -> tuple[Rule, Rule]:
    """The rules of PyTorch's linear layer [out, in] and flax's [in, out]."""
    return weights(name, path, "kernel", np.transpose, np.transpose)


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes: parameter path, layer in the stack (None where not stacked), and how."""

    path: str
    layer: int | None
    rule: Rule


@dataclass(frozen=True)
class Constant:
    """A tensor that some checkpoints hold and no parameter is.

    Attributes:
        fits: is this value what the model computes itself?
        make: () -> the value, where transformers expects it in a file.
    """

    fits: Callable[[np.ndarray], bool]
    make: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Names in a family's checkpoints.

    Attributes:
        rules: a line per kind of parameter; `{layer}` in its name says that the parameter is stacked.
        fields: what stands for the other names in braces: field -> regular expression, `.` being the separator.
        prefix: what stands before all names where they are written, and may where they are read.
        ties: matches further names of the tensor `tied`. Where several are in a file they must be equal; one is enough.
        tied: a name of the table.
        constants: name of a tensor that is no parameter -> what it must hold where it is there.
    """

    rules: tuple[Rule, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    ties: re.Pattern[str] = re.compile(r"(?!)")
    tied: str = ""
    constants: Mapping[str, Constant] = field(default_factory=dict)

    @cached_property
    def _names(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(self._compile(rule.name, "."), rule) for rule in self.rules]

    @cached_property
    def _paths(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(self._compile(rule.path, "/"), rule) for rule in self.rules]

    def _compile(self, template: str, separator: str) -> re.Pattern[str]:
        """The template as a regular expression with a group per field."""
        parts = re.split(r"\{(\w+)\}", template)
        fields = {"layer": r"\d+", **self.fields}
        for at, part in enumerate(parts):
            inside = at % 2 and fields[part].replace(".", re.escape(separator))
            parts[at] = f"(?P<{part}>{inside})" if inside else re.escape(part)
        return re.compile("".join(parts))

    def find_slot(self, name: str) -> Slot | None:
        """The slot of a checkpoint tensor, its name without the prefix; None where the table has no line for it."""
        for pattern, rule in self._names:
            if match := pattern.fullmatch(name):
                fields = {key: value.replace(".", "/") for key, value in match.groupdict().items()}
                layer = fields.pop("layer", None)
                return Slot(rule.path.format(**fields), None if layer is None else int(layer), rule)
        return None

    def find_names(self, path: str, layers: int) -> list[tuple[str, Slot]]:
        """The checkpoint names, without the prefix, of the parameter at `path`: one per layer where it is stacked."""
        for pattern, rule in self._paths:
            if match := pattern.fullmatch(path):
                fields = {key: value.replace("/", ".") for key, value in match.groupdict().items()}
                if "{layer}" not in rule.name:
                    return [(rule.name.format(**fields), Slot(path, None, rule))]
                return [(rule.name.format(layer=n, **fields), Slot(path, n, rule)) for n in range(layers)]
        raise KeyError(f"no checkpoint name is known for the parameter {path}")


def read_params(table: Table, shapes: Any, files: list[Path], dtype: Any) -> dict[str, Any]:
    """Parameters of the given shapes, filled from safetensors files.

    All names and shapes are compared first, from the files' headers; only then is memory asked for.

    Args:
        table: the family's.
        shapes: what `Vlm.shapes()` returns.
        files: together they must hold every parameter once and nothing that is unknown.
        dtype: of the returned arrays.

    Raises:
        UserError: naming all tensors that are unknown, doubled, misshapen or missing, that hold no finite numbers, or
            that differ from what they should be tied to; or a file that is no safetensors file.
    """
    expected = flatten(shapes)
    slots, repeats, problems = _plan(table, expected, [tensor for file in files for tensor in list_tensors(file)])
    _refuse(problems, files)
    filled = {path: np.empty(shape.shape, dtype) for path, shape in expected.items()}
    compared: dict[str, np.ndarray] = {}
    for file in files:
        for name, tensor in read_tensors(file):
            if name in repeats:
                compared[name] = tensor
                continue
            slot = slots[name]
            with np.errstate(over="ignore"):  # an overflow is no finite number, which is told
                value = slot.rule.read(tensor).astype(dtype, copy=False)
            if not np.isfinite(value).all():
                problems.append(f"not finite in {np.dtype(dtype).name}: {name} in {file.name}")
            filled[slot.path][... if slot.layer is None else slot.layer] = value
    for name, tensor in compared.items():
        constant = table.constants.get(name.removeprefix(table.prefix))
        if constant is not None:
            fits = constant.fits(tensor)
        else:
            slot = table.find_slot(table.tied)
            assert slot is not None
            fits = np.array_equal(slot.rule.read(tensor).astype(dtype), filled[slot.path])
        if not fits:
            problems.append(f"not as the model has it (tied to the token table, or constant): {name}")
    _refuse(problems, files)
    return unflatten(filled)


def _refuse(problems: list[str], files: list[Path]) -> None:
    if problems:
        more = [f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
        shown = "\n  ".join([*problems[:NAMED], *more])
        where = ", ".join(sorted({str(file.parent) for file in files}))
        raise UserError(f"the checkpoint in {where} does not fit its configuration:\n  {shown}")


def _plan(
    table: Table, expected: dict[str, Any], tensors: list[Tensor]
) -> tuple[dict[str, Slot], frozenset[str], list[str]]:
    """Where every tensor goes, which are only compared, and what is wrong with the others."""
    names = {
        (slot.path, slot.layer): name
        for path, shape in expected.items()
        for name, slot in table.find_names(path, shape.shape[0] if shape.shape else 1)
    }
    short = {tensor.name: tensor.name.removeprefix(table.prefix) for tensor in tensors}
    # safetensors keeps one of tensors that are tied, under any of their names.
    serves = None
    if table.tied not in short.values():
        serves = next((name for name in sorted(short) if table.ties.fullmatch(short[name])), None)
    slots: dict[str, Slot] = {}
    done: set[tuple[str, int | None]] = set()
    repeats: set[str] = set()
    problems: list[str] = []
    for name, shape, kind in tensors:
        slot = table.find_slot(table.tied if name == serves else short[name])
        key = None if slot is None else (slot.path, slot.layer)
        tied = table.ties.fullmatch(short[name]) or short[name] in table.constants
        wrong = [] if kind in _KINDS else [f"of type {kind}: {name}; weights must be one of {', '.join(_KINDS)}"]
        if name != serves and tied:
            repeats.add(name)
            problems += wrong
        elif slot is None or key not in names:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif key in done:
            problems.append(f"twice: {name}")
        else:
            done.add(key)
            slots[name] = slot
            wanted = expected[slot.path].shape[slot.layer is not None :]
            asked = slot.rule.write(np.broadcast_to(np.empty(()), wanted)).shape
            if shape != asked:
                wrong = wrong or [f"misshapen: {name} is {list(shape)}, the configuration says {list(asked)}"]
            problems += wrong
    missing = sorted(names.keys() - done, key=str)
    problems += [f"missing: {table.prefix}{names[key]}" for key in missing]
    return slots, frozenset(repeats), problems


def write_tensors(table: Table, params: Any, dtype: Any) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name: the inverse of `read_params`."""
    tensors: dict[str, np.ndarray] = {}
    for path, value in flatten(params).items():
        array = np.asarray(value).astype(dtype)
        for name, slot in table.find_names(path, array.shape[0] if array.ndim else 1):
            part = array if slot.layer is None else array[slot.layer]
            tensors[name] = np.require(slot.rule.write(part), requirements="C")
    for name, constant in table.constants.items():
        if constant.make is not None:
            tensors[name] = constant.make().astype(dtype)
    return {f"{table.prefix}{name}": tensor for name, tensor in tensors.items()}
