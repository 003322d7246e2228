"""Frozen features by image content: computed once while they fit, in memory or on disk, whole after a kill."""

import io
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.picture_views import Views, list_views
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.federation.inputs.view_features import WIDTH, FixedFeatures, choose_chunk, open_features
from fedvlm_jax.models import load_vlm, resolve_folder
from fedvlm_jax.models.florence2 import Processor
from fedvlm_jax.training.round_setup import choose_arithmetic
from fedvlm_jax.utils.record_store import ENTRY

SIDE = 4
TOKENS = 2
ROW = TOKENS * SIDE * 3 * 4  # bytes of a picture: two tokens of twelve float32


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


def make_images(count: int, broken: int | None = None) -> Views:
    def draw(number):
        out = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (number, 2 * number % 256, 7)).save(out, "PNG")
        return out.getvalue() if number != broken else out.getvalue()[:30]

    rows = [{"bytes": draw(number), "path": None} for number in range(count)]
    table = Table("drawn", pa.table({"image": rows}), Path())
    return list_views(unique_images(table, np.arange(count))[0])


def draw_images(rng, count: int, size) -> Views:
    def draw():
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    table = Table("drawn", pa.table({"image": [draw() for _ in range(count)]}), Path())
    return list_views(unique_images(table, np.arange(count))[0])


def expect(images: Views, index) -> np.ndarray:
    pixels = Reader().pixels([images.images.decode(int(number)) for number in np.ravel(index)])
    return np.asarray(Tower()(jnp.asarray(pixels))).reshape(*np.shape(index), TOKENS, 3 * SIDE)


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "features"


def open_store(folder=None, limit=10**6, tower=None):
    features = FixedFeatures(tower or Tower(), Reader(), (TOKENS, 3 * SIDE), np.dtype(np.float32))
    return FeatureStore(features, limit=limit, folder=folder)


def gather(store, images, index):
    """Rows of one picture each."""
    return store.gather(images, np.asarray(index)[..., None], store.each)


def test_features_are_those_of_the_asked_images_in_any_order_and_shape(folder):
    images, store = make_images(50), open_store(folder)
    for index in (np.array([3]), np.array([[7, 3, 3], [0, 49, 7]]), np.arange(50)[::-1]):
        np.testing.assert_array_equal(gather(store, images, index), expect(images, index))
    assert gather(store, images, np.empty((3, 0), int)).shape == (3, 0, TOKENS, 3 * SIDE)


def test_a_row_s_pictures_are_one_after_another_and_zeros_follow(folder):
    images, store = make_images(5), open_store(folder)
    found = store.gather(images, np.array([[3, 1, -1], [4, -1, -1]]), 3 * TOKENS)
    wanted = np.zeros((2, 3 * TOKENS, 3 * SIDE), np.float32)
    wanted[0, : 2 * TOKENS], wanted[1, :TOKENS] = np.concatenate(expect(images, [3, 1])), expect(images, 4)
    np.testing.assert_array_equal(found, wanted)


def test_every_image_is_computed_once(folder):
    images, tower = make_images(40), Tower()
    store = open_store(folder, tower=tower)
    gather(store, images, np.arange(40))
    done = len(tower.batches)
    again = gather(
        store, list_views(images.images.select(np.arange(5, 20))), np.arange(15)
    )  # other positions, the same contents
    assert len(tower.batches) == done
    assert len(store) == 40
    np.testing.assert_array_equal(again, expect(images, np.arange(5, 20)))


def test_batches_have_one_size_whatever_is_asked(folder):
    """Another size would be another program, and round otherwise."""
    tower = Tower()
    for count in (1, 6, 40):
        gather(open_store(tower=tower), make_images(count), np.arange(count))
    assert set(tower.batches) == {WIDTH}
    assert len(tower.batches) == 1 + 2 + 10


def test_a_picture_has_the_same_bits_whatever_was_computed_before_and_beside_it():
    """On the shipped model: resumed runs compute what is missing, in other batches than the run they go on with."""
    folder = resolve_folder(Run().model)
    processor = Processor.from_folder(folder)
    vlm, params = load_vlm(folder, **choose_arithmetic(Run().system))
    rng = np.random.default_rng(0)
    images, order = draw_images(rng, 22, processor.size), rng.permutation(22)

    features = open_features(vlm, params, processor)

    def ask(*parts):
        store = FeatureStore(features, limit=2**30)
        found = {}
        for part in parts:
            found |= dict(zip(part.tolist(), gather(store, images, part), strict=True))
        return np.stack([found[image] for image in range(22)])

    whole = ask(np.arange(22))
    assert np.unique(whole).size > 1000
    np.testing.assert_array_equal(ask(order), whole)
    np.testing.assert_array_equal(ask(*np.split(order, (1, 3, 6, 15))), whole)


def test_what_does_not_fit_is_right_and_not_kept(folder):
    images, tower = make_images(20), Tower()
    store = open_store(folder, limit=8 * ROW + ROW // 2, tower=tower)
    for _ in range(2):
        np.testing.assert_array_equal(gather(store, images, np.arange(20)), expect(images, np.arange(20)))
    assert len(store) == 8
    assert sum(tower.batches) == 20 + 12  # the second time only the twelve that are not kept
    if folder is not None:
        assert sum(file.stat().st_size for file in folder.glob("*.rows")) == 8 * ROW


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
    gather(open_store(tmp_path), images, np.arange(12))
    store = open_store(tmp_path, tower=tower)
    np.testing.assert_array_equal(gather(store, images, np.arange(12)), expect(images, np.arange(12)))
    assert not tower.batches
    assert "12 of them there already" in store.announce(images)


@pytest.mark.parametrize("suffix", ["rows", "keys"])
@pytest.mark.parametrize("cut", [1, ENTRY, ROW, ROW + 33])
def test_a_kill_while_writing_loses_at_most_what_was_being_written(tmp_path, suffix, cut):
    """Whatever is cut off at the end, what is found again is right, and what is lost is computed."""
    images = make_images(6)
    gather(open_store(tmp_path), images, np.arange(6))
    (file,) = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-cut])
    tower = Tower()
    store = open_store(tmp_path, tower=tower)
    np.testing.assert_array_equal(gather(store, images, np.arange(6)), expect(images, np.arange(6)))
    record = ROW if suffix == "rows" else ENTRY
    assert len(tower.batches) == math.ceil(math.ceil(cut / record) / WIDTH)


def test_threads_agree(folder):
    from concurrent.futures import ThreadPoolExecutor

    images, tower = make_images(60), Tower()
    store = open_store(folder, limit=30 * ROW, tower=tower)
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, 60, 25) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: gather(store, images, index), wanted))
    for index, features in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(features, expect(images, index))
    assert len(store) <= 30


def test_a_broken_image_is_an_error_and_spoils_nothing(folder):
    images, store = make_images(5, broken=3), open_store(folder)
    with pytest.raises(UserError, match=r"row 3 of .*: broken or truncated image\. "):
        gather(store, images, np.arange(5))
    kept = np.array([0, 1, 2, 4])
    np.testing.assert_array_equal(gather(store, images, kept), expect(images, kept))


def test_a_folder_of_other_features_is_refused(tmp_path):
    open_store(tmp_path)
    (tmp_path / "shape.json").write_text('{"width": 24, "dtype": "float32"}')
    with pytest.raises(UserError, match="remove it"):
        open_store(tmp_path)


def test_stores_that_share_a_folder_give_the_numbers_of_each_alone(tmp_path):
    """Opened at once, filled in turn, and one of them dies and comes back."""
    images, one, two = make_images(40), open_store(tmp_path), open_store(tmp_path)
    for part in np.split(np.random.default_rng(0).permutation(40), 8):
        np.testing.assert_array_equal(gather(one, images, part[:3]), expect(images, part[:3]))
        np.testing.assert_array_equal(gather(two, images, part[2:]), expect(images, part[2:]))
        two = open_store(tmp_path)
        np.testing.assert_array_equal(gather(one, images, part), expect(images, part))
    tower = Tower()
    np.testing.assert_array_equal(gather(open_store(tmp_path, tower=tower), images, np.arange(40)),
                                  expect(images, np.arange(40)))  # fmt: skip
    assert not tower.batches


def test_another_process_s_features_count_towards_the_bound(tmp_path):
    images, one, two = make_images(16), open_store(tmp_path, limit=8 * ROW), open_store(tmp_path, limit=8 * ROW)
    gather(one, images, np.arange(6))
    gather(two, images, np.arange(6, 16))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.rows")) == 8 * ROW


@pytest.mark.parametrize("place", [0, 5 * ROW + 17, 12 * ROW - 1])
def test_features_with_a_flipped_bit_are_computed_again(tmp_path, place):
    images = make_images(12)
    gather(open_store(tmp_path), images, np.arange(12))
    (file,) = tmp_path.glob("*.rows")
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    tower = Tower()
    store = open_store(tmp_path, tower=tower)
    np.testing.assert_array_equal(gather(store, images, np.arange(12)), expect(images, np.arange(12)))
    assert tower.batches == [WIDTH]
    again = open_store(tmp_path, tower=tower)
    np.testing.assert_array_equal(gather(again, images, np.arange(12)), expect(images, np.arange(12)))
    assert tower.batches == [WIDTH], "the good row is found beside the bad one"


def test_pictures_of_base_size_go_in_small_chunks():
    assert [choose_chunk(side * side) for side in (16, 64, 224, 384, 768, 2000)] == [32, 32, 32, 16, 4, 1]
