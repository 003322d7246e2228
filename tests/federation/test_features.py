"""Frozen features by image content: computed once while they fit, in memory or on disk, whole after a kill."""

import io
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fedvlm_jax.data.images import Images, unique_images
from fedvlm_jax.data.table import BrokenImageError, Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.features import FeatureStore, choose_chunk

SIDE = 4
ROW = 2 * SIDE * 3 * 4  # bytes: two tokens of twelve float32


class Reader:
    size = (SIDE, SIDE)
    fingerprint = "plain"

    def pixels(self, images, /):
        return np.stack([np.asarray(image, np.float32) for image in images])


class Tower:
    """Two tokens a picture, and a note of how many pictures were asked for; padding is not told from pictures."""

    def __init__(self):
        self.batches = []

    def __call__(self, pixels):
        if isinstance(pixels, np.ndarray):  # not while shapes are traced
            self.batches.append(len(pixels))
        return jnp.stack([pixels.sum(1).reshape(len(pixels), -1), pixels[:, 0].reshape(len(pixels), -1)], 1)


def make_images(count: int, broken: int | None = None) -> Images:
    def draw(number):
        out = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (number, 2 * number % 256, 7)).save(out, "PNG")
        return out.getvalue() if number != broken else out.getvalue()[:30]

    rows = [{"bytes": draw(number), "path": None} for number in range(count)]
    table = Table("drawn", pa.table({"image": rows}), Path())
    return unique_images(table, np.arange(count))[0]


def expect(images: Images, index) -> np.ndarray:
    pixels = Reader().pixels([images.decode(int(number)) for number in np.ravel(index)])
    return np.asarray(Tower()(jnp.asarray(pixels))).reshape(*np.shape(index), 2, 3 * SIDE)


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "features"


def open_store(folder=None, limit=10**6, tower=None, **options):
    return FeatureStore(tower or Tower(), Reader(), limit=limit, folder=folder, **options)


def test_features_are_those_of_the_asked_images_in_any_order_and_shape(folder):
    images, store = make_images(50), open_store(folder)
    for index in (np.array([3]), np.array([[7, 3, 3], [0, 49, 7]]), np.arange(50)[::-1]):
        np.testing.assert_array_equal(store.gather(images, index), expect(images, index))
    assert store.gather(images, np.empty((3, 0), int)).shape == (3, 0, 2, 3 * SIDE)


def test_every_image_is_computed_once(folder):
    images, tower = make_images(40), Tower()
    store = open_store(folder, tower=tower)
    store.gather(images, np.arange(40))
    done = len(tower.batches)
    again = store.gather(images.select(np.arange(5, 20)), np.arange(15))  # other positions, the same contents
    assert len(tower.batches) == done
    assert len(store) == 40
    np.testing.assert_array_equal(again, expect(images, np.arange(5, 20)))


def test_chunks_have_two_shapes_and_little_padding(folder):
    images, tower = make_images(40), Tower()
    open_store(folder, tower=tower).gather(images, np.arange(40))
    assert tower.batches == [32, 4, 4]
    tower.batches.clear()
    open_store(tower=tower).gather(images, np.arange(1))
    assert tower.batches == [4]


def test_what_does_not_fit_is_right_and_not_kept(folder):
    images, tower = make_images(20), Tower()
    store = open_store(folder, limit=8 * ROW + ROW // 2, tower=tower)
    for _ in range(2):
        np.testing.assert_array_equal(store.gather(images, np.arange(20)), expect(images, np.arange(20)))
    assert len(store) == 8
    assert sum(tower.batches) == 20 + 12  # the second time only the twelve that are not kept
    if folder is not None:
        assert (folder / "features.bin").stat().st_size == 8 * ROW


def test_the_size_is_announced_before_anything_is_computed(folder):
    tower = Tower()
    store = open_store(folder, limit=8 * ROW, tower=tower)
    text = store.announce(make_images(20))
    assert not tower.batches
    assert "20 images" in text
    assert "8 of 20 new ones fit" in text
    assert "--system.cache-gib" in text
    assert ("in memory" in text) == (folder is None)
    assert "fit" not in open_store(limit=20 * ROW).announce(make_images(20))


def test_a_store_on_disk_is_found_again(tmp_path):
    images, tower = make_images(12), Tower()
    open_store(tmp_path).gather(images, np.arange(12))
    store = open_store(tmp_path, tower=tower)
    np.testing.assert_array_equal(store.gather(images, np.arange(12)), expect(images, np.arange(12)))
    assert not tower.batches
    assert "12 of them there already" in store.announce(images)


@pytest.mark.parametrize(("rows", "keys"), list(itertools.product((0, ROW // 2, ROW), (0, 5, 33))))
def test_a_kill_while_writing_loses_at_most_what_was_being_written(tmp_path, rows, keys):
    """Rows are written before keys; whatever is cut off at the end, what is found again is right."""
    images = make_images(6)
    open_store(tmp_path).gather(images, np.arange(6))
    with (tmp_path / "features.bin").open("ab") as file:
        file.write(b"\1" * rows)  # the next row, in part or whole, without its key
    text = (tmp_path / "keys.txt").read_text()
    (tmp_path / "keys.txt").write_text(text[: len(text) - keys])
    tower = Tower()
    store = open_store(tmp_path, tower=tower)
    assert len(store) == 6 - -(-keys // 33)
    np.testing.assert_array_equal(store.gather(images, np.arange(6)), expect(images, np.arange(6)))
    assert (tmp_path / "features.bin").stat().st_size == 6 * ROW


def test_threads_agree(folder):
    from concurrent.futures import ThreadPoolExecutor

    images, tower = make_images(60), Tower()
    store = open_store(folder, limit=30 * ROW, tower=tower)
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, 60, 25) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: store.gather(images, index), wanted))
    for index, features in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(features, expect(images, index))
    assert len(store) <= 30


def test_a_broken_image_is_an_error_and_spoils_nothing(folder):
    images, store = make_images(5, broken=3), open_store(folder)
    with pytest.raises(BrokenImageError):
        store.gather(images, np.arange(5))
    kept = np.array([0, 1, 2, 4])
    np.testing.assert_array_equal(store.gather(images, kept), expect(images, kept))


def test_a_folder_of_other_features_is_refused(tmp_path):
    open_store(tmp_path)
    (tmp_path / "shape.json").write_text('{"shape": [3, 12], "dtype": "float32"}')
    with pytest.raises(UserError, match="remove it"):
        open_store(tmp_path)


def test_pictures_of_base_size_go_in_small_chunks():
    assert [choose_chunk(side, side) for side in (16, 64, 224, 384, 768, 2000)] == [32, 32, 32, 16, 4, 1]
