"""Decoder-only models live, against transformers + PyTorch: `pytest -m parity` with the extra `parity`."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.published import SMALLEST
from models import causal_cases
from models.cases import to_settings
from models.llava_folders import SPELLINGS, save, spell
from PIL import Image

from fedvlm_jax.models import load_vlm, load_weights, open_model, read_vlm, save_checkpoint
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.objectives.config import PreferenceOptions

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]
QUESTIONS, ANSWERS = ["what is this?", "a", "is it a red car, or two?"], ["a car", "no", "yes it is one"]


@pytest.fixture(scope="module", params=causal_cases.CASES)
def case(request, tmp_path_factory):
    """Folder, reference, model, weights, processor, batch and labels."""
    from models import causal_reference

    folder = tmp_path_factory.mktemp(request.param)
    causal_cases.CASES[request.param](folder)
    reference = causal_reference.make_model(folder)
    vlm, processor = open_model(folder)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in QUESTIONS]
    ids, mask = processor.prompts(QUESTIONS)
    batch = {"pixel_values": processor.pixels(images), "input_ids": ids, "attention_mask": mask}
    return folder, reference, vlm, load_weights(vlm, folder), batch, processor.answers(ANSWERS, 8)


def test_logits_are_those_of_transformers(case):
    from models import causal_reference

    _, reference, vlm, params, batch, labels = case
    found = jax.jit(vlm.logits)(params, None, batch | {"labels": labels})
    wanted = causal_reference.find_logits(reference, batch, labels)
    assert np.abs(wanted).max() > 3, "logits that are all alike show nothing"
    np.testing.assert_allclose(np.where(labels[..., None] == -100, 0, found), wanted, atol=1e-4)


def test_features_are_those_of_transformers(case):
    from models import causal_reference

    _, reference, vlm, params, batch, _ = case
    wanted = causal_reference.find_features(reference, batch)
    found = jax.jit(lambda params, pixels: vlm.image_features(params, None, pixels))(params, batch["pixel_values"])
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())


def test_the_loss_is_that_of_transformers(case):
    from models import causal_reference

    _, reference, vlm, params, batch, labels = case
    loss = load_objective("sft", PreferenceOptions()).loss
    found, _ = jax.jit(lambda params, batch: loss(vlm, params, None, batch))(params, batch | {"labels": labels})
    np.testing.assert_allclose(found, causal_reference.find_loss(reference, batch, labels), rtol=1e-5)


@pytest.mark.parametrize("search", causal_cases.SEARCHES)
def test_answers_are_those_of_transformers(case, search):
    from models import causal_reference

    _, reference, vlm, params, batch, _ = case
    options = causal_cases.SEARCHES[search]
    found = np.asarray(vlm.generate(params, None, batch, 7, **to_settings(options)))
    np.testing.assert_array_equal(found, causal_reference.generate(reference, batch, 7, **options))
    assert len({tuple(row) for row in found.tolist()}) == len(found), "answers must depend on picture and question"


def test_transformers_loads_what_is_saved(case, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder, _, vlm, params, *_ = case
    save_checkpoint(vlm, params, tmp_path, source=folder)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    for (name, one), two in zip(again.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert (one == two).all(), name


def test_bfloat16_is_as_close_as_that_of_pytorch(case):
    import torch
    from models import causal_reference

    folder, reference, _, _, batch, labels = case
    exact = causal_reference.find_logits(reference, batch, labels)
    vlm, params = load_vlm(folder, dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    ours = jax.jit(vlm.logits)(params, None, batch | {"labels": labels})
    narrow = reference.to(torch.bfloat16)
    try:
        theirs = causal_reference.find_logits(narrow, batch, labels)
    finally:
        reference.to(torch.float32)

    def distance(found):
        return np.sqrt(np.mean(np.square((np.asarray(found, np.float32) - exact)[labels != -100])))

    assert distance(ours) <= 1.6 * distance(theirs)


@pytest.mark.parametrize("name", [name for name in SMALLEST if "/clip" not in name])
def test_published_shapes_have_as_many_parameters(tmp_path, name):
    """All of transformers' but those that are never read."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    causal_cases.write_json(tmp_path / "config.json", SMALLEST[name])
    vlm = read_vlm(tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    read = {name: one.numel() for name, one in theirs.named_parameters() if not vlm.table.unread.fullmatch(name)}
    assert sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())) == sum(read.values())


@pytest.mark.parametrize("name", ["llava", "paligemma2", "gemma3"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_transformers_takes_the_spellings_that_are_tested(tmp_path, name, spelling):
    from models import causal_reference
    from transformers import AutoModelForImageTextToText

    causal_cases.CASES[name](tmp_path)
    model = causal_reference.make_model(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save(spell(tensors, spelling), tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])
