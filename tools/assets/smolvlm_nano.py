"""SmolVLM-nano's folder but for its weights: tokenizer with chat tokens, image processor, and the configurations.

The special tokens, the chat template and the processors are SmolVLM's; a picture is one tile of 64x64 pixels.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from nano_tokenizer import IMAGE_SIZE, MEAN, STD, VOCABULARY, learn_merges
from transformers import GenerationConfig, PreTrainedTokenizerFast, SmolVLMConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from fedvlm_jax.models.smolvlm.processor import TEMPLATE

PAD, BOS, EOS, IMAGE = "<pad>", "<|im_start|>", "<end_of_utterance>", "<image>"
IMAGE_TOKENS = 16
SPECIAL_TOKENS = ["<unk>", BOS, PAD, EOS, "<fake_token_around_image>", IMAGE, "<global-img>"]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn byte-level BPE merges, each text as it stands and, as in an answer, behind a space."""
    texts = [*texts, *["User:", "\nAssistant:"] * 50]
    tokenizer = learn_merges([part for text in texts for part in (text, f" {text}")], SPECIAL_TOKENS, VOCABULARY)
    named = {"bos_token": BOS, "pad_token": PAD, "eos_token": EOS, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **named, additional_special_tokens=SPECIAL_TOKENS[4:], model_max_length=256,
        padding_side="right", clean_up_tokenization_spaces=False, chat_template=TEMPLATE,
    )  # fmt: skip


def make_config(vocabulary: int) -> SmolVLMConfig:
    """The architecture: a tower whose 64 patches become 16 image tokens, and a Llama that is cheap to train."""
    text = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
        "image_size": IMAGE_SIZE, "patch_size": 8,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=SPECIAL_TOKENS.index(IMAGE),
        tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["SmolVLMForConditionalGeneration"]
    return config


def make_generation_config() -> GenerationConfig:
    """Greedy decoding of short answers."""
    return GenerationConfig(bos_token_id=1, pad_token_id=2, eos_token_id=3, num_beams=1, max_new_tokens=16)


def write_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write every file of the model folder that is not weights or prose."""
    folder.mkdir(parents=True, exist_ok=True)
    side = {"longest_edge": IMAGE_SIZE}
    images = SmolVLMImageProcessorPil(
        size=side, max_image_size=side, do_image_splitting=False, image_mean=list(MEAN), image_std=list(STD)
    )
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # By hand: transformers' class of the three together needs torchvision.
    values = {"processor_class": "SmolVLMProcessor", "image_seq_len": IMAGE_TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    make_config(len(tokenizer)).save_pretrained(folder)
    make_generation_config().save_pretrained(folder)
