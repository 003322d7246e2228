"""LLaVA and LLaVA-OneVision: spellings of names, tensors that are never read, processors, refused configurations."""

import json

import jax
import numpy as np
import pytest
from harness.published import LLAVA_7B, ONEVISION_HALF_B
from models import causal_cases
from models.llava_folders import SPELLINGS, save, spell
from PIL import Image
from safetensors.numpy import load_file

from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_weights, open_model, open_processor, read_size, read_vlm, save_checkpoint

FULL = "llava-full"  # of whose tower layers 1 and 2 are unread


@pytest.fixture(scope="module", params=["llava", FULL, "llava-siglip", "llava_onevision"])
def saved(request, tmp_path_factory):
    """A folder with weights, its model, and its parameters."""
    folder = tmp_path_factory.mktemp("saved")
    causal_cases.CASES[request.param](folder)
    vlm, rng = read_vlm(folder), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), vlm.shapes())
    save_checkpoint(vlm, params, folder)
    return folder, vlm, params


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads(saved, tmp_path, spelling):
    folder, vlm, params = saved
    save(spell(load_file(folder / "model.safetensors"), spelling), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_weights(vlm, tmp_path), params)


def make_full(folder):
    causal_cases.CASES[FULL](folder)
    vlm = read_vlm(folder)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), vlm.shapes())
    save_checkpoint(vlm, params, folder)
    return vlm, params


def test_tensors_behind_the_layer_that_is_read_may_be_there_and_are_kept(tmp_path):
    vlm, params = make_full(tmp_path)
    unread = {
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias": np.full(3, 7, np.float32),
        "vision_tower.vision_model.post_layernorm.weight": np.full(5, 8, np.float32),
    }
    save(spell(load_file(tmp_path / "model.safetensors"), "the hub") | unread, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_weights(vlm, tmp_path), params)
    save_checkpoint(vlm, params, tmp_path / "again", source=tmp_path)
    kept = load_file(tmp_path / "again" / "model.safetensors")
    assert kept["model.vision_tower.encoder.layers.2.mlp.fc1.bias"].tolist() == [7, 7, 7]
    assert len(kept["model.vision_tower.post_layernorm.weight"]) == 5
    save_checkpoint(vlm, params, tmp_path / "bare")
    assert not {name for name in load_file(tmp_path / "bare" / "model.safetensors") if vlm.table.unread.fullmatch(name)}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias",
            np.ones(30, np.float32),
            "unexpected: vision_tower",
        ),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", None, r"missing: model.vision_tower.*fc1.bias"),
        ("vision_tower.vision_model.pre_layrnorm.bias", np.ones(3, np.float32), r"misshapen: .*pre_layrnorm.bias"),
        ("language_model.model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32), "unexpected: .*q_proj.bias"),
        ("model.multi_modal_projector.linear_1.bias", np.ones(24, np.float32), "twice: .*linear_1.bias"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, name, tensor, message):
    vlm, _ = make_full(tmp_path)
    tensors = spell(load_file(tmp_path / "model.safetensors"), "the hub")
    tensors.pop(name, None)
    save(tensors | ({} if tensor is None else {name: tensor}), tmp_path)
    with pytest.raises(UserError, match=message):
        load_weights(vlm, tmp_path)


def change(folder, **values):
    """Change fields of a config.json; a name may have a part before it, `text_config.rms_norm_eps`."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        (config[part] if part else config)[field] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"text_config.model_type": "gemma"},
            "text_config.model_type='gemma' is not supported, only 'llama', 'mistral'",
        ),
        ({"text_config.attention_bias": True}, "text_config.attention_bias=True is not supported"),
        (
            {"text_config.rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic'",
        ),
        ({"text_config.hidden_act": "relu6"}, "activation 'relu6'"),
        ({"projector_hidden_act": "relu6"}, "activation 'relu6'"),
        ({"text_config.model_type": "mistral", "text_config.sliding_window": 9}, "sliding_window=9 is not supported"),
        ({"text_config.layer_types": ["chunked_attention"] * 2}, "layer_types=.* is not supported"),
        ({"vision_config.model_type": "dinov2"}, "vision_config.model_type='dinov2' is not supported"),
        ({"vision_config.hidden_act": "relu6"}, "activation 'relu6'"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer is \[-2, -3\]"),
        ({"vision_feature_layer": 0}, "vision_feature_layer=0 is not supported"),
        ({"vision_feature_layer": 3}, "vision_feature_layer is 3, expected a whole number from -2 to 2"),
        ({"vision_feature_select_strategy": "cls"}, "no configuration that transformers reads"),
        ({"image_token_index": 430}, "image_token_index is 430"),
        ({"vision_config.patch_size": 40}, "image_size=32 is below its patch_size=40"),
        ({"quantization_config": {}}, "quantised weights"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_named(tmp_path, values, message):
    causal_cases.CASES["llava"](tmp_path)
    change(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        read_vlm(tmp_path)


@pytest.mark.parametrize(
    ("config", "read", "unread", "tokens", "side"),
    [(LLAVA_7B, 7_050_828_800, 12_598_272, 576, 336), (ONEVISION_HALF_B, 893_673_248, 2_304, 730, 384)],
)
def test_published_shapes_have_as_many_parameters_as_in_transformers(tmp_path, config, read, unread, tokens, side):
    """7,063,427,072 and 893,675,552 in all, by transformers on the meta device (see test_causal_parity.py)."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    vlm = read_vlm(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())) == read
    assert read + unread in (7_063_427_072, 893_675_552)
    assert vlm.image_tokens(side, side) == tokens


def test_explain_needs_only_the_configuration(tmp_path, capsys):
    causal_cases.CASES["llava"](tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    main(["explain", "plora", "--model", str(tmp_path), "--lora.rank", "2"])
    shown = capsys.readouterr().out
    assert "language_model/layers" in shown
    assert "vision_tower" not in shown


QUESTIONS = ["what is this?", "a", "is it a red car, or two?"]


def draw_pictures():
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (40, 31), (33, 33)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_prompts_and_pixels_are_those_of_transformers(tmp_path):
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    causal_cases.CASES["llava"](tmp_path)
    processor, images = open_processor(tmp_path), CLIPImageProcessorPil.from_pretrained(tmp_path)
    theirs = LlavaProcessor(
        images, AutoTokenizer.from_pretrained(tmp_path), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=causal_cases.LLAVA_TEMPLATE,
    )  # fmt: skip
    pictures = draw_pictures()
    for question, picture in zip(QUESTIONS, pictures, strict=True):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = theirs.apply_chat_template(asked, add_generation_prompt=True)
        made = theirs(images=picture, text=text, return_tensors="np")
        np.testing.assert_array_equal(processor.prompts([question])[0], made["input_ids"])
        np.testing.assert_array_equal(processor.pixels([picture]), made["pixel_values"].transpose(0, 2, 3, 1))
    assert read_size(tmp_path) == (32, 32)
    assert processor.image_tokens == 16


def test_a_onevision_picture_is_what_it_is_among_several(tmp_path):
    from transformers import AutoImageProcessor

    causal_cases.CASES["llava_onevision"](tmp_path)
    processor = open_processor(tmp_path)
    images = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pictures = draw_pictures()
    made = images([pictures], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(processor.pixels(pictures), made[:, 0].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(processor.pixels(pictures[1:2]), made[1:2, 0].transpose(0, 2, 3, 1))
    assert (processor.size, processor.image_tokens) == ((30, 30), 10)  # 3 x 3 patches and the end of the picture


def test_white_space_before_an_answer_is_that_of_the_question_s_end(tmp_path):
    """Templates of llava-hf write a space before an answer and a new line where one is asked for."""
    causal_cases.CASES["llava_onevision"](tmp_path)
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}{% for part in message['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    processor = open_processor(tmp_path)
    assert processor.frame.tail == "<|im_end|><|im_start|>assistant\n"
    assert (processor.frame.answer_head, processor.frame.answer_end) == ("", "<|im_end|>")
    assert processor.decode(processor.answers(["a car"], 9)) == ["a car"]


@pytest.mark.parametrize("as_written", [False, True])
def test_answers_are_tokenised_as_behind_their_prompt(tmp_path, as_written):
    """Llama's tokenizer begins texts with a space; as its tokenizer.json is written, also those that begin with one."""
    causal_cases.CASES["llava"](tmp_path)
    if as_written:
        file = tmp_path / "tokenizer.json"
        values = json.loads(file.read_text())
        prepend = {"type": "Prepend", "prepend": "▁"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        values |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}}
        file.write_text(json.dumps(values))
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    processor = open_processor(tmp_path)
    labels = processor.answers(["a car", "A", ""], 9)
    tokens = [[processor.tokenizer.convert_ids_to_tokens(int(i)) for i in row if i >= 0] for row in labels]
    assert tokens[0] == ["▁a", "▁car", "</s>"]
    assert tokens[1][-2:] == ["A", "</s>"]
    assert tokens[2] in (["</s>"], ["▁", "</s>"])
    assert processor.decode(labels) == ["a car", "A", ""]


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "llava_onevision"])
def test_a_line_of_pixels_takes_no_gigabytes(tmp_path, name):
    causal_cases.CASES[name](tmp_path)
    processor = open_processor(tmp_path)
    lines = [Image.new("RGB", size, "red") for size in ((20_000, 1), (1, 20_000))]
    assert processor.pixels(lines).shape == (2, *processor.size, 3)
    red = processor.pixels([Image.new("RGB", (9, 9), "red")])[0, 4, 4]
    middle = processor.size[0] // 2
    if name != "llava_onevision":  # whose lines are thinner than what is interpolated
        np.testing.assert_allclose(processor.pixels(lines)[:, middle, middle], [red, red], atol=1e-6)


def test_a_folder_without_a_size_or_an_image_token_is_refused(tmp_path):
    causal_cases.CASES["llava-siglip"](tmp_path)
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"size": {"shortest_edge": 32}}))
    with pytest.raises(UserError, match="does not say how large pictures are"):
        open_processor(tmp_path)
    file.write_text(json.dumps(values | {"size": {"height": 16, "width": 16}}))
    with pytest.raises(UserError, match="the tower takes pictures of 32x32 pixels, not 16x16"):
        open_model(tmp_path)
