"""Reading of the tensors that PyTorch pickles (`pytorch_model.bin`), without PyTorch and without running anything.

Such a file is a zip archive of a pickle and of the storages' bytes. A pickle is a program that may call any function,
so it is not given to `pickle`: a small machine of our own carries out the few instructions that a dict of tensors
needs, on plain values, and calls nothing. A name of anything but PyTorch's tensors and storages is refused. A storage
is read when its tensor is asked for, and holds no more bytes than the file, for it is not compressed.

Sources: the pickle protocol as `pickletools` documents it; the archive as `torch.save` writes it from PyTorch 1.6 on.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedvlm_jax.errors import explain_error

MOST_BYTES = 2**24
"""Longest pickle beside the storages; a model of ten thousand tensors takes 2 MB."""

_STORAGES = {
    "DoubleStorage": ("F64", "<f8"), "FloatStorage": ("F32", "<f4"), "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"), "LongStorage": ("I64", "<i8"), "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"), "CharStorage": ("I8", "i1"), "ByteStorage": ("U8", "u1"),
    "BoolStorage": ("BOOL", "?"),
}  # fmt: skip
"""PyTorch's name of a storage -> safetensors' name of its type, and numpy's."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, KeyError)
_CALLS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict"}


class _Name(NamedTuple):
    """A name that the pickle asks for; what it stands for is never looked up."""

    text: str


class _Storage(NamedTuple):
    """A storage: the type of its numbers, the entry of the archive that holds them, and how many they are."""

    kind: str
    entry: str
    numbers: int


class PickledTensor(NamedTuple):
    """A tensor of a storage, laid out as PyTorch does; offset and strides count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return _STORAGES[self.storage.kind][0]


class PickleError(Exception):
    """The file is damaged, or its pickle asks for what a dict of tensors does not need."""


class PickledTensors:
    """The tensors of a file, by name; it has the methods of safetensors' `safe_open`."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, tensors: dict[str, PickledTensor]) -> None:
        self._archive, self._prefix, self._tensors = archive, prefix, tensors

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_slice(self, name: str) -> PickledTensor:
        return self._tensors[name]

    def get_tensor(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        kind, numbers = _STORAGES[tensor.storage.kind]
        with _explained():
            stored = np.frombuffer(self._archive.read(f"{self._prefix}{tensor.storage.entry}"), numbers)
        steps = [stride * stored.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(stored[tensor.offset :], tensor.shape, steps, writeable=False)
        if kind == "BF16":
            import ml_dtypes

            return np.ascontiguousarray(view).view(ml_dtypes.bfloat16).reshape(tensor.shape)
        return np.array(view, order="C")


@contextmanager
def open_pickle(file: Path) -> Generator[PickledTensors]:
    """Open a file of `torch.save` for `keys()`, `get_slice(name)` and `get_tensor(name)`.

    Raises:
        PickleError: it is none, is damaged, or its pickle asks for anything but tensors; the message names it.
    """
    with _explained(), zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise PickleError("it is no archive of torch.save")
        if archive.getinfo(names[0]).file_size > MOST_BYTES:
            raise PickleError(f"its pickle is longer than {MOST_BYTES:,} bytes")
        prefix = names[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in archive.namelist() and archive.getinfo(order).file_size != len("little"):
            raise PickleError("its numbers are not little-endian")
        found = _carry_out(archive.read(names[0]))
        tensors = {name: value for name, value in found.items() if isinstance(value, PickledTensor)}
        if others := [name for name in found if name not in tensors]:
            raise PickleError(f"beside tensors it holds {str(others[0])[:60]!r}")
        for tensor in tensors.values():
            _check(tensor, archive, prefix)
    with zipfile.ZipFile(file) as archive:
        yield PickledTensors(archive, prefix, tensors)


@contextmanager
def _explained() -> Generator[None]:
    """Tell what `zipfile` raises of a damaged archive as this module's error."""
    try:
        yield
    except PickleError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        raise PickleError(explain_error(error)) from None


def _check(tensor: PickledTensor, archive: zipfile.ZipFile, prefix: str) -> None:
    """Refuse a tensor that reaches beyond its storage, and a storage of another length than it says."""
    storage, entry = tensor.storage, f"{prefix}{tensor.storage.entry}"
    try:
        info = archive.getinfo(entry)
    except KeyError:
        raise PickleError(f"it holds no storage {storage.entry[:60]!r}") from None
    size = np.dtype(_STORAGES[storage.kind][1]).itemsize
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != storage.numbers * size:
        raise PickleError(f"its storage {storage.entry[:60]!r} is not of {storage.numbers} numbers")
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) > storage.numbers or tensor.offset + last >= storage.numbers + (0 in tensor.shape):
        raise PickleError(f"a tensor reaches beyond its storage {storage.entry[:60]!r}")


def _carry_out(program: bytes) -> dict[str, Any]:
    """Carry out a pickle's instructions on plain values; the dict that is left.

    >>> import pickle
    >>> _carry_out(pickle.dumps({"a": (1, True)}, protocol=2))
    {'a': (1, True)}
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    def set_items(pairs: list[Any]) -> None:
        if not isinstance(stack[-1], dict) or len(pairs) % 2:
            raise PickleError("its pickle is damaged")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise PickleError("a name in it is no text")
            stack[-1][key] = value

    try:
        for code, argument, _ in pickletools.genops(program):
            match code.name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                    stack.append(argument)
                case "GLOBAL":
                    stack.append(_name(str(argument).replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    module, name = stack.pop(-2), stack.pop()
                    stack.append(_name(f"{module}.{name}"))
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[code.name])
                case "TUPLE":
                    stack.append(tuple(pop_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(code.name[-1])
                    taken = tuple(stack[len(stack) - count :])
                    del stack[len(stack) - count :]
                    stack.append(taken)
                case "BINPUT" | "LONG_BINPUT":
                    memo[int(argument)] = stack[-1]  # pyright: ignore[reportArgumentType]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(argument)])  # pyright: ignore[reportArgumentType]
                case "SETITEM":
                    set_items([stack.pop(-2), stack.pop()])
                case "SETITEMS":
                    set_items(pop_mark())
                case "BINPERSID":
                    stack.append(_open_storage(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(_rebuild(stack.pop(), arguments))
                case "BUILD":
                    stack.pop()  # what PyTorch notes beside an ordered dict: versions of modules
                case "STOP":
                    break
                case other:
                    raise PickleError(f"its pickle holds the instruction {other}, which tensors do not need")
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise PickleError(f"its pickle is damaged ({explain_error(error)})") from None
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise PickleError("its pickle is no dict of tensors")
    return stack[0]


def _name(text: str) -> _Name:
    if text not in _CALLS and not (text.startswith("torch.") and text.removeprefix("torch.") in _STORAGES):
        raise PickleError(f"its pickle asks for {text[:80]!r}, which is no tensor's; it is not run")
    return _Name(text)


def _open_storage(found: Any) -> _Storage:
    match found:
        case ("storage", _Name(kind), str(entry), str(), int(numbers)) if kind.startswith("torch.") and numbers >= 0:
            return _Storage(kind.removeprefix("torch."), f"data/{entry}", numbers)
        case _:
            raise PickleError("its pickle names a storage that is none")


def _rebuild(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name("collections.OrderedDict"), ():
            return {}
        case _Name("torch._utils._rebuild_tensor_v2"), (
            _Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(strides),
            *_,
        ):
            numbers: Any = (offset, *shape, *strides)
            if len(shape) != len(strides) or len(shape) > 16 or any(type(n) is not int or n < 0 for n in numbers):
                raise PickleError("its pickle makes a tensor of no shape")
            return PickledTensor(storage, offset, shape, strides)
        case _Name("torch._utils._rebuild_parameter"), (PickledTensor() as tensor, *_):
            return tensor
        case _:
            raise PickleError("its pickle calls something with what it does not take")
