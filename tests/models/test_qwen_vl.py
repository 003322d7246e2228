"""What is Qwen-VL's own: published shapes, what is refused, grids, sizes of pictures, spellings of checkpoints."""

import json
import math

import jax
import numpy as np
import pytest
from harness.published import describe_qwen
from models import causal_cases
from PIL import Image

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import open_model, open_processor, read_size, read_vlm
from fedvlm_jax.models.qwen_vl.grid import blend_positions, cut_patches, number_windows
from fedvlm_jax.utils import tree

PUBLISHED = {
    # As transformers counts on the meta device.
    "Qwen3-VL-2B": (describe_qwen("qwen3_vl", 2048, 6144, 28, 16, 8), 2_127_532_032, 196),
    "Qwen3-VL-4B": (describe_qwen("qwen3_vl", 2560, 9728, 36, 32, 8), 4_437_815_808, 196),
    "Qwen2.5-VL-3B": (describe_qwen("qwen2_5_vl", 2048, 11008, 36, 16, 2), 3_754_622_976, 256),
    "Qwen2.5-VL-7B": (
        describe_qwen("qwen2_5_vl", 3584, 18944, 28, 28, 4, vocabulary=152064, tied=False), 8_292_166_656, 256,
    ),
}  # fmt: skip


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name, tmp_path):
    config, parameters, tokens = PUBLISHED[name]
    vlm = read_vlm(write(tmp_path, config))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(vlm.shapes())) == parameters
    assert read_size(tmp_path) == (448, 448)
    assert vlm.image_tokens(448, 448) == tokens
    assert vlm.image_width == vlm.shapes()["language_model"]["norm"]["scale"].size * (4 if "3-" in name else 1)
    vlm.write_configs(tmp_path)
    again = read_vlm(tmp_path)
    assert (again.fingerprint, again.positions) == (vlm.fingerprint, vlm.positions)


def change(config, part, **fields):
    return config | {part: config[part] | fields} if part else config | fields


THREE, TWO = PUBLISHED["Qwen3-VL-2B"][0], PUBLISHED["Qwen2.5-VL-3B"][0]
YARN = {"rope_type": "yarn", "factor": 4.0, "mrope_section": [24, 20, 20], "original_max_position_embeddings": 32768}
REFUSED = {
    "experts": (change(THREE, "", model_type="qwen3_vl_moe"), "model_type='qwen3_vl_moe'; known are .*qwen3_vl"),
    "scaled positions": (change(THREE, "text_config", rope_scaling=YARN), "rope_type='yarn'"),
    "sections": (
        change(THREE, "text_config", rope_scaling={"rope_type": "default", "mrope_section": [24, 20, 19]}),
        r"mrope_section=\[24, 20, 19\]; expected three numbers whose sum is 64",
    ),
    "sections one after another": (
        change(THREE, "text_config", rope_scaling={"mrope_section": [24, 20, 20], "mrope_interleaved": False}),
        "mrope_interleaved=False; only True",
    ),
    "no sections": (change(TWO, "", rope_scaling=None), "mrope_section=None"),
    "sliding windows": (change(TWO, "", use_sliding_window=True), "text_config.sliding_window=32768"),
    "biased attention": (change(THREE, "text_config", attention_bias=True), "attention_bias=True"),
    "frames": (change(THREE, "vision_config", temporal_patch_size=1), "temporal_patch_size=1 is not supported, only 2"),
    "widths": (change(THREE, "vision_config", out_hidden_size=64), "out_hidden_size=64 is another width"),
    "a deep layer": (change(THREE, "vision_config", deepstack_visual_indexes=[5, 24]), "24, expected a whole number"),
    "deep layers twice": (change(THREE, "vision_config", deepstack_visual_indexes=[5, 5]), "each layer once"),
    "learned positions": (change(THREE, "vision_config", num_position_embeddings=2300), "2300 is no square"),
    "windows": (change(TWO, "vision_config", window_size=100), "window_size=100 does not divide by 28"),
    "narrow heads": (change(TWO, "vision_config", num_heads=7), "does not make 7 heads"),
    "an image token": (change(TWO, "", image_token_id=151936), "image_token_id is 151936"),
    "quantised": (change(TWO, "", quantization_config={"bits": 4}), "quantised"),
    "cut short": ({"model_type": "qwen2_5_vl"}, "no text_config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name, tmp_path):
    config, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        read_vlm(write(tmp_path, config))


@pytest.mark.parametrize("name", ["Qwen3-VL-2B", "Qwen2.5-VL-7B"])
def test_every_spelling_of_a_tensor_is_the_same_parameter(name, tmp_path):
    vlm = read_vlm(write(tmp_path, PUBLISHED[name][0]))
    for path, leaf in tree.flatten(vlm.shapes()).items():
        for spelled, slot in vlm.table.find_names(path, leaf.shape[0]):
            old = spelled.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            assert vlm.table.find_slot(vlm.table.spell(old)) == slot
            assert vlm.table.find_slot(vlm.table.spell(spelled)) == slot


@pytest.fixture(scope="module", params=["qwen3-vl", "qwen2.5-vl"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("folder")
    causal_cases.CASES[request.param](made)
    return made


def test_pixels_are_those_of_transformers_where_a_picture_fills_the_square(folder):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8))
    theirs = Qwen2VLImageProcessorPil(**json.loads((folder / "preprocessor_config.json").read_text()))
    processor = open_processor(folder)
    made = theirs([picture], return_tensors="np")
    assert made["image_grid_thw"].tolist() == [[1, 10, 10]]
    found = cut_patches(jax.numpy.asarray(processor.pixels([picture])), 4, 2)[0]
    np.testing.assert_allclose(found, made["pixel_values"], atol=1e-6)


def test_a_picture_keeps_its_proportions_and_the_rest_is_grey(folder):
    wide, tall = Image.new("RGB", (80, 40), "white"), Image.new("L", (30, 60))
    first, second = open_processor(folder).pixels([wide, tall])
    assert first.shape == (40, 40, 3)
    np.testing.assert_array_equal(first[:20], 1)
    assert np.abs(first[20:]).max() < 0.01
    np.testing.assert_array_equal(second[:, :20], -1)
    assert np.abs(second[:, 20:]).max() < 0.01
    line = open_processor(folder).pixels([Image.new("RGB", (1, 1000))])[0]
    assert (line[:, 0] == -1).all()


def test_a_run_chooses_the_size_of_pictures(folder):
    vlm, processor = open_model(folder, image_size=64)
    assert (processor.size, processor.image_tokens) == ((64, 64), 64)
    assert processor.fingerprint != open_processor(folder).fingerprint
    ids, _ = processor.prompts(["what is this?"])
    assert (ids == vlm.image_token_id).sum() == 64
    with pytest.raises(UserError, match=r"pictures of 63 pixels a side make no whole image tokens .* take 64"):
        open_processor(folder, 63)
    with pytest.raises(UserError, match="at most 4096"):
        open_processor(folder, 8000)
    with pytest.raises(UserError, match="square pictures whose sides are multiples of 8, not 64x32"):
        vlm.image_tokens(64, 32)


def test_other_families_keep_their_size(tmp_path):
    assert open_processor("florence2-nano", 64).size == (64, 64)
    with pytest.raises(UserError, match="64x64 pixels, and no other size: leave --image-size out"):
        open_processor("florence2-nano", 96)


def test_a_published_chat_template_asks_as_the_family_does(folder, tmp_path):
    """Qwen2.5-VL's, with its counters of pictures; the marks around a picture are the template's."""
    template = (
        "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] "
        "!= 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
        "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
        "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
        "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
        "\n{% endif %}"
    )
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    own, published = open_processor(folder).frame, open_processor(tmp_path).frame
    if "qwen2_5_vl" in (folder / "config.json").read_text():
        assert published == own
    else:
        assert published.head.endswith(own.head)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template.replace("<|image_pad|>", "")}))
    with pytest.raises(UserError, match=r"does not write <.image_pad.> once"):
        open_processor(tmp_path)


def test_published_settings_draw_tokens_and_punish_repetition_which_is_ignored_and_told(tmp_path):
    asked = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    write(tmp_path, TWO)
    for settings in (asked | {"eos_token_id": [151645, 151643], "pad_token_id": 151643}, asked | {"eos_token_id": 9}):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        assert set(read_vlm(tmp_path).settings().ignored) == set(asked)
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05, "eos_token_id": 9}))
    with pytest.raises(UserError, match=r"repetition_penalty=1\.05 is not implemented"):
        read_vlm(tmp_path).settings()


def test_positions_of_a_grid_of_the_learned_size_are_the_learned_ones():
    taps, weights = blend_positions(4, 4, 2, 4)
    assert (weights.max(1) == 1).all()
    assert sorted(np.take_along_axis(taps, weights.argmax(1)[:, None], 1)[:, 0]) == list(range(16))


def test_windows_at_the_edge_are_smaller():
    sizes = np.bincount(number_windows(10, 10, 2, 4))
    assert sorted(sizes.tolist()) == [4, 8, 8, 8, 8, 16, 16, 16, 16]
