"""Several pictures, tiles and turns live, against transformers + PyTorch: `pytest -m parity`."""

import importlib.util

import jax
import numpy as np
import pytest
from models import causal_cases
from models.test_picture_prompts import TALK, WHOLE

from fedvlm_jax.data.prompts import Prompt, Tiles
from fedvlm_jax.models import load_weights, open_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]
ANSWERS = ["a car", "no", "yes it is one"]


@pytest.mark.parametrize(
    "name", ["smolvlm", "qwen3-vl", "qwen2.5-vl", "gemma3", "llava", "llava_onevision", "internvl"]
)
def test_rows_of_one_and_two_pictures_are_those_of_transformers(name, tmp_path):
    causal_cases.CASES[name](tmp_path)
    prompts = [Prompt("", TALK, WHOLE), Prompt("why?"), Prompt("which one?", pictures=WHOLE)]
    if name == "llava_onevision":  # of one picture transformers makes several tiles
        prompts[1] = Prompt("why?", pictures=WHOLE)
    compare(tmp_path, prompts, {})


def test_tiles_are_seen_as_transformers_does(tmp_path):
    causal_cases.CASES["smolvlm"](tmp_path)
    prompts = [Prompt("why?", pictures=(tiles,)) for tiles in (Tiles(1, 2), Tiles(), Tiles(2, 2))]
    compare(tmp_path, prompts, {"image_tiles": 2})


def compare(folder, prompts, options):
    """Logits and answers of prompts in one batch, with those of each alone."""
    from models import causal_reference

    reference = causal_reference.make_model(folder)
    vlm, processor = open_model(folder, **options)
    params = load_weights(vlm, folder)
    most, (height, width) = max(prompt.views for prompt in prompts), processor.size
    rng = np.random.default_rng(0)
    pixels = np.zeros((len(prompts), most, height, width, 3), np.float32)
    for row, prompt in zip(pixels, prompts, strict=True):
        row[: prompt.views] = rng.uniform(-1, 1, row[: prompt.views].shape)
    ids, mask = processor.prompts(prompts)
    labels = processor.answers(ANSWERS, 8)
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    shown = [row[: prompt.views] for row, prompt in zip(pixels, prompts, strict=True)]
    theirs = batch | {"pixel_values": shown}
    found = jax.jit(vlm.logits)(params, None, batch | {"labels": labels})
    wanted = causal_reference.find_logits(reference, theirs, labels)
    np.testing.assert_allclose(np.where(labels[..., None] == -100, 0, found), wanted, atol=1e-4)
    features = vlm.image_features(params, None, pixels.reshape(-1, height, width, 3))
    kept = batch | {"image_features": np.asarray(features).reshape(len(prompts), most, *features.shape[1:])}
    del kept["pixel_values"]
    again = jax.jit(vlm.logits)(params, None, kept | {"labels": labels})
    np.testing.assert_allclose(again, found, atol=1e-4)
    made = np.asarray(vlm.generate(params, None, kept, 7))
    np.testing.assert_array_equal(made, causal_reference.generate(reference, theirs, 7))
