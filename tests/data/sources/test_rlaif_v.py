"""RLAIF-V's own reading, on made-up shards of its form."""

import datasets
import numpy as np
import pytest
from make_parquet import draw_image, make_row, write_rows
from rlaif_form import SOURCES, Form, write_folder

from fedvlm_jax.data import unique_images as images_module
from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.image_decoding import BrokenImageError
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.table import FACTS
from fedvlm_jax.data.unique_images import digest_rows, unique_images
from fedvlm_jax.errors import UserError

NAMED = make_options(source="rlaif-v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlaif-v")
    write_folder(folder, Form(rows=400, shards=3))
    return folder


def test_a_folder_of_shards_is_cut_into_its_sources(folder):
    table = read_table(NAMED.replace(path=folder))
    assert (table.name, len(table)) == ("rlaif-v", 400)
    federation = federate(table, NAMED, 0)
    assert federation.names == tuple(sorted(SOURCES))
    assert sorted(federation.rows) == list(range(400))
    sizes = {client.name: sum(len(client.rows_of(split)) for split in SPLITS) for client in federation.clients}
    assert sizes["made-up-street"] > 50 * sizes["made-up-attic"]


def test_it_is_cut_anew_by_what_origin_split_says(folder):
    table = read_table(NAMED.replace(path=folder))
    options = make_options("rlaif-v", "dirichlet", partition_by="question_type", clients=5, alpha=0.2, limit=300)
    federation = federate(table, options, 0)
    assert len(federation.clients) == 5
    assert len(federation.rows) == 300
    assert federation.description["partition"]["values"] == 2
    digests = dict(zip(range(400), digest_rows(table, range(400))[0], strict=True))
    held = [{digests[row] for split in SPLITS for row in client.rows_of(split)} for client in federation.clients]
    assert sum(map(len, held)) == len(set().union(*held))


def test_what_is_not_rlaif_v_is_sent_to_the_flag_that_takes_it(tmp_path):
    with pytest.raises(UserError, match=r"--data.path .*nowhere does not exist"):
        read_table(NAMED.replace(path=tmp_path / "nowhere"))
    write_rows(tmp_path / "a.parquet", [make_row(0)], drop=["rejected", "origin_split"])
    with pytest.raises(UserError, match=r"is not RLAIF-V: it lacks rejected, origin_split .* --data /"):
        read_table(NAMED.replace(path=tmp_path))


def test_without_the_hub_the_way_to_get_it_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    expected = (
        r"at revision v1 cannot be fetched \(ConnectionError: no route\).*hf download .* --revision v1 --local-dir"
    )
    with pytest.raises(UserError, match=expected):
        read_table(NAMED.replace(revision="v1"))


def test_what_the_hub_gives_is_read_like_a_folder(folder, tmp_path, monkeypatch):
    asked = {}

    def give(name, **kwargs):
        asked.update(kwargs, name=name)
        given = datasets.Dataset.from_parquet([str(file) for file in sorted(folder.iterdir())], cache_dir=str(tmp_path))
        given.info.download_checksums = {f"hf://datasets/openbmb/RLAIF-V-Dataset@{'4' * 40}/a.parquet": {}}
        return given

    monkeypatch.setattr(datasets, "load_dataset", give)
    fetched, read = read_table(NAMED.replace(revision="abc")), read_table(NAMED.replace(path=folder))
    assert asked == {"name": "openbmb/RLAIF-V-Dataset", "split": "train", "revision": "abc"}
    assert federate(fetched, NAMED, 0).description["revision"] == "4" * 40
    assert "revision" not in federate(read, NAMED, 0).description
    assert {*fetched.columns} == {*read.columns}
    assert fetched.read_text("idx") == read.read_text("idx")
    assert [fetched.read_image(row) for row in range(0, 400, 37)] == [read.read_image(row) for row in range(0, 400, 37)]


def test_a_file_of_the_working_folder_is_no_image_of_the_hub_s(tmp_path, monkeypatch):
    rows = [make_row(0, image={"bytes": None, "path": "mine.png"}), make_row(1)]
    file = write_rows(tmp_path / "hub" / "a.parquet", rows)
    (tmp_path / "mine.png").write_bytes(draw_image(9))

    def give(name, **kwargs):
        return datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", give)
    table = read_table(NAMED)
    assert table.read_image(1) == draw_image(1)
    with pytest.raises(BrokenImageError, match="cannot be read"):
        table.read_image(0)


def test_images_are_hashed_and_checked_once_per_table(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path))
    first = read_table(NAMED.replace(path=folder))
    expected = digest_rows(first, range(400))[0]
    assert unique_images(first, range(400))[0].find_broken() == {}

    def fail(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(images_module, "decode_picture", fail)
    second = read_table(NAMED.replace(path=folder))
    monkeypatch.setattr(type(second), "read_image", fail)
    assert digest_rows(second, range(400))[0] == expected
    assert unique_images(second, range(400))[0].find_broken() == {}


def test_broken_images_are_checked_again_and_a_torn_file_is_no_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "data", Form(rows=60, shards=1, spoil={"broken image": 3, "no image": 2}))
    options = make_options(source=str(tmp_path / "data"))
    found = []
    for _ in range(3):
        table = read_table(options)
        images, index, missing = unique_images(table, range(60))
        found.append((images.keys, index.tolist(), missing, images.find_broken()))
        assert len(missing) == 2
        assert found[-1][3]
        (kept,) = (tmp_path / "cache").rglob(FACTS)
        if len(found) == 2:
            kept.write_bytes(kept.read_bytes()[:200])
    assert found[0] == found[1] == found[2]


def test_images_in_files_of_their_own_are_hashed_anew(tmp_path):
    (tmp_path / "0.png").write_bytes(b"one")
    path = write_rows(tmp_path / "a.parquet", [make_row(0, image={"bytes": None, "path": "0.png"}), make_row(1)])
    before = digest_rows(read_table(str(path)), [0, 1])[0]
    (tmp_path / "0.png").write_bytes(b"two")
    after = digest_rows(read_table(str(path)), [0, 1])[0]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_bytes_are_read_from_the_file_as_the_mapping_has_them(folder):
    table = read_table(NAMED.replace(path=folder))
    assert table.locations is not None
    column = table.data.column("image")
    for row in np.random.default_rng(0).integers(0, 400, 50).tolist():
        assert table.locations.read(row) == column[row].as_py()["bytes"] == table.read_image(row)
