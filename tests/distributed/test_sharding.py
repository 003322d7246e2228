"""Where weights go on a mesh: the rules read out on the shapes of real models, and what they cannot do."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from transformers import Florence2Config

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import cut_base, place_base, place_like
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.utils import tree

BASE = {"vision_config": {"projection_dim": 768}, "text_config": {"model_type": "bart", "vocab_size": 51289,
        "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
        "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}}  # fmt: skip
"""Florence-2-base; its vocabulary has 51,289 = 7 · 17 · 431 words."""


@pytest.fixture(scope="module")
def base():
    return build(Florence2Config(**BASE, image_token_id=51288))


def cut(base, model):
    mesh = AbstractMesh((1, model), ("clients", "model"))
    return {path: tuple(where.spec) for path, where in tree.flatten(cut_base(mesh, base.shapes(), base.cuts)).items()}


def test_what_is_cut_and_where(base):
    found = cut(base, 2)
    columns, rows = ((None, None, "model"), (None, "model")), ((None, "model"), ())
    dense = {"q_proj": columns, "k_proj": columns, "v_proj": columns, "out_proj": rows, "fc1": columns, "fc2": rows}
    wanted = {"language_model/shared/embedding": (None, "model")}  # the width: the vocabulary is odd
    for head, names in (
        ("language_model/encoder/layers/self_attn/", ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("language_model/decoder/layers/self_attn/", ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("language_model/decoder/layers/encoder_attn/", ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("language_model/encoder/layers/", ("fc1", "fc2")),
        ("language_model/decoder/layers/", ("fc1", "fc2")),
    ):
        for name in names:
            wanted |= {f"{head}{name}/{leaf}": spec for leaf, spec in zip(("kernel", "bias"), dense[name], strict=True)}
    for stage in range(4):
        for half, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
            head = f"vision_tower/blocks_{stage}/{half}"
            for name, (kernel, bias) in (
                (f"{attention}/qkv", columns), (f"{attention}/proj", rows), ("ffn/fc1", columns), ("ffn/fc2", rows)
            ):  # fmt: skip
                wanted |= {f"{head}/{name}/kernel": kernel, f"{head}/{name}/bias": bias}
    assert found == {path: wanted.get(path, ()) for path in found}
    # Rows: [L, d_in, d_out] is cut in the middle.
    assert found["language_model/encoder/layers/fc2/kernel"] == (None, "model")


@pytest.mark.parametrize("model", [2, 4, 8])
def test_how_much_a_device_has_of_florence_2_base(base, model):
    """Of 231.4 million numbers 9.0 are whole everywhere: convolutions 6.4, positions 1.6, the image projection 0.8."""
    specs, shapes = cut(base, model), tree.flatten(base.shapes())
    held = sum(leaf.size // (model if specs[path] else 1) for path, leaf in shapes.items())
    assert held == 9_016_064 + (231_414_016 - 9_016_064) // model


def test_a_vocabulary_that_divides_is_cut_by_words(base):
    assert cut(base, 7)["language_model/shared/embedding"] == ("model",)


def test_what_does_not_divide_stays_whole(base):
    """768 and 3072 divide by 3, and so do three matrices side by side; 128, 256, 512 and 1024 do not."""
    found = cut(base, 3)
    assert found["language_model/encoder/layers/fc2/kernel"] == (None, "model")
    assert found["vision_tower/blocks_0/spatial_block/window_attn/qkv/kernel"] == (None, None, "model")
    for name in ("window_attn/proj", "ffn/fc1", "ffn/fc2"):
        assert found[f"vision_tower/blocks_0/spatial_block/{name}/kernel"] == (), name


def test_nothing_that_divides_is_an_error(base):
    with pytest.raises(UserError, match="--mesh with model=11: no weight of this base divides over 11 devices"):
        cut(base, 11)


def test_alone_nothing_is_cut(base):
    assert set(cut(base, 1).values()) == {()}


def test_placing_again_keeps_what_lies_right():
    mesh = make_mesh(1)
    params = place_base(mesh, {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}, ())
    moved = {**params, "kernel": params["kernel"] + jax.numpy.float32(1)}
    placed = place_like(moved, params)
    assert placed["bias"] is params["bias"]
    assert placed["kernel"].sharding == params["kernel"].sharding
    np.testing.assert_array_equal(placed["kernel"], 2.0)
