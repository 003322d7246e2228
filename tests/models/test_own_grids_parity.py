"""Pictures on grids of their own live, against transformers' model and its image processor: `pytest -m parity`."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from grid_pictures import PIXELS, draw, list_pictures
from models import causal_cases
from models.test_picture_prompts import TALK

from fedvlm_jax.data.prompts import Grid, Prompt
from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.federation.inputs.view_features import open_features
from fedvlm_jax.models import load_weights, open_model
from fedvlm_jax.models.qwen_vl.config import read_axes
from fedvlm_jax.models.qwen_vl.grid import place_tokens

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]
SHOWN = ((0, 1), (2,), (3, 4), (4,))
ANSWERS = ["a car", "no", "yes it is one", "two"]


@pytest.fixture(scope="module", params=["qwen3-vl", "qwen2.5-vl"])
def case(request, tmp_path_factory):
    """The reference, our model, parameters and processor, and what transformers' own processor makes of pictures."""
    from models import causal_reference
    from transformers import AutoImageProcessor

    folder = tmp_path_factory.mktemp("folder")
    causal_cases.CASES[request.param](folder)
    reference = causal_reference.make_model(folder)
    vlm, processor = open_model(folder, image_pixels=PIXELS)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["size"]["longest_edge"] = PIXELS
    file.write_text(json.dumps(settings))
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    made = [dict(theirs([picture], return_tensors="np")) for picture in draw()]
    return reference, vlm, load_weights(vlm, folder), processor, made


def join(made, numbers):
    return {name: np.concatenate([made[number][name] for number in numbers]) for name in made[0]}


def test_grids_and_patches_are_those_of_transformers(case):
    *_, processor, made = case
    for picture, theirs in zip(draw(), made, strict=True):
        rows, columns = processor.cut(picture.height, picture.width)
        assert theirs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
        np.testing.assert_array_equal(processor.grids.patches(picture), theirs["pixel_values"])


def test_features_logits_loss_and_answers_are_those_of_transformers(case):
    import torch
    from models import causal_reference

    reference, vlm, params, processor, made = case
    views = list_pictures(draw(), processor)
    store, most = FeatureStore(open_features(vlm, params, processor), limit=2**30), 45
    index = np.asarray([[*numbers, *[-1] * (2 - len(numbers))] for numbers in SHOWN])
    features, grids = store.gather(views, index, most), views.find_grids(index)
    for found, numbers in zip(features, SHOWN, strict=True):
        inputs = {name: torch.tensor(part) for name, part in join(made, numbers).items()}
        with torch.no_grad():
            theirs = reference.model.get_image_features(*inputs.values(), return_dict=True)
        parts = [theirs.pooler_output, *(getattr(theirs, "deepstack_features", None) or ())]
        wanted = np.concatenate([torch.cat(list(part)).numpy() for part in parts], -1)
        np.testing.assert_allclose(found[: len(wanted)], wanted, atol=2e-5)
        assert not found[len(wanted) :].any()
    cut = [tuple(Grid(*views.grids[number]) for number in numbers) for numbers in SHOWN]
    asked = [Prompt("", TALK, cut[0]), Prompt("why?", (), cut[1]), Prompt("which one?", (), cut[2]),
             Prompt("a car?", (), cut[3])]  # fmt: skip
    ids, mask = processor.prompts(asked)
    labels = processor.answers(ANSWERS, 8)
    batch = {"input_ids": ids, "attention_mask": mask, "image_features": features, "image_grids": grids}
    theirs = {"input_ids": ids, "attention_mask": mask, "pixel_values": [join(made, numbers) for numbers in SHOWN]}
    found = jax.jit(vlm.logits)(params, None, batch | {"labels": labels})
    wanted = causal_reference.find_logits(reference, theirs, labels)
    np.testing.assert_allclose(np.where(labels[..., None] == -100, 0, found), wanted, atol=1e-4)
    log_probs = jax.nn.log_softmax(found, -1)
    told = np.take_along_axis(np.asarray(log_probs), np.maximum(labels, 0)[..., None], -1)[..., 0]
    loss = -told[labels != -100].mean()
    np.testing.assert_allclose(loss, causal_reference.find_loss(reference, theirs, labels), atol=1e-4)
    answers = np.asarray(vlm.generate(params, None, batch, 7))
    np.testing.assert_array_equal(answers, causal_reference.generate(reference, theirs, 7))
    # Without a picture's grid another answer is as likely: positions are seen.
    square = jax.jit(vlm.logits)(params, None, batch | {"labels": labels, "image_grids": grids[..., ::-1]})
    assert np.abs(np.asarray(square) - np.asarray(found))[labels != -100].max() > 1e-3


def test_positions_are_those_of_get_rope_index(case):
    import torch

    reference, vlm, *_ = case
    pictures = ([(3, 5), (1, 7), (4, 4)], [(6, 1)], [(2, 2), (2, 9)])
    ids, grids = np.full((3, 60), 9), np.zeros((3, 3, 2), np.int32)
    for row, shown in enumerate(pictures):
        place = row
        for number, (rows, columns) in enumerate(shown):  # with a token between them, as templates have it
            ids[row, place : place + rows * columns], grids[row, number] = vlm.image_token_id, (rows, columns)
            place += rows * columns + 1 + number
    mask = np.ones_like(ids)
    mask[1, 30:] = 0
    found = place_tokens(ids == vlm.image_token_id, grids, read_axes(vlm.config))
    wanted, _ = reference.model.get_rope_index(
        torch.tensor(ids),
        torch.tensor(ids == vlm.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for shown in pictures for rows, columns in shown]),
        attention_mask=torch.tensor(mask),
    )
    by_axis = wanted.numpy()[np.asarray(read_axes(vlm.config))]  # [F, B, T]
    for row in range(3):
        real = mask[row] != 0
        np.testing.assert_array_equal(np.asarray(found)[row][real], by_axis[:, row].T[real])
