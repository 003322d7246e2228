"""Image tokens and positions of Qwen-VL live, against transformers + PyTorch: `pytest -m parity`."""

import importlib.util

import jax
import numpy as np
import pytest
from models import causal_cases

from fedvlm_jax.models import load_weights, open_model
from fedvlm_jax.models.qwen_vl.config import read_axes
from fedvlm_jax.models.qwen_vl.grid import place_tokens

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]


@pytest.fixture(scope="module", params=["qwen3-vl", "qwen2.5-vl"])
def case(request, tmp_path_factory):
    """Folder, reference and model."""
    from models import causal_reference

    folder = tmp_path_factory.mktemp("folder")
    causal_cases.CASES[request.param](folder)
    reference = causal_reference.make_model(folder)
    return folder, reference, open_model(folder)[0]


@pytest.mark.parametrize("side", [16, 40, 64])
def test_image_tokens_are_those_of_transformers(case, side):
    """Of grids below, beside and above that of the learned positions, with whole windows and cut ones."""
    import torch
    from models import causal_reference

    folder, reference, vlm = case
    picture = np.random.default_rng(side).standard_normal((side, side, 3)).astype(np.float32)
    found = jax.jit(vlm.image_features)(load_weights(vlm, folder), None, picture[None])[0]
    inputs = causal_reference.to_patches(reference, picture[None])
    with torch.no_grad():
        made = reference.model.get_image_features(*inputs.values(), return_dict=True)
    wanted = [made.pooler_output[0], *(part[0] for part in getattr(made, "deepstack_features", None) or ())]
    assert found.shape == (vlm.image_tokens(side, side), vlm.image_width)
    np.testing.assert_allclose(found, np.concatenate([part.numpy() for part in wanted], -1), atol=1e-5)


def test_positions_are_those_of_transformers(case):
    import torch

    _, reference, vlm = case
    image, side = vlm.image_token_id, 3
    rows = np.full((4, 40), 9)
    for row, places in zip(rows, ([2], [0, 10], [1, 15, 26], []), strict=True):
        for place in places:  # with a token between them, as templates have it
            row[place : place + side**2] = image
    mask = np.ones_like(rows)
    mask[0, 30:] = 0
    grid = torch.tensor([[1, 2 * side, 2 * side]] * 6)
    ids = torch.tensor(rows)
    wanted, _ = reference.model.get_rope_index(
        ids, (ids == image).int(), image_grid_thw=grid, attention_mask=torch.tensor(mask)
    )
    axes = read_axes(vlm.config)
    found = np.asarray(place_tokens(jax.numpy.asarray(rows == image), side**2, axes))
    real = mask != 0
    for frequency, axis in enumerate(axes):
        np.testing.assert_array_equal(found[..., frequency][real], wanted[axis].numpy()[real])
