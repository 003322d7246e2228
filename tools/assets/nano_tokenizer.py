"""Florence2-nano's words and eyes: a byte-level BPE tokenizer, the image processor, and the two configurations.

Everything in the model folder that is not a weight is made here. The special tokens play the roles that they have in
Florence-2 (<s>=0, <pad>=1, </s>=2, <unk>=3, <image>), and the processor builds prompts as Florence-2's does:
image tokens, then ``<s> question </s>``. Answers are tokenised with the tokenizer's defaults: ``<s> answer </s>``.
The merges are learned from the public corpus alone (names, keywords, groups, subgroups and questions).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE = 64
IMAGE_TOKENS = 17  # a 4x4 map, and its mean in front of it
VOCABULARY = 4096
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def learn_merges(texts: Iterable[str], special: list[str], vocabulary: int) -> Tokenizer:
    """Learn byte-level BPE merges from ``texts`` (each text counts as often as it is given)."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges; prompts and answers begin with <s> and end with </s>."""
    tokenizer = learn_merges(texts, SPECIAL_TOKENS, VOCABULARY)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=64,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def corpus_texts(rows: Iterable[dict], questions: Iterable[str]) -> list[str]:
    """The texts of the corpus's training rows, once per concept; names of groups weigh more, since they are answers."""
    texts: list[str] = []
    classes: set[str] = set()
    seen: set[str] = set()
    for row in rows:
        if row["split"] != "train" or row["concept"] in seen:
            continue
        seen.add(row["concept"])
        for names in json.loads(row["names"]).values():
            texts += [names["label"], *names["tags"]]
            classes |= {names["group"], names["subgroup"]}
    return texts + 30 * sorted(classes) + 5 * list(questions)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Florence2Processor:
    """64x64, ImageNet mean and deviation, no crop; 17 image tokens in front of every prompt."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    image_processor.image_seq_length = IMAGE_TOKENS
    return Florence2Processor(image_processor=image_processor, tokenizer=tokenizer)


def make_config(vocabulary: int = VOCABULARY) -> Florence2Config:
    """The architecture: most parameters in the tower (its features are cached), a text half that is cheap to train."""
    width = 128
    text = BartConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=64,
        dropout=0.1,
        activation_function="quick_gelu",
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        tie_word_embeddings=True,
    )
    vision = {
        "embed_dim": [32, 96, 192, 256],
        "depths": [1, 1, 3, 1],
        "num_heads": [1, 3, 6, 8],
        "num_groups": [1, 3, 6, 8],
        "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 1],
        "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
        "window_size": 4,
        "mlp_ratio": 4.0,
        "activation_function": "quick_gelu",  # a quarter cheaper on a CPU than the exact one
        "drop_path_rate": 0.1,
        "projection_dim": width,
        "max_position_embeddings": 4,
        "max_temporal_embeddings": 1,
    }
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=SPECIAL_TOKENS.index("<image>"))
    config.architectures = ["Florence2ForConditionalGeneration"]
    for name, token in {"bos": 0, "pad": 1, "eos": 2}.items():
        setattr(config, f"{name}_token_id", token)
    return config


def make_generation_config() -> GenerationConfig:
    """Greedy decoding of short answers, begun and ended as Florence-2 begins and ends them."""
    return GenerationConfig(
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        forced_eos_token_id=2,
        num_beams=1,
        max_new_tokens=16,
    )


def write_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Florence2Config:
    """Write every file of the model folder that is not weights or prose; returns the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(len(tokenizer))
    make_processor(tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    make_generation_config().save_pretrained(folder)
    return config
