"""Files as `torch.save` writes them, made without PyTorch."""

import struct
import zipfile
from pathlib import Path

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def pack(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(entry: str, kind: str, numbers: int, shape, strides, offset: int = 0) -> bytes:
    """The instructions that make a tensor of a storage."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(entry) + text("cpu") + integer(numbers)
    rest = integer(offset) + pack(shape) + pack(strides) + b"\x89" + ORDERED
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + rest + b"tR"


def write_archive(file: Path, program: bytes, storages=None, compression=zipfile.ZIP_STORED) -> None:
    """A pickle and its storages, entry -> bytes."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for entry, content in (storages or {}).items():
            archive.writestr(f"archive/data/{entry}", content)


def write_pickle(file: Path, tensors) -> None:
    """A dict of tensors, each of a storage of its own."""
    program, storages = b"\x80\x02" + ORDERED + b"(", {}
    for number, (name, array) in enumerate(tensors.items()):
        strides = [step // array.itemsize for step in np.ascontiguousarray(array).strides]
        kind = STORAGES[array.dtype.name]
        program += text(name) + tensor(str(number), kind, array.size, array.shape, strides[: array.ndim])
        storages[str(number)] = array.tobytes()
    write_archive(file, program + b"u.", storages)
