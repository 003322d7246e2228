"""The small base that ships: complete, small, readable by transformers and by us, and not random."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoProcessor, Florence2Processor

import fedvlm_jax
from fedvlm_jax.models import load_vlm

ASSETS = Path(fedvlm_jax.__file__).parent / "assets"
FOLDER = ASSETS / "florence2-nano"
EMOJI = ASSETS / "emoji" / "emoji.parquet"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
NAMES = {
    "en": "animals & nature",
    "de": "Süßigkeiten",
    "fr": "visage avec bouche en cœur",
    "es": "¡piñata!",
    "it": "tempo atmosferico",
    "pt": "coração",
    "nl": "sloten & sleutels",
    "pl": "kłódki & klucze",
    "sv": "ansikten på katter",
    "ru": "смайлики и эмоции",
    "ja": "食べ物と飲み物",
    "zh": "微笑",
}


@pytest.fixture(scope="module")
def processor() -> Florence2Processor:
    return AutoProcessor.from_pretrained(FOLDER)


def test_folder_is_complete_and_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == FILES
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16_000_000


def test_special_tokens_have_the_roles_they_have_in_florence2(processor: Florence2Processor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["image_token_id"] == processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert config["text_config"]["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize("language", NAMES)
def test_tokenizer_round_trips_every_language(processor: Florence2Processor, language: str) -> None:
    ids = processor.tokenizer(NAMES[language]).input_ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == NAMES[language]


def test_prompt_is_image_tokens_then_the_question(processor: Florence2Processor) -> None:
    made = processor(images=[Image.new("RGB", (80, 50))], text=["What is this?"], return_tensors="np")
    ids = made["input_ids"][0].tolist()
    assert ids[:18] == [processor.image_token_id] * 17 + [0]
    assert ids[18:-1] == processor.tokenizer("What is this?", add_special_tokens=False).input_ids
    assert ids[-1] == 2
    assert made["pixel_values"].shape == (1, 3, 64, 64)


def test_shipped_answers_are_short(processor: Florence2Processor) -> None:
    table = pq.read_table(EMOJI, columns=["chosen"], filters=[("task", "in", ["group", "subgroup"])])
    answers = pc.unique(table["chosen"]).to_pylist()
    lengths = {answer: len(processor.tokenizer(answer).input_ids) for answer in answers}
    assert len(answers) > 500
    assert max(lengths.values()) <= 12, sorted(lengths, key=lengths.__getitem__)[-5:]


def test_names_the_group_of_unseen_pictures(processor: Florence2Processor) -> None:
    """Sixty validation pictures of vendors that it never saw: far above the share of the commonest answer."""
    columns = ["image", "idx", "chosen", "question_neutral"]
    filters = [("split", "=", "validation"), ("task", "=", "group"), ("language", "=", "en")]
    rows = sorted(pq.read_table(EMOJI, columns=columns, filters=filters).to_pylist(), key=lambda row: row["idx"])
    rows = rows[:: len(rows) // 60][:60]
    vlm, params = load_vlm(FOLDER)
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    asked = processor(images=images, text=[row["question_neutral"] for row in rows], return_tensors="np", padding=True)
    batch = {
        "pixel_values": asked["pixel_values"].transpose(0, 2, 3, 1),
        "input_ids": asked["input_ids"],
        "attention_mask": asked["attention_mask"],
    }
    tokens = jax.jit(lambda params, batch: vlm.generate(params, None, batch, 10))(params, batch)
    given = processor.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
    right = np.mean([answer == row["chosen"] for answer, row in zip(given, rows, strict=True)])
    answers = [row["chosen"] for row in rows]
    chance = max(answers.count(answer) for answer in answers) / len(answers)
    assert right > chance + 0.15, f"{right:.2f} against a chance of {chance:.2f}"
