"""Prompts, labels and pixels against transformers' own Florence2Processor, in a folder made here without PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvlm_jax.errors import UserError
from fedvlm_jax.models.florence2 import Processor

TEXTS = ["<CAPTION>", "what is this ?", "<REGION_TO_OCR>here"]


def save_processor(folder: Path, width: int = 20, **tokenizer_options: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Florence2Processor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["what", "does", "the", "image", "describe", "?", "is", "this", "text", "in", "region", "here", "a", "cat"]
    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<image>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = {"image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, **names, extra_special_tokens=extra, **tokenizer_options
    )
    images = CLIPImageProcessorPil(
        size={"height": 16, "width": width}, do_center_crop=False, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    images.image_seq_length = 3
    Florence2Processor(images, tokenizer).save_pretrained(folder)


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    save_processor(tmp_path)
    return Processor.from_folder(tmp_path)


def test_prompts_and_pixels_are_those_of_transformers(processor: Processor) -> None:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (30, 50 + n, 3), dtype=np.uint8)) for n in range(3)]
    expected = processor.wrapped(images=images, text=TEXTS, padding=True, return_tensors="np")
    ids, mask = processor.prompts(TEXTS)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    np.testing.assert_array_equal(processor.pixels(images), expected["pixel_values"].transpose(0, 2, 3, 1))
    assert processor.pixels([]).shape == (0, 16, 20, 3)


def test_pixels_by_hand(processor: Processor) -> None:
    pixels = processor.pixels([Image.new("RGBA", (5, 5), (255, 0, 51, 255))])
    np.testing.assert_allclose(pixels[0, 3, 4], [(1 - 0.5) / 0.2, -0.4 / 0.3, (0.2 - 0.3) / 0.4], atol=1e-6)


@pytest.mark.parametrize("file", ["shipped", "processor_config.json", "preprocessor_config.json"])
def test_mean_and_std_are_those_of_the_folder(tmp_path: Path, file: str) -> None:
    folder, mean, std = "florence2-nano", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # Florence-2's own
    if file != "shipped":
        save_processor(tmp_path)
        folder, mean, std = str(tmp_path), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    if file == "preprocessor_config.json":  # as the hub's checkpoints have it
        stored = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
        (tmp_path / "processor_config.json").unlink()
        (tmp_path / file).write_text(json.dumps(stored))
    black, white = Processor.from_folder(folder).pixels([Image.new("RGB", (5, 5), n) for n in ("black", "white")])
    np.testing.assert_allclose(black[3, 4], -np.divide(mean, std), rtol=1e-6)
    np.testing.assert_allclose(white[3, 4], (1 - np.asarray(mean)) / std, rtol=1e-6)


def test_prompts_are_padded_on_the_right_whatever_the_tokenizer_says(tmp_path: Path) -> None:
    save_processor(tmp_path, padding_side="left")
    ids, mask = Processor.from_folder(tmp_path).prompts(["a", "a cat here"])
    assert ids[0].tolist()[:6] == [4, 4, 4, 0, ids[1, 4], 2]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]


def test_answers_end_with_eos_also_where_cut(processor: Processor) -> None:
    labels = processor.answers(["a cat", "what is this text in the image"], 5)
    assert labels[0].tolist() == [0, *labels[0, 1:3].tolist(), 2, -100]
    assert labels[1].tolist()[-1] == 2
    assert processor.decode(labels) == ["a cat", "what is this"]


def test_a_task_without_input_stands_alone(processor: Processor) -> None:
    assert processor.expand("<CAPTION>") == "What does the image describe?"
    assert processor.expand("<REGION_TO_OCR>x") == "What text is in the region x?"
    with pytest.raises(UserError, match="takes no input"):
        processor.prompts(["<CAPTION> please"])


def test_a_text_cannot_place_pictures(processor: Processor) -> None:
    with pytest.raises(UserError, match="the text holds <image>"):
        processor.prompts(["what is <image> this"])


def test_nor_can_a_text_that_only_becomes_the_image_token(processor: Processor) -> None:
    """A tokenizer may bring texts to one form before it looks for its tokens."""
    from tokenizers import AddedToken, normalizers

    inner = processor.wrapped.tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Lowercase()
    inner.add_tokens([AddedToken("<image>", normalized=True)])
    assert processor.image_token_id in processor.wrapped.tokenizer("a <IMAGE> here")["input_ids"]
    with pytest.raises(UserError, match="other than 3 image tokens"):
        processor.prompts(["a <IMAGE> here"])


def test_tokens_that_belong_to_answers_are_kept() -> None:
    """Locations are special tokens of Florence-2's tokenizer, and half of what <OD> answers."""
    processor = Processor.from_folder("florence2-nano")
    processor.wrapped.tokenizer.add_tokens([f"<loc_{number}>" for number in range(9)], special_tokens=True)
    texts = ["car<loc_1><loc_2>", "a cat", "caf\u00e9 <loc_8>"]
    assert processor.decode(processor.answers(texts, 20)) == texts
    assert processor.decode(np.array([[0, 5, 1, 3, 4, 2, 1, -100]])) == [""]


def test_what_decides_pixels_decides_the_fingerprint(tmp_path: Path) -> None:
    for name, width in (("one", 20), ("same", 20), ("wide", 24)):
        save_processor(tmp_path / name, width)
    one, same, wide = (Processor.from_folder(tmp_path / name) for name in ("one", "same", "wide"))
    assert one.fingerprint == same.fingerprint != wide.fingerprint
    assert (one.size, wide.size, one.image_tokens) == ((16, 20), (16, 24), 3)


def test_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        Processor.from_folder(tmp_path)
    save_processor(tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no image processor"):
        Processor.from_folder(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match="image_seq_length"):
        Processor.from_folder(tmp_path)
