"""Model folders that are no whole model: each is told in one line that names the file, before any long work."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from models import causal_cases, clip_cases
from models.pickles import write_pickle
from safetensors.numpy import load_file, save_file

from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import Vlm, load_vlm, load_weights, open_model, read_vlm

Spoil = Callable[[Path], object]
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROCESSOR, TOKENIZER, GENERATION = "processor_config.json", "tokenizer.json", "generation_config.json"
SHARED, QUERY = "model.language_model.shared.weight", "model.language_model.encoder.layers.0.self_attn.q_proj.weight"
TEMPORAL = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 925000000\n"
PAGE = b"<!DOCTYPE html><title>Sign in to continue</title>" * 20


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def change(name: str, **values: Any) -> Spoil:
    """Set fields of a JSON file; `text__d_model` is `text_config.d_model`, and so on."""
    rooms = {"text": "text_config", "vision": "vision_config", "image": "image_processor"}

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for field, value in values.items():
            room, _, own = field.rpartition("__")
            (content[rooms[room]] if room else content)[own] = value
        (folder / name).write_text(json.dumps(content))

    return spoil


def drop(name: str, field: str) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[field]
        (folder / name).write_text(json.dumps(content))

    return spoil


def retensor(alter: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        alter(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def set_tensor(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Spoil:
    """Add a tensor of zeros, or put it in the place of another."""
    return retensor(lambda tensors: tensors.update({name: np.zeros(shape, dtype)}))


def fill(name: str, value: float, dtype: Any = np.float32) -> Spoil:
    """Put one odd number into a tensor."""

    def alter(tensors: dict[str, np.ndarray]) -> None:
        tensor = tensors[name].astype(dtype)
        tensor.flat[1] = value
        tensors[name] = tensor

    return retensor(alter)


def shard(weight_map: Any = None, content: bytes | None = None) -> Spoil:
    """An index in place of the one file; by default of two files, the second of which is missing."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        names = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(tensors)}
        whole = json.dumps({"weight_map": names if weight_map is None else weight_map}).encode()
        (folder / INDEX).write_bytes(whole if content is None else content)

    return spoil


def both(*steps: Spoil) -> Spoil:
    return lambda folder: [step(folder) for step in steps]


def rename(old: str, new: str) -> Spoil:
    return lambda folder: (folder / old).rename(folder / new)


def reword(old: str, new: str) -> Spoil:
    """Replace a piece of the tokenizer's file."""

    def spoil(folder: Path) -> None:
        text = json.dumps(json.loads((folder / TOKENIZER).read_text()), ensure_ascii=False)
        assert old in text
        (folder / TOKENIZER).write_text(text.replace(old, new))

    return spoil


def add_token(number: int) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        content["model"]["vocab"]["Ġextra"] = number
        (folder / TOKENIZER).write_text(json.dumps(content))

    return spoil


# What is wrong -> (what spoils the folder, what the one line says); weights are opened in these too.
CONFIGURATIONS: dict[str, tuple[Spoil, str]] = {
    "config missing": (lambda folder: (folder / CONFIG).unlink(), r"no config\.json"),
    "config empty": (write(CONFIG, b""), r"config\.json cannot be read as JSON: it is empty"),
    "config half": (cut(CONFIG, 0.5), r"config\.json cannot be read as JSON"),
    "config with BOM": (
        lambda folder: (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes()),
        r"config\.json .*byte order mark",
    ),
    "config in UTF-16": (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text(), "utf-16"),
        r"config\.json .*byte order mark",
    ),
    "config null": (write(CONFIG, b"null"), r"config\.json holds null"),
    "config a list": (write(CONFIG, b"[]"), r"config\.json holds a list"),
    "config a text": (write(CONFIG, b'"florence2"'), r"config\.json holds a text"),
    "config nested 100000 deep": (write(CONFIG, b"[" * 100_000), r"config\.json cannot be read"),
    "config of noise": (write(CONFIG, bytes(range(128, 256))), r"config\.json cannot be read"),
    "config an LFS pointer": (write(CONFIG, POINTER), r"config\.json .*git lfs pull"),
    "config a web page": (write(CONFIG, PAGE), r"config\.json .*web page"),
    "config a folder": (both(lambda f: (f / CONFIG).unlink(), lambda f: (f / CONFIG).mkdir()), r"no config\.json"),
    "another model": (change(CONFIG, model_type="blip-2"), r"model_type='blip-2'"),
    "no model type": (drop(CONFIG, "model_type"), r"model_type=None"),
    "no text": (drop(CONFIG, "text_config"), r"config\.json has no text_config"),
    "no vision": (drop(CONFIG, "vision_config"), r"no vision_config"),
    "text null": (change(CONFIG, text_config=None), r"no text_config"),
    "vision a list": (change(CONFIG, vision_config=[1]), r"no vision_config"),
    "another text model": (change(CONFIG, text__model_type="t5"), r"config\.json: text_config\.model_type='t5'"),
    "an unknown text model": (change(CONFIG, text__model_type="none such"), r"config\.json"),
    "another tower": (change(CONFIG, vision__model_type="clip"), r"config\.json"),
    "quantised": (change(CONFIG, quantization_config={"bits": 4}), r"config\.json is of quantised"),
    "untied": (change(CONFIG, tie_word_embeddings=False), r"tie_word_embeddings"),
    "width a text": (change(CONFIG, text__d_model="wide"), r"config\.json .*d_model"),
    "width null": (change(CONFIG, text__d_model=None), r"config\.json: text_config\.d_model is None"),
    "width zero": (change(CONFIG, text__d_model=0), r"d_model is 0, expected"),
    "width below zero": (change(CONFIG, text__d_model=-16), r"d_model is -16"),
    "width a fraction": (change(CONFIG, text__d_model=16.5), r"config\.json .*d_model"),
    "width beyond 64 bits": (change(CONFIG, text__d_model=10**30), r"d_model is 1000"),
    "a thousand million layers": (change(CONFIG, text__encoder_layers=10**9), r"encoder_layers is 1000000000"),
    "no layers": (change(CONFIG, text__decoder_layers=0), r"decoder_layers is 0"),
    "random weights of no deviation": (change(CONFIG, text__init_std=None), r"init_std is None, expected a number"),
    "heads that do not divide": (change(CONFIG, text__encoder_attention_heads=3), r"encoder_attention_heads=3"),
    "no heads": (change(CONFIG, text__decoder_attention_heads=0), r"decoder_attention_heads is 0"),
    "an endless vocabulary": (change(CONFIG, text__vocab_size=10**12), r"vocab_size is 1000000000000"),
    "positions zero": (change(CONFIG, text__max_position_embeddings=0), r"max_position_embeddings is 0"),
    "padding outside": (change(CONFIG, text__pad_token_id=99999), r"pad_token_id is 99999"),
    "no start token": (change(CONFIG, text__decoder_start_token_id=None), r"decoder_start_token_id is None"),
    "image token outside": (change(CONFIG, image_token_id=51289), r"image_token_id is 51289, expected .* to 4095"),
    "image token below zero": (change(CONFIG, image_token_id=-1), r"image_token_id is -1"),
    "an unknown activation": (change(CONFIG, text__activation_function="mish?"), r"config\.json: activation 'mish\?'"),
    "depths a number": (change(CONFIG, vision__depths=3), r"config\.json .*depths"),
    "depths of texts": (change(CONFIG, vision__depths=["a"]), r"config\.json .*depths"),
    "depths of 10^9": (change(CONFIG, vision__depths=[10**9]), r"depths is 1000000000"),
    "no stages": (change(CONFIG, vision__depths=[]), r"depths has 0 stages"),
    "a hundred thousand stages": (change(CONFIG, vision__depths=[1] * 100_000), r"depths has 100,000 stages"),
    "stages of unequal lists": (change(CONFIG, vision__num_heads=[2, 2]), r"one entry per stage"),
    "stride zero": (change(CONFIG, vision__patch_stride=[0]), r"patch_stride is 0"),
    "window zero": (change(CONFIG, vision__window_size=0), r"window_size is 0"),
    "groups that do not divide": (change(CONFIG, vision__num_groups=[3]), r"does not divide"),
    "mlp ratio infinite": (change(CONFIG, vision__mlp_ratio=float("inf")), r"mlp_ratio is inf"),
    "four channels": (change(CONFIG, vision__in_channels=4), r"in_channels is 4"),
    "generation half": (cut(GENERATION, 0.5), r"generation_config\.json cannot be read as JSON"),
    "generation a list": (write(GENERATION, b"[1]"), r"generation_config\.json holds a list"),
    "generation that samples": (change(GENERATION, do_sample=True), r"generation_config\.json: .*do_sample=True"),
    "generation with a penalty": (change(GENERATION, repetition_penalty=1.3), r"generation_config\.json: .*repetition"),
    "generation that starts elsewhere": (
        change(GENERATION, decoder_start_token_id=7),
        r"start_token_id=7, and",
    ),
    "generation that starts with a text": (change(GENERATION, decoder_start_token_id="a"), r"start_token_id is 'a'"),
    "generation that ends outside": (
        change(GENERATION, eos_token_id=[2, 2**63]),
        r"eos_token_id is 9223372036",
    ),
    "generation by no beams": (change(GENERATION, num_beams=-1), r"generation_config\.json"),
    "generation by a million beams": (change(GENERATION, num_beams=10**6), r"num_beams is 1000000"),
    "generation of half an n-gram": (change(GENERATION, no_repeat_ngram_size=2.5), r"no_repeat_ngram_size is 2\.5"),
    "generation with a penalty of text": (change(GENERATION, length_penalty="x"), r"length_penalty is 'x'"),
    "generation that stops sometimes": (change(GENERATION, early_stopping="often"), r"generation_config\.json"),
    "generation that never ends": (change(GENERATION, eos_token_id=9), r"none would ever end"),
    "generation that ends where it begins": (
        change(GENERATION, eos_token_id=[2, 0], forced_bos_token_id=0),
        r"forced_bos_token_id is 0, .*empty",
    ),
    "generation that begins with the end": (
        change(GENERATION, forced_bos_token_id=2),
        r"generation_config\.json: forced_bos_token_id is 2, which ends answers too",
    ),
    "padding of generation a word": (change(GENERATION, pad_token_id=500), r"pad token of generation is 500"),
    "tokenizer missing": (lambda folder: (folder / TOKENIZER).unlink(), r"no tokenizer"),
    "tokenizer empty": (write(TOKENIZER, b""), r"tokenizer\.json .*empty"),
    "tokenizer half": (cut(TOKENIZER, 0.5), r"tokenizer\.json cannot be read as JSON"),
    "tokenizer an LFS pointer": (write(TOKENIZER, POINTER), r"tokenizer\.json .*git lfs pull"),
    "tokenizer an empty object": (write(TOKENIZER, b"{}"), r"processor in .* cannot be read"),
    "tokenizer without a vocabulary": (change(TOKENIZER, model={"type": "BPE"}), r"processor in .* cannot be read"),
    "tokenizer whose words go on with a prefix": (
        change(TOKENIZER, model={"type": "BPE", "continuing_subword_prefix": "x", "vocab": {}, "merges": []}),
        r"tokenizer\.json: model\.continuing_subword_prefix is 'x'",
    ),
    "tokenizer that cuts words by chance": (
        reword('"dropout": null', '"dropout": 0.5'),
        r"tokenizer\.json: model\.dropout is '0\.5'",
    ),
    "tokenizer that begins no text": (
        both(change(TOKENIZER, post_processor=None), change(GENERATION, forced_bos_token_id=0)),
        r"begin with forced_bos_token_id=0, and the tokenizer begins those that are learnt with",
    ),
    "tokenizer of an unknown kind": (change(TOKENIZER, model={"type": "none"}), r"processor in .* cannot be read"),
    "tokenizer whose template names no token": (
        reword('"SpecialToken": {"id": "<s>"', '"SpecialToken": {"id": "<none>"'),
        r"cannot be read|fails on a text",
    ),
    "tokenizer configuration half": (cut("tokenizer_config.json", 0.5), r"tokenizer_config\.json cannot be read"),
    "tokenizer without an image token": (drop("tokenizer_config.json", "image_token"), r"cannot be read.*image token"),
    "tokenizer longer than the vocabulary": (add_token(4096), r"token 4096, and the vocabulary .* ends with 4095"),
    "tokenizer far longer": (add_token(10**9), r"token 1000000000"),
    "tokenizer with another image token": (
        change("tokenizer_config.json", image_token="<mask>"),
        r"image token is 4 in the tokenizer and image_token_id=5",
    ),
    "config with another image token": (change(CONFIG, image_token_id=7), r"5 in the tokenizer and image_token_id=7"),
    "processor missing": (lambda folder: (folder / PROCESSOR).unlink(), r"no image processor"),
    "processor half": (cut(PROCESSOR, 0.5), r"processor_config\.json cannot be read as JSON"),
    "processor a web page": (write(PROCESSOR, PAGE), r"processor_config\.json .*web page"),
    "processor an empty object": (write(PROCESSOR, b"{}"), r"processor in .* cannot be read"),
    "processor of another kind": (change(PROCESSOR, image__image_processor_type="None"), r"processor in .* cannot"),
    "std zero": (
        change(PROCESSOR, image__image_std=[0.2, 0.0, 0.2]),
        r"cannot be used: .*image_std",
    ),
    "std below zero": (change(PROCESSOR, image__image_std=[0.2, -1.0, 0.2]), r"image_std"),
    "std of two": (change(PROCESSOR, image__image_std=[0.2, 0.2]), r"processor_config\.json cannot be used"),
    "std a text": (change(PROCESSOR, image__image_std="x"), r"processor"),
    "mean infinite": (change(PROCESSOR, image__image_mean=[float("inf")] * 3), r"not finite"),
    "factor infinite": (change(PROCESSOR, image__rescale_factor=float("nan")), r"not finite"),
    "factor zero": (change(PROCESSOR, image__rescale_factor=0), r"processor_config\.json .*differ by 0, 0, 0"),
    "factor false": (change(PROCESSOR, image__rescale_factor=False), r"processor_config\.json .*differ by 0, 0, 0"),
    "factor next to nothing": (change(PROCESSOR, image__rescale_factor=1e-30), r"would not be seen; .*rescale_factor"),
    "factor beyond all": (change(PROCESSOR, image__rescale_factor=1e20), r"would not be seen"),
    "std beyond all": (change(PROCESSOR, image__image_std=[1e30] * 3), r"would not be seen; .*image_std"),
    "std beyond all in one channel": (change(PROCESSOR, image__image_std=[0.2, 1e30, 0.2]), r"would not be seen"),
    "std next to nothing": (change(PROCESSOR, image__image_std=[1e-30] * 3), r"would not be seen"),
    "no size": (change(PROCESSOR, image__size={"shortest_edge": 64}), r"processor_config\.json cannot be used"),
    "size zero": (change(PROCESSOR, image__size={"height": 0, "width": 64}), r"cannot be used"),
    "size below zero": (
        change(PROCESSOR, image__size={"height": -64, "width": 64}),
        r"processor_config\.json cannot be used",
    ),
    "size of 10^6": (change(PROCESSOR, image__size={"height": 10**6, "width": 10**6}), r"at most 4096 a side"),
    "a size of 10^6 before it is cropped": (
        change(
            PROCESSOR,
            image__size={"height": 10**6, "width": 10**6},
            image__do_center_crop=True,
            image__crop_size={"height": 64, "width": 64},
        ),
        r"brings pictures to 1000000 pixels",
    ),
    "an unknown resampling": (change(PROCESSOR, image__resample=99), r"processor"),
    "size of another tower": (
        change(PROCESSOR, image__size={"height": 32, "width": 64}),
        r"image_seq_length=17 image tokens .* makes 9 of its pictures of \(32, 64\)",
    ),
    "size beyond the tower's positions": (
        both(change(PROCESSOR, image__size={"height": 160, "width": 16}, image__image_seq_length=11)),
        r"10x1 feature map does not fit max_position_embeddings=4",
    ),
    "count of another tower": (change(PROCESSOR, image__image_seq_length=577), r"image_seq_length=577 .* makes 17"),
    "count zero": (change(PROCESSOR, image__image_seq_length=0), r"image_seq_length=0, expected"),
    "count of 10^9": (change(PROCESSOR, image__image_seq_length=10**9), r"image_seq_length=1000000000, expected"),
    "count a text": (change(PROCESSOR, image__image_seq_length="many"), r"image_seq_length='many'"),
    "no room for text": (change(CONFIG, text__max_position_embeddings=18), r"no room for a text in 18 positions"),
    "Microsoft's layout without its fields": (
        change(CONFIG, auto_map={"AutoConfig": "configuration_florence2.Florence2Config"}),
        r"config\.json: vision_config\.image_pos_embed is None",
    ),
    "a language model alone": (change(CONFIG, model_type="florence2_language"), r"expected 'florence2'"),
}

# Of these only the weights are opened.
CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), r"neither model\.safetensors nor"),
    "weights empty": (write(WEIGHTS, b""), r"model\.safetensors is no whole safetensors file: it is empty"),
    "weights of 4 bytes": (write(WEIGHTS, b"\1\0\0\0"), r"model\.safetensors is no whole"),
    "weights half": (cut(WEIGHTS, 0.5), r"model\.safetensors is no whole safetensors file"),
    "weights of the header's half": (cut(WEIGHTS, 0.01), r"model\.safetensors .*cut short"),
    "weights but the last byte": (cut(WEIGHTS, 0.9999), r"model\.safetensors is no whole"),
    "weights of zeros": (write(WEIGHTS, bytes(9000)), r"model\.safetensors is no whole"),
    "weights a web page": (write(WEIGHTS, PAGE), r"model\.safetensors .*web page"),
    "weights an LFS pointer": (write(WEIGHTS, POINTER), r"model\.safetensors .*git lfs pull"),
    "weights a pickle": (write(WEIGHTS, b"PK\x03\x04" + bytes(99)), r"PyTorch pickle"),
    "weights a GGUF": (write(WEIGHTS, b"GGUF" + bytes(99)), r"GGUF"),
    "weights whose header's length begins with a space": (write(WEIGHTS, b" \x80\x04" + bytes(5)), r"cut short"),
    "weights with a header beyond all": (write(WEIGHTS, b"\xff" * 99), r"model\.safetensors .*cut short"),
    "weights under another name": (rename(WEIGHTS, "florence.safetensors"), r"florence\.safetensors none is called"),
    "only a PyTorch pickle": (
        rename(WEIGHTS, "pytorch_model.bin"),
        r"pytorch_model\.bin cannot be read as PyTorch's weights",
    ),
    "only pieces of pickles": (
        rename(WEIGHTS, "pytorch_model-00001-of-00002.bin"),
        r"00001-of-00002\.bin none is called so",
    ),
    "index half": (shard(content=b'{"metadata": {}, "weight_m'), r"index\.json cannot be read as JSON"),
    "index empty": (shard(content=b""), r"index\.json .*empty"),
    "index a list": (shard(content=b"[]"), r"index\.json holds a list"),
    "index without a map": (shard(content=b"{}"), r"index\.json has no weight_map"),
    "index with an empty map": (shard({}), r"index\.json has no weight_map"),
    "index with a list for a map": (shard(["a"]), r"index\.json has no weight_map"),
    "index of files elsewhere": (shard({SHARED: "../../model.safetensors"}), r"'\.\./\.\./model\.safetensors'"),
    "index of an absolute path": (shard({SHARED: "/etc/passwd"}), r"'/etc/passwd'"),
    "index of numbers": (shard({SHARED: 7}), r"names files that are not there: 7"),
    "index of a missing file": (shard(), r"names files that are not there: model-00002"),
    "not a number": (fill(QUERY, np.nan), rf"not finite in float32: {QUERY} in model\.safetensors"),
    "infinity": (fill(SHARED, np.inf), rf"not finite in float32: {SHARED}"),
    "not a number in bfloat16": (fill(QUERY, np.nan, ml_dtypes.bfloat16), rf"not finite in float32: {QUERY}"),
    "beyond float32": (fill(QUERY, 1e300, np.float64), rf"not finite in float32: {QUERY}"),
    "whole numbers": (retensor(lambda t: t.update({QUERY: t[QUERY].astype(np.int8)})), rf"of type I8: {QUERY}"),
    "a tensor missing": (retensor(lambda t: t.pop(QUERY)), rf"missing: {QUERY}"),
    "a tensor of a scalar": (retensor(lambda t: t.update({QUERY: np.zeros((), np.float32)})), "misshapen"),
    "a tensor transposed": (retensor(lambda t: t.update({SHARED: t[SHARED].T.copy()})), rf"misshapen: {SHARED}"),
    "another tensor": (
        retensor(lambda t: t.update({"model.extra": np.zeros(3, np.float32)})),
        r"unexpected: ",
    ),
    "a head in 8 bits": (set_tensor("lm_head.weight", (4, 4), ml_dtypes.float8_e4m3fn), r"of type F8_E4M3: lm_head"),
    "a constant of whole numbers": (set_tensor(TEMPORAL, (10, 16), np.int8), rf"of type I8: {TEMPORAL}"),
    "a constant of odd width": (set_tensor(TEMPORAL, (10, 7)), rf"not as the model has it .*{TEMPORAL}"),
    "a constant of width 1": (set_tensor(TEMPORAL, (10, 1)), rf"not as the model has it .*{TEMPORAL}"),
    "a constant of width 0": (set_tensor(TEMPORAL, (10, 0)), rf"not as the model has it .*{TEMPORAL}"),
    "a constant that is a scalar": (set_tensor(TEMPORAL, ()), rf"not as the model has it .*{TEMPORAL}"),
    "a constant of another value": (set_tensor(TEMPORAL, (10, 16)), rf"not as the model has it .*{TEMPORAL}"),
    "no tensors": (lambda folder: save_file({}, folder / WEIGHTS), r"missing: "),
    "a head of its own": (retensor(lambda t: t.update({"lm_head.weight": t[SHARED] + 1})), r"lm_head\.weight"),
}


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    return model


@pytest.fixture(scope="module")
def vlm(whole: Path) -> Vlm:
    """Opened whole, so every case below fails by what it spoils; its shapes are traced once."""
    vlm, _ = open_model(whole)
    load_weights(vlm, whole)
    return vlm


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def assert_one_line(message: str, folder: Path) -> None:
    assert str(folder) in message
    assert len(message) < 1000
    assert "Traceback" not in message


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_folder_that_is_no_model(folder: Path, case: str) -> None:
    spoil, expected = CONFIGURATIONS[case]
    spoil(folder)
    with pytest.raises(UserError, match=expected) as caught:
        open_model(folder)
    assert_one_line(str(caught.value), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gemma3", "internvl", "qwen2.5-vl"])
@pytest.mark.parametrize("part", ["text", "vision"])
def test_layers_without_end_are_refused_at_once(tmp_path: Path, kind: str, part: str) -> None:
    """transformers would list 10^9 of them before they could be counted."""
    causal_cases.CASES[kind](tmp_path)
    change(CONFIG, **{f"{part}__num_hidden_layers": 10**9})(tmp_path)
    with pytest.raises(UserError, match=rf"config\.json: {part}_config\.num_hidden_layers is 1000000000, expected"):
        read_vlm(tmp_path)


@pytest.mark.parametrize("scale", [None, float("nan"), 10**9, "x"])
def test_a_scale_that_no_clip_has_is_refused(tmp_path: Path, scale: Any) -> None:
    clip_cases.write_clip(tmp_path)
    change(CONFIG, logit_scale_init_value=scale)(tmp_path)
    with pytest.raises(UserError, match=r"config\.json.*logit_scale_init_value"):
        read_vlm(tmp_path)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_weights_that_are_none(vlm: Vlm, folder: Path, case: str) -> None:
    spoil, expected = CHECKPOINTS[case]
    spoil(folder)
    with pytest.raises(UserError, match=expected) as caught:
        load_weights(vlm, folder)
    if "missing: " not in expected:
        assert_one_line(str(caught.value), folder)


def test_sizes_that_the_weights_do_not_have_ask_for_no_memory(folder: Path) -> None:
    """Four terabytes, if they were made before the header was read."""
    wide = {"text__vocab_size": 2**24, "text__d_model": 2**16, "vision__projection_dim": 2**16}
    change(CONFIG, **wide, text__encoder_layers=8)(folder)
    vlm, _ = open_model(folder)
    with pytest.raises(UserError, match=r"misshapen: .*embed_positions\.weight is \[66, 16\]"):
        load_weights(vlm, folder)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (cut(CONFIG, 0.5), "config.json"),
        (write(TOKENIZER, POINTER), "git lfs pull"),
        (cut(WEIGHTS, 0.5), "safetensors"),
    ],
)
def test_the_command_says_it_in_one_line(
    folder: Path, tmp_path: Path, spoil: Spoil, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", str(folder), "--out", str(tmp_path / "run"), "--data.languages", "en"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedvlm: ")]
    assert stop.value.code == 2
    assert len(said) == 1
    assert str(folder) in said[0]
    assert expected in said[0]


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.language_model.encoder.embed_tokens.weight",
        "language_model.decoder.embed_tokens.weight",
        "model.language_model.lm_head.weight",
        "model.shared.weight",
    ],
)
def test_a_token_table_under_a_tied_name_loads(vlm: Vlm, whole: Path, folder: Path, name: str) -> None:
    """safetensors keeps one of tensors that are tied, under any of their names."""
    retensor(lambda tensors: tensors.update({name: tensors.pop(SHARED)}))(folder)
    there, here = (load_weights(vlm, one)["language_model"]["shared"]["embedding"] for one in (whole, folder))
    np.testing.assert_array_equal(there, here)


def test_a_hub_id_is_judged_by_its_configuration(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is not implemented only config.json is fetched; of a good one everything."""
    import huggingface_hub

    asked: list[Any] = []

    def fetch(name: str, file: str) -> str:
        asked.append(file)
        return str(folder / file)

    def fetch_all(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch_all)
    open_model("owner/model")
    assert asked[0] == CONFIG
    assert all("*.safetensors" not in patterns for patterns in asked)
    asked.clear()
    change(CONFIG, quantization_config={})(folder)
    with pytest.raises(UserError, match="quantised"):
        open_model("owner/model")
    assert asked == [CONFIG]


@pytest.mark.parametrize("pickled", [True, False])
def test_a_hub_id_without_safetensors_gives_its_pickles(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    """They are fetched only then, and only where weights are wanted."""
    import huggingface_hub

    tensors, asked = load_file(folder / WEIGHTS), list[str]()
    (folder / WEIGHTS).unlink()

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        if pickled and "pytorch_model*.bin" in allow_patterns:
            write_pickle(folder / "pytorch_model.bin", tensors)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    open_model("owner/model")  # which needs no weights
    assert "pytorch_model*.bin" not in asked
    if pickled:
        _, params = load_vlm("owner/model")
        np.testing.assert_array_equal(params["language_model"]["shared"]["embedding"], tensors[SHARED])
    else:
        with pytest.raises(UserError, match=r"owner/model has neither \*\.safetensors nor pytorch_model\*\.bin"):
            load_vlm("owner/model")


@pytest.mark.parity
def test_a_torchvision_that_does_not_fit_is_told(whole: Path, tmp_path: Path) -> None:
    """Such a one fails when it is imported, and transformers imports it wherever PyTorch is installed too."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    code = (
        "import sys; from fedvlm_jax import Processor, UserError\n"
        "try: Processor.from_folder(sys.argv[1])\nexcept UserError as error: print(error); sys.exit(2)"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", code, str(whole)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert ended.returncode == 2, ended.stderr
    assert "pip uninstall torchvision" in ended.stdout
