"""PyTorch's pickled weights are read without PyTorch, and nothing that they ask for is run."""

import importlib.util
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from models.pickles import ORDERED, integer, tensor, text, write_archive, write_pickle

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.folder_files import open_tensors

START, END = b"\x80\x02" + ORDERED + b"(", b"u."
SIX = {"0": np.arange(6, dtype=np.float32).tobytes()}


def one(kind="FloatStorage", entry="0", numbers=6, shape=(2, 3), strides=(3, 1), offset=0):
    return START + text("a") + tensor(entry, kind, numbers, shape, strides, offset) + END


def read(file):
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict


def test_tensors_of_every_type_and_layout(tmp_path):
    rng = np.random.default_rng(0)
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64)
    wanted = {f"{n}": (100 * rng.standard_normal((3, 4))).astype(kind) for n, kind in enumerate(kinds)}
    wanted |= {"number": np.float32(7)[None].reshape(()), "none": np.zeros((0, 3), np.float32)}
    write_pickle(tmp_path / "a.bin", wanted)
    found = read(tmp_path / "a.bin")
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    with open_tensors(tmp_path / "a.bin") as opened:
        assert (opened.get_slice("2").get_shape(), opened.get_slice("2").get_dtype()) == ([3, 4], "BF16")


def test_views_of_a_storage(tmp_path):
    write_archive(tmp_path / "a.bin", one(shape=(3, 2), strides=(1, 3)), SIX)
    assert read(tmp_path / "a.bin")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    write_archive(tmp_path / "a.bin", one(shape=(2,), strides=(3,), offset=1), SIX)
    assert read(tmp_path / "a.bin")["a"].tolist() == [1, 4]


class Trap:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_a_pickle_asks_for_is_named_and_not_run(tmp_path, protocol):
    place = tmp_path / "run"
    write_archive(tmp_path / "a.bin", pickle.dumps({"a": Trap(place)}, protocol))
    with pytest.raises(UserError, match=r"a\.bin cannot be read .*asks for '(posix|nt)\.mkdir', .* it is not run"):
        read(tmp_path / "a.bin")
    assert not place.exists()
    pickle.loads(pickle.dumps({"a": Trap(place)}, protocol))  # as PyTorch's own reading would
    assert place.exists()


PROGRAMS = {
    "eval": (b"\x80\x02cbuiltins\neval\n" + text("1") + b"\x85R.", r"'builtins\.eval'"),
    "a function of torch": (b"\x80\x02ctorch\nload\n" + text("b") + b"\x85R.", r"'torch\.load'"),
    "a name of two lines of dots": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "instruction INST"),
    "a class made new": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a dict called with arguments": (b"\x80\x02ccollections\nOrderedDict\n" + integer(1) + b"\x85R.", "does not take"),
    "a name called from the stack": (b"\x80\x02" + integer(1) + b")R.", "does not take"),
    "nothing": (b"", "damaged"),
    "no end": (START, "damaged"),
    "an empty stack": (b"\x80\x02.", "no dict of tensors"),
    "a list": (b"\x80\x02].", "no dict of tensors"),
    "an unknown memory": (b"\x80\x02h\x07.", "damaged"),
    "a text beyond its end": (b"\x80\x02X\xff\xff\xff\x7fab", "damaged"),
    "a number among tensors": (START + text("a") + integer(1) + END, "beside tensors it holds 'a'"),
    "a key that is none": (b"\x80\x02}]]s.", "no text"),
    "an odd dict": (START + text("a") + END, "damaged"),
    "no storage": (one(entry="9"), "holds no storage 'data/9'"),
    "a storage elsewhere": (one(entry="../../x"), "holds no storage"),
    "another length": (one(numbers=7), "not of 7 numbers"),
    "another type": (one("DoubleStorage"), "not of 6 numbers"),
    "beyond the storage": (one(offset=1), "reaches beyond"),
    "strides beyond": (one(strides=(4, 1)), "reaches beyond"),
    "one number many times": (one(shape=(2**30, 2**30), strides=(0, 0)), "reaches beyond"),
    "a shape below zero": (one(shape=(-1, 3)), "no shape"),
    "an offset below zero": (one(offset=-1), "no shape"),
    "fewer strides": (one(strides=(3,)), "no shape"),
    "a storage that is none": (START + text("a") + text("s") + b"Q" + END, "storage that is none"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_damage_and_malice_are_one_message(tmp_path, name):
    program, message = PROGRAMS[name]
    write_archive(tmp_path / "a.bin", program, SIX)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", r"PyTorch before 1\.6 wrote it"),
        (b"PK\x03\x04" + bytes(99), "not a zip file"),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.bin")


def test_archives_that_unpack_to_more_are_refused(tmp_path):
    write_archive(tmp_path / "a.bin", one(numbers=2**20, shape=(2**20,), strides=(1,)), {"0": bytes(2**22)}, 8)
    with pytest.raises(UserError, match="not of 1048576 numbers"):
        read(tmp_path / "a.bin")
    write_archive(tmp_path / "a.bin", bytes(2**24 + 1), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="longer than"):
        read(tmp_path / "a.bin")


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_what_pytorch_saves_is_read(tmp_path):
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()  # with PyTorch's notes beside the dict
    state |= {"whole": base, "turned": base.T, "part": base[1:3, 2:4], "parameter": torch.nn.Parameter(base * 2)}
    state |= {"half": base.half(), "brain": base.bfloat16() / 7, "number": torch.tensor(3.5), "none": base[:0]}
    state |= {"double": base.double(), "long": base.long(), "byte": base.byte(), "bool": base > 3}
    torch.save(state, tmp_path / "a.bin")
    found = read(tmp_path / "a.bin")
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), value.detach().double().numpy())
        assert found[name].shape == tuple(value.shape)
