"""The small bases that ship: complete, small, readable by transformers and by us, and not random."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from assets.shipped_folders import ASSETS, EMOJI, NAMES, read_unseen
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Florence2Processor

from fedvlm_jax.models import load_weights, open_model

FOLDER = ASSETS / "florence2-nano"
SMOLVLM = ASSETS / "smolvlm-nano"
BOTH = pytest.mark.parametrize("folder", [FOLDER, SMOLVLM], ids=lambda folder: folder.name)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
MORE = {FOLDER: set[str](), SMOLVLM: {"chat_template.jinja", "preprocessor_config.json"}}


@pytest.fixture(scope="module")
def processor() -> Florence2Processor:
    return AutoProcessor.from_pretrained(FOLDER)


@BOTH
def test_folder_is_complete_and_small(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == FILES | MORE[folder]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000


def test_special_tokens_have_the_roles_they_have_in_florence2(processor: Florence2Processor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["image_token_id"] == processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert config["text_config"]["vocab_size"] == len(tokenizer)


@BOTH
@pytest.mark.parametrize("language", NAMES)
def test_tokenizer_round_trips_every_language(folder: Path, language: str) -> None:
    _, processor = open_model(folder)
    labels = processor.answers([NAMES[language]], 24)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert labels[0][labels[0] != -100][-1] == ends
    assert processor.decode(np.where(labels == -100, ends, labels)) == [NAMES[language]]


def test_a_smolvlm_prompt_is_its_chat_template_s() -> None:
    """By transformers' own template; its processor, which needs torchvision, would repeat the image token."""
    config = json.loads((SMOLVLM / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(SMOLVLM)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=0)
    count = json.loads((SMOLVLM / "processor_config.json").read_text())["image_seq_len"]
    mark = "<fake_token_around_image>"
    chat = chat.replace("<image>", f"{mark}<global-img>{'<image>' * count}{mark}")
    ids, mask = open_model(SMOLVLM)[1].prompts(["What is this?"])
    assert ids[0].tolist() == tokenizer(chat, add_special_tokens=False).input_ids
    assert mask.all()
    assert (ids[0] == config["image_token_id"]).sum() == count == 16


def test_prompt_is_image_tokens_then_the_question(processor: Florence2Processor) -> None:
    made = processor(images=[Image.new("RGB", (80, 50))], text=["What is this?"], return_tensors="np")
    ids = made["input_ids"][0].tolist()
    assert ids[:18] == [processor.image_token_id] * 17 + [0]
    assert ids[18:-1] == processor.tokenizer("What is this?", add_special_tokens=False).input_ids
    assert ids[-1] == 2
    assert made["pixel_values"].shape == (1, 3, 64, 64)


@BOTH
def test_shipped_answers_are_short(folder: Path) -> None:
    _, processor = open_model(folder)
    table = pq.read_table(EMOJI, columns=["chosen"], filters=[("task", "in", ["group", "subgroup"])])
    answers = pc.unique(table["chosen"]).to_pylist()
    lengths = (processor.answers(answers, 24) != -100).sum(1)
    assert len(answers) > 500
    assert lengths.max() <= 12, answers[int(lengths.argmax())]


@BOTH
def test_names_the_group_of_unseen_pictures(folder: Path) -> None:
    """Far above the share of the commonest answer."""
    vlm, processor = open_model(folder)
    batch, answers = read_unseen(processor)
    tokens = jax.jit(lambda params, batch: vlm.generate(params, None, batch, 10))(load_weights(vlm, folder), batch)
    given = processor.decode(np.asarray(tokens))
    right = np.mean([answer == wanted for answer, wanted in zip(given, answers, strict=True)])
    chance = max(answers.count(answer) for answer in answers) / len(answers)
    assert right > chance + 0.15, f"{right:.2f} against a chance of {chance:.2f}"


@pytest.mark.parity
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
)
def test_transformers_loads_smolvlm_nano_and_answers_alike() -> None:
    import torch
    from models import causal_reference
    from transformers import AutoModelForImageTextToText

    reference, info = AutoModelForImageTextToText.from_pretrained(
        SMOLVLM, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    vlm, processor = open_model(SMOLVLM)
    params = load_weights(vlm, SMOLVLM)
    batch, answers = read_unseen(processor)
    batch, labels = {name: value[:12] for name, value in batch.items()}, processor.answers(answers[:12], 10)
    found = np.where(labels[..., None] == -100, 0, vlm.logits(params, None, batch | {"labels": labels}))
    np.testing.assert_allclose(found, causal_reference.find_logits(reference.eval(), batch, labels), atol=1e-4)
    tokens = np.asarray(vlm.generate(params, None, batch, 10))
    np.testing.assert_array_equal(tokens, causal_reference.generate(reference, batch, 10))
