"""PaliGemma and Gemma 3: spellings of names, processors, refused configurations, masks, sampling that is ignored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.published import GEMMA3_4B, PALIGEMMA2_3B
from models import causal_cases
from models.llava_folders import SPELLINGS, save, spell
from models.test_llava import QUESTIONS, change, draw_pictures
from safetensors.numpy import load_file

from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.answer_generation import Answering
from fedvlm_jax.evaluation.gold_answers import Gold
from fedvlm_jax.models import load_weights, open_model, open_processor, read_size, read_vlm, save_checkpoint

SCALED = {"full_attention": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}


def draw(vlm):
    """Random parameters, made without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), vlm.shapes())


@pytest.mark.broad
@pytest.mark.parametrize("name", ["paligemma2", "gemma3"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads(tmp_path, name, spelling):
    causal_cases.CASES[name](tmp_path)
    vlm = read_vlm(tmp_path)
    params = draw(vlm)
    save_checkpoint(vlm, params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    again = {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"]}
    head = {"model.vision_tower.head.probe": np.zeros((1, 1, 18), np.float32)}  # SigLIP's, which no Gemma reads
    save(spell({**tensors, **again, **head}, spelling), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_weights(vlm, tmp_path), params)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("paligemma2", {"text_config.model_type": "gemma3_text"}, "model_type='gemma3_text' is not supported"),
        ("paligemma2", {"text_config.use_bidirectional_attention": False}, "use_bidirectional_attention=False is not"),
        (
            "paligemma2",
            {"text_config.attn_logit_softcapping": -1.0},
            "attn_logit_softcapping is -1.0",
        ),
        ("paligemma2", {"projection_dim": 12}, "config.projection_dim=12 is not supported, only 24"),
        ("paligemma2", {"text_config.sliding_window": 0}, "sliding_window is 0"),
        ("paligemma2", {"vision_config.model_type": "clip_vision_model"}, "model_type='clip_vision_model' is not"),
        ("paligemma2", {"image_token_index": -1}, "image_token_index is -1"),
        ("paligemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ("gemma3", {"text_config.attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 is not supported"),
        ("gemma3", {"text_config.use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
        ("gemma3", {"text_config.attention_bias": True}, "attention_bias=True is not supported"),
        ("gemma3", {"text_config.layer_types": ["full_attention"]}, "must say for each of 5 layers|that transformers"),
        ("gemma3", {"text_config.query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a number above 0"),
        ("gemma3", {"text_config.hidden_activation": "relu6"}, "activation 'relu6'"),
        ("gemma3", {"text_config.rope_scaling": None, "text_config.rope_parameters": SCALED}, "rope_type='yarn'"),
        ("gemma3", {"mm_tokens_per_image": 9}, "mm_tokens_per_image=9 is no square whose side divides 4 patches"),
        ("gemma3", {"mm_tokens_per_image": 2}, "mm_tokens_per_image=2 is no square"),
        ("gemma3", {"quantization_config": {}}, "quantised weights"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_named(tmp_path, name, values, message):
    causal_cases.CASES[name](tmp_path)
    change(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        read_vlm(tmp_path)


@pytest.mark.parametrize(
    ("config", "count", "side"), [(PALIGEMMA2_3B, 3_032_242_416, 224), (GEMMA3_4B, 4_300_079_472, 896)]
)
def test_explain_needs_only_the_configuration(tmp_path, capsys, config, count, side):
    """Counts are those of transformers on the meta device (see test_causal_parity.py)."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    vlm = read_vlm(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(vlm.shapes())) == count
    assert vlm.image_tokens(side, side) == 256
    main(["explain", "plora", "--model", str(tmp_path), "--lora.rank", "2"])
    shown = capsys.readouterr().out
    assert f"{count:,}" in shown
    assert "vision_tower" not in shown


def test_prompts_and_pixels_are_those_of_paligemma_s_processor(tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer, PaliGemmaProcessor

    causal_cases.CASES["paligemma2"](tmp_path)
    images = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs, processor = PaliGemmaProcessor(images, AutoTokenizer.from_pretrained(tmp_path)), open_processor(tmp_path)
    for question, picture in zip(QUESTIONS, draw_pictures(), strict=True):
        made = theirs(images=picture, text=f"<image>{question}", suffix="a car", return_tensors="np")
        prompt, answer = processor.prompts([question])[0], processor.answers(["a car"], 9)
        np.testing.assert_array_equal(np.concatenate([prompt, answer], 1), made["input_ids"])
        assert made["token_type_ids"].sum() == answer.size
        np.testing.assert_array_equal(processor.pixels([picture]), made["pixel_values"].transpose(0, 2, 3, 1))
    assert read_size(tmp_path) == (32, 32)
    assert processor.largest_id < read_vlm(tmp_path).vocabulary <= processor.image_token_id


@pytest.mark.parametrize("name", ["gemma3", "gemma3-narrow"])
def test_prompts_and_pixels_are_those_of_gemma_3_s_processor(tmp_path, name):
    """With its template in the folder or not."""
    from transformers import AutoImageProcessor, AutoTokenizer, Gemma3Processor

    causal_cases.CASES[name](tmp_path)
    images = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    tokens = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=tokens)
    theirs = Gemma3Processor(images, tokenizer, causal_cases.GEMMA3_TEMPLATE, image_seq_length=4)
    processor = open_processor(tmp_path)
    for question, picture in zip(QUESTIONS, draw_pictures(), strict=True):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        said = [{"role": "assistant", "content": [{"type": "text", "text": "a car"}]}]
        text = theirs.apply_chat_template(asked, add_generation_prompt=True)
        made = theirs(images=picture, text=text, add_special_tokens=False, return_tensors="np")
        prompt = processor.prompts([question])[0]
        np.testing.assert_array_equal(prompt, made["input_ids"])
        np.testing.assert_array_equal(processor.pixels([picture]), made["pixel_values"].transpose(0, 2, 3, 1))
        whole = theirs(
            images=picture, text=theirs.apply_chat_template(asked + said), add_special_tokens=False, return_tensors="np"
        )["input_ids"]
        both = np.concatenate([prompt, processor.answers(["a car"], 9)], 1)
        np.testing.assert_array_equal(both, whole[:, : both.shape[1]])
    assert processor.eos_token_id == 5


def list_shapes(jaxpr):
    """Shapes of all that a program computes, and of what its loops do."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from list_shapes(inner)


@pytest.mark.parametrize("name", ["paligemma2", "gemma3"])
def test_there_is_a_mask_for_a_kind_of_layers_and_not_for_each(tmp_path, name):
    causal_cases.CASES[name](tmp_path)
    change(tmp_path, **{"text_config.num_hidden_layers": 11})
    vlm = read_vlm(tmp_path)
    ids = jnp.zeros((3, 77), jnp.int32)
    batch = {"pixel_values": jnp.zeros((3, 32, 32, 3)), "input_ids": ids, "attention_mask": ids, "labels": ids[:, :7]}
    shapes = set(list_shapes(jax.make_jaxpr(vlm.logits)(vlm.shapes(), None, batch).jaxpr))
    squares = {shape for shape in shapes if shape[-2:] == (77, 77)}
    assert squares
    assert not {shape for shape in squares if 11 in shape}


def test_sampling_is_ignored_and_told(tmp_path):
    causal_cases.CASES["gemma3"](tmp_path)
    vlm, _ = open_model(tmp_path)
    settings = vlm.settings()
    assert (settings.num_beams, settings.eos_token_ids) == (1, (1, 5))
    answering = Answering(Gold([], [], 3, 4, 0, {}), settings)
    assert {"do_sample", "top_k", "top_p"} <= set(answering.describe()["ignored"])
    assert "generation_config.json draws tokens (do_sample, " in "\n".join(answering.explain())
    save_checkpoint(vlm, draw(vlm), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["do_sample"]


def test_a_repetition_penalty_is_ignored_and_told(tmp_path):
    causal_cases.CASES["gemma3"](tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.2}))
    assert "repetition_penalty" in open_model(tmp_path)[0].settings().ignored
