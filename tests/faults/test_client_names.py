"""Clients of any name have files of their own, whole or told; and equal runs leave equal bytes."""

import json
import os
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_table import make_table

from fedvlm_jax.data.federated_dataset import ClientRows, Federation, check_federation
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.client_states import ClientStates
from fedvlm_jax.run_dir.artifacts import (
    BASE,
    GLOBAL,
    LIST,
    load_base,
    name_file,
    open_adapters,
    open_global,
    save_adapters,
    save_base,
)

HOSTILE = [
    *(
        "site 22",
        "site•",
        "site%2022",
        "site%202022",
        "Site",
        "site",
        "SITE",
        "ſite",
        "straße",
        "STRASSE",
        "é",
        "e\u0301",
    ),
    *(".", "..", "...", "", " ", "a ", " a", "a", "a.", "-", "_", "~", "a~b", "/etc/passwd", "../../up", "a/b", "a\\b"),
    *("nul\0byte", "line\nbreak", "\x1b[31mred", "x" * 100, "x" * 101, "x" * 300, "y" * 10_000, "病院", "病院" * 90),
    *("🏥", "🏥" * 200, "con", "clients.json", "a.safetensors", "K", "\u212a", "ﬁ", "fi", "٣", "3", '*?<>|:"'),
    name_file("site 22").removesuffix(".safetensors"),
]
LISTED = "clients"


def as_file_systems_see(file):
    """Some fold capitals and bring letters to one spelling in Unicode."""
    return unicodedata.normalize("NFKD", file).casefold()


def test_hostile_names_have_files_of_their_own():
    files = [name_file(name) for name in HOSTILE]
    assert len(set(HOSTILE)) == len(HOSTILE)
    assert len({as_file_systems_see(file) for file in files}) == len(HOSTILE)
    for file in files:
        assert len(file.encode()) <= 150
        assert file.isascii()
        assert file.isprintable()
        assert not set(file) & set('/\\*?<>|:" ')
        assert not file.startswith((".", "-"))


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), unique=True, max_size=20))
def test_no_two_names_share_a_file(names):
    assert len({as_file_systems_see(name_file(name)) for name in names}) == len(names)


def test_plain_names_are_files_as_they_are():
    assert name_file("noto-en") == "noto-en.safetensors"
    assert name_file("coco_2014.v1") == "coco_2014.v1.safetensors"
    assert name_file("Site 22") == "site_22~" + name_file("Site 22")[8:]


def make_adapter(value):
    return {"fc1": {"a": np.full((2, 3), value, np.float32), "b": np.arange(4, dtype=np.float32) * value}}


def write(folder, names):
    adapters = ((name, make_adapter(number)) for number, name in enumerate(names))
    save_adapters(folder, adapters, {"fc1": {"b": np.ones(4, np.float32)}}, {"method": "plora", "round": 3, "seed": 1})


def test_hostile_names_are_written_and_read_again(tmp_path):
    write(tmp_path, HOSTILE)
    listed = json.loads((tmp_path / LIST).read_text(encoding="utf-8"))[LISTED]
    assert list(listed) == HOSTILE
    assert len(list((tmp_path / "clients").iterdir())) == len(HOSTILE)
    read = open_adapters(tmp_path, HOSTILE)(np.asarray([5, 0, 5, len(HOSTILE) - 1]))
    np.testing.assert_array_equal(read["fc1"]["a"][:, 0, 0], [5, 0, 5, len(HOSTILE) - 1])


@pytest.mark.parametrize(
    ("names", "told"),
    [(["a", "b", "a"], "two clients are called 'a'"), (["a", "\ud800"], "cannot be written as UTF-8")],
)
def test_names_that_cannot_be_are_told_before_training(names, told):
    rows = np.arange(2)
    federation = Federation(tuple(ClientRows(name, rows, rows, rows) for name in names), {})
    with pytest.raises(UserError, match=told):
        check_federation(make_table([0, 1]), federation, SimpleNamespace(source="mine"))


# --- Damage ---


@pytest.mark.parametrize("at", [3, 60, 200, -1])
def test_a_flipped_bit_in_an_adapter_is_told(tmp_path, at):
    write(tmp_path, ["one", "Two"])
    file = tmp_path / "clients" / name_file("Two")
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    adapters = open_adapters(tmp_path, ["one", "Two"])
    adapters(np.asarray([0]))
    with pytest.raises(UserError, match=r"two~\w+\.safetensors is not as it was written: put it back from a copy"):
        adapters(np.asarray([0, 1]))


def test_global_models_are_kept_once_each_and_checked(tmp_path):
    """Three clients, of whom two would begin alike; then one bit of a file is another."""
    names = ["one", "Two", "three"]
    general = [(name, make_adapter(value)) for name, value in zip(names, (1, 2, 1), strict=True)]
    save_adapters(tmp_path, [(name, make_adapter(0)) for name in names], {}, {"round": 3}, general)
    files = sorted((tmp_path / GLOBAL).iterdir())
    assert len(files) == 2
    read = open_global(tmp_path, names)
    np.testing.assert_array_equal(read(np.asarray([2, 1, 0]))["fc1"]["a"][:, 0, 0], [1, 2, 1])
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(UserError, match=r"global/\w+\.safetensors is not as it was written"):
        read(np.asarray([0, 1]))
    files[0].unlink()
    with pytest.raises(UserError, match=r"global/\w+\.safetensors is missing"):
        open_global(tmp_path, names)
    write(tmp_path / "alone", names)
    assert open_global(tmp_path / "alone", names) is None


def test_a_flipped_bit_in_the_moved_base_is_told(tmp_path):
    base, moved = {"w": np.zeros(3), "v": np.ones(2)}, {"w": np.ones(3)}
    save_base(tmp_path / BASE, base, {**base, **moved})
    write(tmp_path, ["one"])
    np.testing.assert_array_equal(load_base(tmp_path, base)["w"], [1, 1, 1])
    content = bytearray((tmp_path / BASE).read_bytes())
    content[-2] ^= 1
    (tmp_path / BASE).write_bytes(content)
    with pytest.raises(UserError, match=r"base\.safetensors is not as it was written"):
        load_base(tmp_path, base)
    (tmp_path / BASE).unlink()
    with pytest.raises(UserError, match=r"base\.safetensors cannot be read"):
        load_base(tmp_path, base)


LISTS = [
    *(b"", b"{", b"[]", b"null", b"{}", b'{"clients": {}}', b'{"common": {}, "clients": {"one": "one.safetensors"}}'),
    *(b'{"common": {}, "clients": {"one": {"file": 3, "digest": ""}}}', b"\xff\xfe", b'{"common": 3, "clients": {}}'),
]


@pytest.mark.parametrize("content", LISTS)
def test_a_damaged_list_is_told(tmp_path, content):
    write(tmp_path, ["one"])
    (tmp_path / LIST).write_bytes(content)
    with pytest.raises(UserError, match=r"clients\.json is damaged; it lists the clients' adapters"):
        open_adapters(tmp_path, ["one"])


def test_adapters_of_version_0_1_have_no_list(tmp_path):
    with pytest.raises(UserError, match=r"clients\.json is missing, .*version 0\.1"):
        open_adapters(tmp_path, ["one"])


def test_a_list_leads_nowhere_else(tmp_path):
    """The folder may be a stranger's."""
    write(tmp_path / "adapters", ["one"])
    listed = json.loads((tmp_path / "adapters" / LIST).read_text(encoding="utf-8"))
    (tmp_path / "elsewhere.safetensors").write_bytes(
        (tmp_path / "adapters" / "clients" / "one.safetensors").read_bytes()
    )
    listed[LISTED]["one"]["file"] = "../../elsewhere.safetensors"
    (tmp_path / "adapters" / LIST).write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(UserError, match=r"clients/elsewhere\.safetensors is missing"):
        open_adapters(tmp_path / "adapters", ["one"])


# --- Bytes and modes ---

SCRIPT = (
    "from faults.test_client_names import write; import pathlib, sys; write(pathlib.Path(sys.argv[1]), ['one', 'Zwei'])"
)


def test_equal_runs_leave_equal_bytes(tmp_path):
    """In processes that hash in other orders."""
    begun = []
    for seed in ("1", "2"):
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        begun.append(subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / seed)], env=environment))
    assert [process.wait() for process in begun] == [0, 0]
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_metadata_are_in_order_however_often_they_are_written(tmp_path):
    from safetensors import safe_open

    written = set()
    for number in range(8):
        write(tmp_path / str(number), ["Größe 1"])
        file = tmp_path / str(number) / "clients" / name_file("Größe 1")
        written.add(file.read_bytes())
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {
                "format": "fedvlm-jax", "method": "plora", "round": "3", "seed": "1", "part": "personal",
                "client": "Größe 1",
            }  # fmt: skip
            np.testing.assert_array_equal(opened.get_tensor("fc1/b"), np.zeros(4))
    assert len(written) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path, ["one", "Two"])
        save_base(tmp_path / BASE, {"w": np.zeros(3)}, {"w": np.ones(3)})
        ClientStates({}, 3, tmp_path / "states-0.bin")
    finally:
        os.umask(before)
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert files == dict.fromkeys(files, mode)
    assert len(files) == 6
