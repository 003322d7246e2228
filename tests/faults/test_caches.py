"""What can be made again, under any number of processes, kills and damage: wrong content is never returned."""

import ast
import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import fedvlm_jax
from fedvlm_jax.data.table import ImageFacts, Table
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.artifacts import LIST, open_adapters
from fedvlm_jax.utils import digests
from fedvlm_jax.utils.files import read_plain
from fedvlm_jax.utils.record_store import ENTRY, KEY, Records

SIZE = 3000
KEYS = 60
SOURCE = Path(fedvlm_jax.__file__).parent

WRITER = f"""
import random, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_caches import add_some
add_some(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


def make_key(number):
    return hashlib.blake2b(str(number).encode(), digest_size=KEY).digest()


def make_record(number):
    return random.Random(number).randbytes(SIZE)


def add_some(folder, seed, rounds):
    """What one process does: asks for records in an order of its own, and adds those that are not there."""
    records, rng = Records(folder, SIZE), random.Random(seed)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    for _ in range(rounds):
        numbers = rng.sample(range(KEYS), 7)
        records.refresh()
        missing = []
        for number in numbers:
            found = records.read(make_key(number))
            assert found in (None, make_record(number)), "a record of another key"
            missing += [number] if found is None else []
        records.add([make_key(number) for number in missing], [make_record(number) for number in missing])


def start(folder, seed, rounds):
    command = [sys.executable, "-c", WRITER, str(folder), str(seed), str(rounds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


def test_processes_that_share_a_folder_read_what_belongs_to_a_key(tmp_path):
    """Both are open before either has finished; a third one looks when they have."""
    both = [start(tmp_path, seed, 40) for seed in (1, 2)]
    assert [process.wait(60) for process in both] == [0, 0]
    records = Records(tmp_path, SIZE)
    assert len(records) == KEYS
    assert all(records.read(make_key(number)) == make_record(number) for number in range(KEYS))


def test_a_process_killed_while_it_writes_spoils_nothing_for_another(tmp_path):
    steady = start(tmp_path, 0, 200)
    for seed in range(1, 4):
        victim = start(tmp_path, seed, 10**6)
        time.sleep(0.01 * seed)
        victim.send_signal(signal.SIGKILL)
        victim.wait(60)
    assert steady.wait(60) == 0
    records = Records(tmp_path, SIZE)
    found = [records.read(make_key(number)) for number in range(KEYS)]
    assert all(record in (None, make_record(number)) for number, record in enumerate(found))
    assert sum(record is not None for record in found) > KEYS // 2


@pytest.mark.parametrize("place", [0, SIZE // 2, 3 * SIZE - 1])
@pytest.mark.parametrize("suffix", ["rows", "keys"])
def test_a_flipped_bit_or_byte_anywhere_is_noticed(tmp_path, suffix, place):
    numbers = range(3)
    Records(tmp_path, SIZE).add([make_key(n) for n in numbers], [make_record(n) for n in numbers])
    (file,) = tmp_path.glob(f"*.{suffix}")
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 16
    file.write_bytes(content)
    records = Records(tmp_path, SIZE)
    found = [records.read(make_key(number)) for number in numbers]
    assert sum(record is None for record in found) == 1
    assert all(record in (None, make_record(number)) for number, record in enumerate(found))


def test_nothing_added_leaves_no_files(tmp_path):
    """A store that is full adds nothing for the whole of a run, and every later one would open its files."""
    records = Records(tmp_path, SIZE)
    records.add([], [])
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix] == []
    records.add([make_key(1)], [make_record(1)])
    assert Records(tmp_path, SIZE).read(make_key(1)) == make_record(1)


def test_records_of_another_key_in_place_of_one_s_own_are_noticed(tmp_path):
    Records(tmp_path, SIZE).add([make_key(1), make_key(2)], [make_record(1), make_record(2)])
    (file,) = tmp_path.glob("*.rows")
    file.write_bytes(file.read_bytes()[SIZE:] + file.read_bytes()[:SIZE])
    records = Records(tmp_path, SIZE)
    assert records.read(make_key(1)) is records.read(make_key(2)) is None


def test_a_disk_that_takes_no_more_costs_time_and_nothing_else(tmp_path, caplog):
    records = Records(tmp_path, SIZE)
    records.add([make_key(1)], [make_record(1)])
    (file,) = tmp_path.glob("*.rows")
    content = file.read_bytes()
    file.unlink()
    file.symlink_to("/dev/full")
    for number in (2, 3):
        records.add([make_key(number)], [make_record(number)])
    file.unlink()
    file.write_bytes(content + make_record(2)[:100])  # what a disk takes before it is full
    assert caplog.text.count("No space left") == 1
    again = Records(tmp_path, SIZE)
    assert [again.read(make_key(n)) for n in (1, 2, 3)] == [make_record(1), None, None]
    assert records.read(make_key(1)) == make_record(1)


def test_facts_of_two_processes_are_joined_and_damage_is_noticed(tmp_path):
    file = tmp_path / "facts.npz"
    one, two = ImageFacts.open(file), ImageFacts.open(file)
    one.digests, one.sound = {0: b"a" * 16, 5: b"b" * 16}, {0}
    two.digests, two.sound = {5: b"b" * 16, 2: b"c" * 16}, {5}
    for facts in (one, two):
        facts.save(lambda row: True)
    found = ImageFacts.open(file)
    assert found.digests == {**one.digests, **two.digests}
    assert found.sound == {0, 5}
    assert list(tmp_path.iterdir()) == [file], "no scratch is left"
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        assert ImageFacts.open(file).digests == {}
    for content in (b"", whole[:20], whole[:-1], b"\x80\x04." * 40, np.zeros(3).tobytes()):
        file.write_bytes(content)
        assert ImageFacts.open(file).digests == {}


def test_nothing_in_the_package_unpickles():
    """What a pickle says is run, and caches lie in folders that others may have written."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(file, name) for name in names if name.split(".")[0] in UNPICKLERS]
            if isinstance(node, ast.Call) and any(word.arg == "allow_pickle" for word in node.keywords):
                found += [(file, "allow_pickle") for word in node.keywords
                          if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"]  # fmt: skip
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "pd.read_pickle"):
                found.append((file, ast.unparse(node)))
    assert not found


UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}


@pytest.mark.parametrize("embedded", [True, False])
def test_an_image_that_changes_under_a_run_is_not_taken_for_what_it_was(tmp_path, embedded):
    """Its features would be kept under the digest of the picture that it was."""
    for number, name in enumerate("ab"):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{name}.png")
    rows = [{"bytes": (tmp_path / "a.png").read_bytes() if embedded else None, "path": "a.png"}]
    table = Table("drawn", pa.table({"image": rows}), tmp_path)
    images = unique_images(table, [0])[0]
    assert images.decode(0).getpixel((0, 0)) == (0, 0, 0)
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes())
    if embedded:
        images = dataclasses.replace(images, keys=(images.keys[0][::-1],))
    with pytest.raises(UserError, match=r"row 0 of drawn is not what it was"):
        images.decode(0)


# --- What is no file ---


@pytest.fixture
def _patience():
    """Who waits for a pipe ends the test run, and does not hold it for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


PLANTED = {
    "pipe": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "folder": lambda file: file.mkdir(),
    "link to nowhere": lambda file: file.symlink_to("/nowhere/x"),
    "link to itself": lambda file: file.symlink_to(file.name),
}


@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize("kind", PLANTED)
def test_nobody_waits_for_what_is_no_file(tmp_path, monkeypatch, kind):
    """A pipe is waited for, and a device never ends: neither is opened, wherever a file of ours should be."""
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path))
    plant = PLANTED[kind]
    for name in ("a.keys", "b.rows", "facts.npz", LIST):
        plant(tmp_path / name)
        with pytest.raises(OSError, match=r"no regular|No such|Too many"):
            read_plain(tmp_path / name)
    (tmp_path / "a.rows").write_bytes(b"x" * SIZE)
    (tmp_path / "b.keys").write_bytes(b"x" * ENTRY)
    records = Records(tmp_path, SIZE)
    assert records.read(b"x" * KEY) is None
    assert not ImageFacts.open(tmp_path / "facts.npz").digests
    with pytest.raises(UserError, match=f"{LIST} is (damaged|missing)"):
        open_adapters(tmp_path, ["a"])
    known = tmp_path / "known"
    known.write_bytes(b"content")
    identity = digests._identify(known, known.stat())
    (tmp_path / digests.FOLDER).mkdir()
    plant(digests._place(identity))
    assert digests._recall(identity) is None
