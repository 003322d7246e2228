"""The configurations that ship without weights: as large as the models are, and no more than configurations."""

import dataclasses
import pydoc
import shutil

import jax
import pytest
from harness.published import SMALLEST, write_config

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm, read_size, read_vlm, resolve_folder


@pytest.mark.parametrize(("name", "millions"), [("florence2-base", 231.4), ("florence2-large", 770.2)])
def test_parameters_and_pictures(name, millions):
    vlm = read_vlm(name)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())) / 1e6, 1) == millions
    size = read_size(name)
    assert size == (768, 768)
    assert vlm.image_tokens(*size) == 577


def test_the_base_s_vision_tower():
    tower = read_vlm("florence2-base").shapes()["vision_tower"]
    assert round(sum(leaf.size for leaf in jax.tree.leaves(tower)) / 1e6, 1) == 90.4


def test_sizes_of_pictures(tmp_path):
    assert read_size("florence2-nano") == (64, 64)
    shutil.copy(resolve_folder("florence2-nano") / "config.json", tmp_path)
    assert read_size(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 224}}')
    assert read_size(tmp_path) is None


@pytest.mark.parametrize("name", SMALLEST)
def test_a_config_json_alone_says_how_large_pictures_are(name, tmp_path):
    """The tower's, or the family's usual size; what an image processor's file says comes first."""
    vlm, (height, width) = read_vlm(write_config(name, tmp_path)), read_size(tmp_path)
    assert vlm.image_tokens(height, width) == {
        "HuggingFaceTB/SmolVLM-256M-Instruct": 64, "Qwen/Qwen3-VL-2B-Instruct": 196, "Qwen/Qwen2.5-VL-3B-Instruct": 256,
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 730, "llava-hf/llava-1.5-7b-hf": 576,
        "google/paligemma2-3b-pt-224": 256, "google/gemma-3-4b-it": 256, "openai/clip-vit-base-patch32": 1,
        "OpenGVLab/InternVL3-1B-hf": 256,
    }[name]  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 1}}')
    if "Qwen" not in name:
        assert read_size(tmp_path) is None


def test_their_weights_are_refused_by_name():
    with pytest.raises(UserError, match=r"only the configuration ships.*florence-community/Florence-2-large"):
        load_vlm("florence2-large")


def test_a_record_shows_itself_in_a_line_and_tells_what_a_batch_is():
    vlm = read_vlm("florence2-nano")
    assert repr(vlm) == "Vlm(florence2, float32, image_width=128)"
    shown = pydoc.plain(pydoc.render_doc(type(vlm)))
    for name in (*(field.name for field in dataclasses.fields(vlm)), "input_ids", "attention_mask", "labels"):
        assert name in shown.split("Data descriptors")[0].split("Methods defined here")[0], name
    assert "(params, adapter, batch) -> float32 logits [B, U, V]" in shown
