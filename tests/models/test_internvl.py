"""InternVL: processors, spellings of names, sizes, refused configurations."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from harness.published import INTERNVL3_1B
from models import causal_cases
from models.llava_folders import save, spell
from PIL import Image
from safetensors.numpy import load_file

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_weights, open_model, open_processor, read_vlm, save_checkpoint

HUB_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
"""As transformers' conversion writes it into folders."""


@pytest.mark.parametrize("template", [None, HUB_TEMPLATE])
def test_prompts_and_pixels_are_those_of_transformers(tmp_path, template):
    from transformers import AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    causal_cases.CASES["internvl"](tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    processor, images = open_processor(tmp_path), GotOcr2ImageProcessorPil.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # Its constructor asks for torchvision, for films.
    theirs = SimpleNamespace(
        start_image_token="<img>", image_token="<IMG_CONTEXT>", end_image_token="</img>", image_seq_length=4
    )
    picture = InternVLProcessor.replace_image_token(theirs, {"num_patches": [1]}, 0)
    for question in ("what is this?", "a"):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = tokenizer.apply_chat_template(
            asked, chat_template=HUB_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        wanted = tokenizer(text.replace("<IMG_CONTEXT>", picture))["input_ids"]
        assert processor.prompts([question])[0].tolist() == [wanted]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in [(20, 30), (90, 31)]]
    for one in pictures:
        made = images(one, crop_to_patches=False, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(processor.pixels([one]), made.transpose(0, 2, 3, 1))
    assert processor.pixels(pictures).shape == (2, 32, 32, 3)
    assert processor.image_tokens == 4


def test_the_spelling_of_the_hub_and_of_transformers_loads(tmp_path):
    causal_cases.CASES["internvl-untied"](tmp_path)
    vlm, rng = read_vlm(tmp_path), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), vlm.shapes())
    save_checkpoint(vlm, params, tmp_path)
    save(spell(load_file(tmp_path / "model.safetensors"), "transformers 5"), tmp_path)
    assert "language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_weights(vlm, tmp_path), params)


def test_the_published_shape_is_that_of_transformers(tmp_path):
    """938,193,024 parameters, by transformers on the meta device (see test_causal_parity.py)."""
    (tmp_path / "config.json").write_text(json.dumps(INTERNVL3_1B))
    vlm = read_vlm(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())) == 938_193_024
    assert vlm.image_tokens(448, 448) == 256


def change(folder, **values):
    """Change fields of a config.json; a name may have a part before it, `text_config.rms_norm_eps`."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        (config[part] if part else config)[field] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "tied"),
    [
        ({}, False),
        ({"text_config.tie_word_embeddings": True}, True),
        ({"text_config.tie_word_embeddings": True, "tie_word_embeddings": False}, False),
    ],
)
def test_the_whole_says_whether_the_head_is_the_token_table_or_else_the_text_model(tmp_path, values, tied):
    causal_cases.CASES["internvl-untied"](tmp_path)
    change(tmp_path, **values)
    vlm = read_vlm(tmp_path)
    assert ("lm_head" not in vlm.shapes()["language_model"]) == tied
    vlm.write_configs(tmp_path)  # which says it, so that transformers reads the same
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == tied
    assert read_vlm(tmp_path).fingerprint == vlm.fingerprint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config.model_type": "llama"}, "text_config.model_type='llama' is not supported, only 'qwen2'"),
        ({"text_config.use_sliding_window": True}, "sliding_window=4096 is not supported"),
        ({"text_config.layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ({"text_config.rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"vision_config.model_type": "siglip_vision_model"}, "vision_config.model_type='siglip_vision_model'"),
        ({"vision_config.use_qk_norm": True}, "use_qk_norm=True is not supported"),
        ({"vision_config.norm_type": "rms_norm"}, "norm_type='rms_norm' is not supported, only 'layer_norm'"),
        ({"vision_config.attention_bias": False}, "attention_bias=False is not supported"),
        ({"vision_config.image_size": [32, 40]}, r"image_size=\[32, 40\] is not supported, only squares"),
        ({"vision_config.image_size": 0}, "vision_config.image_size is 0"),
        ({"vision_config.patch_size": 10}, "3 patches a side do not divide by 4"),
        ({"vision_config.layer_scale_init_value": float("nan")}, "layer_scale_init_value is nan"),
        ({"downsample_ratio": 0.3}, "downsample_ratio=0.3 is not supported"),
        ({"projector_hidden_act": "relu6"}, "activation 'relu6'"),
        ({"vision_feature_layer": -2}, "vision_feature_layer=-2 is not supported"),
        ({"image_token_id": 320}, "image_token_id is 320"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_named(tmp_path, values, message):
    causal_cases.CASES["internvl-untied"](tmp_path)
    change(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        read_vlm(tmp_path)


def test_pictures_of_another_size_than_the_tower_s_are_refused(tmp_path):
    causal_cases.CASES["internvl"](tmp_path)
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"size": {"shortest_edge": 32}}))
    with pytest.raises(UserError, match="does not say how large pictures are"):
        open_processor(tmp_path)
    file.write_text(json.dumps(values | {"size": {"height": 16, "width": 16}}))
    with pytest.raises(UserError, match="the tower takes pictures of 32x32 pixels, not 16x16"):
        open_model(tmp_path)
