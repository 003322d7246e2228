"""Pictures of Qwen-VL on grids of their own: sizes, prompts, positions, features and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid_pictures import PIXELS, SHAPES, draw, list_pictures
from models import causal_cases

from fedvlm_jax.data.prompts import Grid, Prompt
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs import view_features
from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.federation.inputs.view_features import open_features
from fedvlm_jax.models import load_weights, open_model, open_processor
from fedvlm_jax.models.qwen_vl.grid import place_tokens
from fedvlm_jax.utils.record_store import ENTRY


@pytest.fixture(scope="module", params=["qwen2.5-vl", pytest.param("qwen3-vl", marks=pytest.mark.broad)])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("folder")
    causal_cases.write_model(request.param, made)
    return made


@pytest.fixture(scope="module")
def model(folder):
    """Model, parameters and processor."""
    vlm, processor = open_model(folder, image_pixels=PIXELS)
    return vlm, load_weights(vlm, folder), processor


def change_settings(folder, made, **settings):
    """The folder with other settings of its image processor."""
    for file in folder.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    file = made / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return made


def test_grids_keep_proportions_within_the_bounds(model):
    _, _, processor = model
    assert (processor.grids.most, processor.size, processor.image_tokens) == (25, (40, 40), 25)
    grids = [processor.cut(height, width) for width, height in SHAPES]
    # 60x20 is brought to 64x16 pixels; 24x70 to 16x64, for 24x72 were 1728; 200x90 to 56x24; 9x40 to 8x40.
    assert grids == [Grid(2, 8), Grid(8, 2), Grid(4, 4), Grid(3, 7), Grid(5, 1)]
    assert processor.cut(1, 1) == Grid(1, 1)
    assert processor.cut(3000, 3000) == Grid(5, 5)


def test_a_prompt_has_as_many_image_tokens_as_its_pictures(model):
    vlm, _, processor = model
    ids, mask = processor.prompts([Prompt("why?", pictures=(Grid(2, 8), Grid(5, 1))), Prompt("why?"), "why?"])
    assert (ids == vlm.image_token_id).sum(1).tolist() == [21, 25, 25]
    assert mask.sum(1).tolist() == [mask[1].sum() + 21 - 25 + 2, *[mask[1].sum()] * 2]


def test_other_bounds_are_another_processor(folder, model):
    assert model[2].fingerprint != open_processor(folder, image_pixels=PIXELS + 64).fingerprint


def place_by_hand(is_image, grids, axes):
    """Positions as arXiv 2409.12191 says them, token by token."""
    rows = []
    for seen, pictures in zip(is_image, grids, strict=True):
        left, place, following = [grid for grid in pictures if grid[0]], 0, 0
        out = np.zeros((len(seen), 3), int)
        while place < len(seen):
            if seen[place]:
                high, wide = left.pop(0)
                for number in range(high * wide):
                    out[place + number] = following + np.array([0, number // wide, number % wide])
                place, following = place + high * wide, following + max(high, wide)
            else:
                out[place] = following
                place, following = place + 1, following + 1
        rows.append(out[:, axes])
    return np.stack(rows)


def test_positions_of_mixed_grids_are_those_worked_out_token_by_token():
    is_image, grids = np.zeros((3, 40), bool), np.zeros((3, 3, 2), np.int32)
    for row, pictures in enumerate(([(2, 3, 5), (18, 1, 7), (25, 3, 4)], [(0, 6, 1), (6, 2, 2)], [])):
        for number, (place, high, wide) in enumerate(pictures):  # some stand side by side
            is_image[row, place : place + high * wide], grids[row, number] = True, (high, wide)
    axes = (0, 1, 2, 0, 1, 2)
    found = jax.jit(place_tokens, static_argnums=2)(jnp.asarray(is_image), jnp.asarray(grids), axes)
    np.testing.assert_array_equal(found, place_by_hand(is_image, grids, list(axes)))


def test_squares_are_a_special_case():
    is_image = jnp.asarray([[False] + [True] * 9 + [False, False] + [True] * 9 + [False]])
    grids = jnp.asarray([[[3, 3], [3, 3], [0, 0]]], jnp.int32)
    one, other = place_tokens(is_image, 9, (0, 1, 2)), place_tokens(is_image, grids, (0, 1, 2))
    np.testing.assert_array_equal(one, other)


def gather(store, views, index, tokens=50):
    return store.gather(views, np.asarray(index), tokens)


def test_features_do_not_depend_on_what_else_is_asked_and_a_size_is_compiled_once(model):
    vlm, params, processor = model
    shapes = [*SHAPES, (50, 21), (40, 40), (24, 24), (80, 8), (16, 56)]
    views = list_pictures(draw(shapes), processor)
    features = open_features(vlm, params, processor)
    counted = features.compute.func
    whole = gather(FeatureStore(features, limit=2**20), views, np.arange(10)[:, None])
    sizes = {min(view_features.bucket(int(count)), 25) for count in features.count(views)}
    assert counted._cache_size() == len(sizes) < 6
    for order in ([[9], [3], [0]], [[3]], [[1], [2]]):
        found = gather(FeatureStore(features, limit=2**20), views, order)
        np.testing.assert_array_equal(found, whole[np.ravel(order)])
    assert counted._cache_size() == len(sizes)
    two = gather(FeatureStore(features, limit=2**20), views, [[3, 0], [4, -1]])
    counts = features.count(views).tolist()
    np.testing.assert_array_equal(two[0, : counts[3]], whole[3, : counts[3]])
    np.testing.assert_array_equal(two[0, counts[3] : counts[3] + counts[0]], whole[0, : counts[0]])
    assert not two[0, counts[3] + counts[0] :].any()
    assert not two[1, counts[4] :].any()


def test_a_square_has_the_features_of_the_program_of_one_size(model):
    vlm, params, processor = model
    picture = draw([(40, 40)])[0]
    views = list_pictures([picture], processor)
    found = gather(FeatureStore(open_features(vlm, params, processor), limit=0), views, [[0]], 25)[0]
    np.testing.assert_allclose(found, vlm.image_features(params, None, processor.pixels([picture]))[0], atol=2e-5)


def test_padding_is_not_seen(model):
    """A picture in a larger size, and another's patches where its padding is: the same features."""
    vlm, params, processor = model
    grid = processor.cut(20, 60)
    patches = processor.grids.patches(draw()[0])
    made = []
    for length, fill in ((64, 0.0), (100, 0.0), (100, 7.0)):
        filled = np.concatenate([patches, np.full((length - len(patches), patches.shape[1]), fill, np.float32)])
        places = jax.tree.map(lambda leaf: leaf[None], vlm.grids.places(*grid, length))
        made.append(jax.jit(vlm.grids.features)(params, filled[None], places)[0, : grid.tokens])
    np.testing.assert_allclose(made[1], made[0], atol=2e-5)
    np.testing.assert_array_equal(made[2], made[1])


class Counting:
    """Features of pictures on grids, and a note of how many were made."""

    def __init__(self, features):
        self.features, self.made = features, []

    def __getattr__(self, name):
        return getattr(self.features, name)

    def make(self, views, part):
        self.made += part.tolist()
        return self.features.make(views, part)


@pytest.fixture(scope="module")
def features(model):
    return open_features(*model)


def test_a_store_counts_bytes_of_what_pictures_really_take(model, features, tmp_path):
    _, _, processor = model
    views = list_pictures(draw(), processor)
    token = features.width * 4
    counts = features.count(views)
    assert counts.tolist() == [16, 16, 16, 21, 5]
    for folder in (None, tmp_path / "features"):
        counting = Counting(features)
        store = FeatureStore(counting, limit=40 * token + 1, folder=folder)
        assert "3 of 5 new ones fit" in store.announce(views)  # 16, 16 and 5 tokens
        for _ in range(2):
            gather(store, views, np.arange(5)[:, None])
        # The smallest size goes first: 5, then 16 tokens.
        assert len(store) == 3
        assert sorted(counting.made[5:]) == sorted(set(range(5)) - {0, 1, 4})
        if folder is not None:
            assert sum(file.stat().st_size for file in folder.glob("*.rows")) == 37 * token


def test_stores_that_share_a_folder_find_each_other_s_pictures(model, features, tmp_path):
    views = list_pictures(draw(), model[2])
    wanted = gather(FeatureStore(features, limit=2**20), views, np.arange(5)[:, None])
    counting = [Counting(features), Counting(features)]
    one, two = (FeatureStore(each, limit=2**20, folder=tmp_path) for each in counting)
    gather(one, views, [[0], [3]])
    np.testing.assert_array_equal(gather(two, views, [[3], [1]]), wanted[[3, 1]])
    np.testing.assert_array_equal(gather(one, views, np.arange(5)[:, None]), wanted)
    assert sorted(counting[0].made + counting[1].made) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("suffix", "cut"), [("rows", 1), ("rows", 2000), ("keys", 1), ("keys", ENTRY + 1)])
def test_a_kill_while_writing_loses_what_was_being_written(model, features, tmp_path, suffix, cut):
    views = list_pictures(draw(), model[2])
    wanted = gather(FeatureStore(features, limit=2**20, folder=tmp_path), views, np.arange(5)[:, None])
    (file,) = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-cut])
    counting = Counting(features)
    store = FeatureStore(counting, limit=2**20, folder=tmp_path)
    np.testing.assert_array_equal(gather(store, views, np.arange(5)[:, None]), wanted)
    assert 0 < len(counting.made) < 5


@pytest.mark.parametrize("place", range(0, ENTRY, 5))
def test_a_damaged_entry_is_computed_again(model, features, tmp_path, place):
    """Key, first row, number of rows and digest: a flipped bit anywhere is noticed."""
    views = list_pictures(draw(), model[2])
    wanted = gather(FeatureStore(features, limit=2**20, folder=tmp_path), views, np.arange(5)[:, None])
    (file,) = tmp_path.glob("*.keys")
    content = bytearray(file.read_bytes())
    content[2 * ENTRY + place] ^= 128
    file.write_bytes(content)
    counting = Counting(features)
    np.testing.assert_array_equal(
        gather(FeatureStore(counting, limit=2**20, folder=tmp_path), views, np.arange(5)[:, None]), wanted
    )
    assert len(counting.made) == 1


def test_what_cannot_be_is_refused_in_a_line(folder, tmp_path):
    for pixels, why in ((63, "an image token of .* has 64 pixels"), (2**25, r"from that to 4,194,304")):
        with pytest.raises(UserError, match=f"--image-pixels {pixels}: .*{why}"):
            open_processor(folder, image_pixels=pixels)
    with pytest.raises(UserError, match="--image-size and --image-pixels exclude each other"):
        open_processor(folder, 40, image_pixels=PIXELS)
    with pytest.raises(UserError, match="have no grids of their own: leave --image-pixels out"):
        open_processor("florence2-nano", image_pixels=PIXELS)
    made = change_settings(folder, tmp_path, size={"shortest_edge": 2000, "longest_edge": 4000})
    with pytest.raises(UserError, match="gives pictures 2,000 at least: say 2,304 or more"):
        open_processor(made, image_pixels=PIXELS)
    processor = open_processor(folder, image_pixels=PIXELS)
    for size, why in (
        ((1, 201), "more than 200 times the other"),
        ((8, 1000), "more than --image-pixels 1600"),
    ):
        with pytest.raises(UserError, match=f"a picture.*{why}"):
            processor.cut(*size)


def test_published_bounds_count_pixels_and_are_no_sides(folder, tmp_path):
    made = change_settings(folder, tmp_path, size={"shortest_edge": 65536, "longest_edge": 16777216})
    assert open_processor(made).size == (448, 448)
    assert open_processor(made, image_pixels=2**17).cut(10, 10) == Grid(32, 32)
