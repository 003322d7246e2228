"""One table per family from checkpoint names to parameters, used for reading and for writing.

A rule pairs a checkpoint name with a parameter path. Both are templates over the same fields, so that a name determines
a path and a path, with a layer number where layers are stacked, determines a name. Reading is strict: every tensor is
used exactly once, every parameter is filled, every shape is right, or an error lists the names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.folder_files import open_tensors
from fedvlm_jax.utils.tree import flatten, unflatten

_NAMED = 12  # so many tensors are named of those that have something wrong
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors calls them."""

_COUNTS = ("I64", "I32")  # of constants alone

Change = Callable[[np.ndarray], np.ndarray]


def _keep(array: np.ndarray) -> np.ndarray:
    return array


class Rule(NamedTuple):
    """One line of a table: checkpoint name, parameter path, and what turns one's tensor into the other's."""

    name: str
    path: str
    read: Change = _keep
    write: Change = _keep


def weights(name: str, path: str, leaf: str, read: Change = _keep, write: Change = _keep) -> tuple[Rule, Rule]:
    """The rules of a module's `weight`, which is called `leaf` here, and of its `bias`.

    >>> [rule.path for rule in weights("encoder.norm", "encoder/norm", "scale")]
    ['encoder/norm/scale', 'encoder/norm/bias']
    """
    return Rule(f"{name}.weight", f"{path}/{leaf}", read, write), Rule(f"{name}.bias", f"{path}/bias")


def dense(name: str, path: str) -> tuple[Rule, Rule]:
    """The rules of PyTorch's linear layer [out, in] and flax's [in, out]."""
    return weights(name, path, "kernel", np.transpose, np.transpose)


def conv(name: str, path: str) -> tuple[Rule, Rule]:
    """The rules of PyTorch's convolution [out, in, h, w] and flax's [h, w, in, out]."""
    return weights(name, path, "kernel", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


class Slot(NamedTuple):
    """The place of a checkpoint tensor: parameter path, layer in the stack (None where not stacked), and its rule."""

    path: str
    layer: int | None
    rule: Rule

    @property
    def place(self) -> tuple[str, int | None]:
        """Its place alone: two rules may not fill the same one."""
        return self.path, self.layer


@dataclass(frozen=True)
class Constant:
    """A tensor that some checkpoints hold and no parameter is."""

    fits: Callable[[np.ndarray], bool]  # is this value what the model computes itself?
    make: Callable[[], np.ndarray] | None = None  # the value, where transformers expects it in a file


@dataclass(frozen=True, kw_only=True)
class Table:
    """Names in a family's checkpoints.

    Attributes:
        rules: a line per kind of parameter; `{layer}` in its name says that the parameter is stacked. Of several that
            fit a parameter the first says how it is written, and all how it may be read.
        fields: what stands for the other names in braces: field -> regular expression, `.` being the separator.
        prefix: what stands before all names where they are written, and may where they are read.
        aliases: (regular expression, replacement) pairs that turn other spellings of a name into the table's, in order.
        ties: matches further names of the tensor `tied`. Where several are in a file they must be equal; one is enough.
        tied: a name of the table.
        constants: name of a tensor that is no parameter -> what it must hold where it is there.
        unread: matches the names of further tensors that checkpoints hold and the model does not read.
        lookups: further modules of transformers, by their whole names, that look tokens up in the tensor `tied`.
        head: the module that scores tokens with it.
        counted: matches the names of tables whose module counts the rows that it looks up by itself: other code that
            stands in for the module, as PEFT's does, would look up what the module was called with.

    >>> table = Table(rules=dense("layers.{layer}.{side}", "layers/{side}"), fields={"side": "fc1|fc2"})
    >>> [name for name, _ in table.find_names("layers/fc2/kernel", layers=2)]
    ['layers.0.fc2.weight', 'layers.1.fc2.weight']
    >>> table.find_slot("layers.1.fc2.bias").place
    ('layers/fc2/bias', 1)
    """

    rules: tuple[Rule, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    ties: re.Pattern[str] = re.compile(r"(?!)")  # matches nothing
    tied: str = ""
    constants: Mapping[str, Constant] = field(default_factory=dict)
    unread: re.Pattern[str] = re.compile(r"(?!)")
    lookups: tuple[str, ...] = ()
    head: str = "lm_head"
    counted: re.Pattern[str] = re.compile(r"(?!)")

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], re.Pattern[str], Rule]]:
        """Expressions for the names and the paths of every rule, with a group for each of its fields."""
        # One spelling for each number: a file may name no layer twice, nor one of a thousand digits.
        fields = {"layer": r"0|[1-9][0-9]{0,5}", **self.fields}

        def compile_(template: str, separator: str) -> re.Pattern[str]:
            # After re.split every second part is the name of a field.
            parts = re.split(r"\{(\w+)\}", template)
            parts[::2] = map(re.escape, parts[::2])
            parts[1::2] = [f"(?P<{name}>{fields[name].replace('.', re.escape(separator))})" for name in parts[1::2]]
            return re.compile("".join(parts))

        return [(compile_(rule.name, "."), compile_(rule.path, "/"), rule) for rule in self.rules]

    def spell(self, name: str) -> str:
        r"""Spell a name of a file as the table does.

        >>> Table(rules=(), aliases=((r"^visual\.", "model.visual."),)).spell("visual.norm.weight")
        'model.visual.norm.weight'
        """
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name.removeprefix(self.prefix)

    def find_slot(self, name: str) -> Slot | None:
        """Find the slot of a checkpoint tensor, its name without the prefix; None where no line of the table has it."""
        for pattern, _, rule in self._patterns:
            if match := pattern.fullmatch(name):
                fields = {key: value.replace(".", "/") for key, value in match.groupdict().items()}
                layer = fields.pop("layer", None)
                return Slot(rule.path.format(**fields), None if layer is None else int(layer), rule)
        return None

    def find_names(self, path: str, layers: int) -> list[tuple[str, Slot]]:
        """Find the checkpoint names, without the prefix, of the parameter at `path`: one per layer where stacked."""
        for _, pattern, rule in self._patterns:
            if match := pattern.fullmatch(path):
                fields = {key: value.replace("/", ".") for key, value in match.groupdict().items()}
                if "{layer}" not in rule.name:
                    return [(rule.name.format(**fields), Slot(path, None, rule))]
                return [(rule.name.format(layer=n, **fields), Slot(path, n, rule)) for n in range(layers)]
        raise KeyError(f"no checkpoint name is known for the parameter {path}")


def read_params(table: Table, shapes: Any, files: list[Path], dtype: Any) -> dict[str, Any]:
    """Parameters of the given shapes (`Vlm.shapes()`), filled from files of weights.

    All names and shapes are compared first, from the files' headers; only then is memory asked for. Together the files
    must hold every parameter once and nothing that is unknown; what the table calls unread may be there or not.

    Raises:
        UserError: naming all tensors that are unknown, doubled, misshapen or missing, that hold no finite numbers, or
            that differ from what they should be tied to; or a file that cannot be read.
    """
    expected = flatten(shapes)
    slots, repeats, problems = _plan(table, expected, files)
    _refuse(problems, files)
    filled = {path: np.empty(shape.shape, dtype) for path, shape in expected.items()}
    compared: dict[str, np.ndarray] = {}
    for file in files:
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                if name not in slots and name not in repeats:
                    continue  # known, and unread
                tensor = opened.get_tensor(name)
                if name in repeats:
                    compared[name] = tensor
                    continue
                slot = slots[name]
                with np.errstate(over="ignore"):  # an overflow is no finite number, and so a problem below
                    value = slot.rule.read(tensor).astype(dtype, copy=False)
                if not np.isfinite(value).all():
                    problems.append(f"not finite in {np.dtype(dtype).name}: {name} in {file.name}")
                filled[slot.path][... if slot.layer is None else slot.layer] = value
    for name, tensor in compared.items():
        constant = table.constants.get(table.spell(name))
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
        if len(problems) > _NAMED:
            problems = [*problems[:_NAMED], f"and {len(problems) - _NAMED} more"]
        where, shown = ", ".join(sorted({str(file.parent) for file in files})), "\n  ".join(problems)
        raise UserError(f"the checkpoint in {where} does not fit its configuration:\n  {shown}")


def _plan(table: Table, expected: dict[str, Any], files: list[Path]) -> tuple[dict[str, Slot], set[str], list[str]]:
    """Plan from the files' headers: every tensor's slot, the tensors that are only compared, and what is wrong."""
    headers: list[tuple[str, tuple[int, ...], str]] = []
    for file in files:
        with open_tensors(file) as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            headers += [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()]
    names = {
        (slot.path, slot.layer): name
        for path, shape in expected.items()
        for name, slot in table.find_names(path, shape.shape[0] if shape.shape else 1)
    }
    short = {name: table.spell(name) for name, _, _ in headers}
    # safetensors keeps one of tensors that are tied, under any of their names.
    serves = None
    if table.tied not in short.values():
        serves = next((name for name in sorted(short) if table.ties.fullmatch(short[name])), None)
    slots: dict[str, Slot] = {}
    done: set[tuple[str, int | None]] = set()
    repeats: set[str] = set()
    problems: list[str] = []
    for name, shape, kind in headers:
        slot = table.find_slot(table.tied if name == serves else short[name])
        wrong = [] if kind in FLOATS else [f"of type {kind}: {name}; weights must be one of {', '.join(FLOATS)}"]
        if name != serves and short[name] in table.constants:
            repeats.add(name)
            problems += [] if kind in _COUNTS else wrong
        elif name != serves and table.ties.fullmatch(short[name]):
            repeats.add(name)
            problems += wrong
        elif slot is None or slot.place not in names:
            if not table.unread.fullmatch(short[name]):
                problems.append(f"unexpected: {name} {list(shape)}")
        elif slot.place in done:
            problems.append(f"twice: {name}")
        else:
            done.add(slot.place)
            slots[name] = slot
            wanted = expected[slot.path].shape[slot.layer is not None :]
            # A number that is broadcast has any shape and takes no memory.
            asked = slot.rule.write(np.broadcast_to(np.empty(()), wanted)).shape
            if shape != asked:
                wrong = wrong or [f"misshapen: {name} is {list(shape)}, the configuration says {list(asked)}"]
            problems += wrong
    problems += [f"missing: {table.prefix}{names[key]}" for key in sorted(names.keys() - done, key=str)]
    return slots, repeats, problems


def read_unread(table: Table, files: list[Path]) -> dict[str, np.ndarray]:
    """Read the tensors that the model does not read, by the names under which they are written.

    Raises:
        UserError: a file cannot be read.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                if table.unread.fullmatch(short := table.spell(name)):
                    tensors[f"{table.prefix}{short}"] = opened.get_tensor(name)
    return tensors


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
