"""CLIP-nano's folder but for its weights: tokenizer, image processor and configuration.

The tokenizer is CLIP's in all but its merges, the tower of pictures has the shape of SmolVLM-nano's and a class token.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from nano_tokenizer import IMAGE_SIZE, MEAN, STD, VOCABULARY
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEMPLATES = {"a photo of a {}.": 0.45, "{}": 0.35, "a picture of {}.": 0.1, "an emoji of {}": 0.1}
"""What a text is written into, and how often; the first is `--data.class-prompt`'s default."""
FRAMES = [template.replace("{}", "") for template in TEMPLATES] * 20
"""For the tokenizer's merges, which count how often a text is given."""
POSITIONS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Learn merges of lower-case words, each with its end marked, as CLIP's tokenizer splits them."""
    like = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, end_of_word_suffix=WORD_END, show_progress=False)
    )
    # Every byte is in the vocabulary, inside of a word and at its end, whether or not the texts have it.
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + WORD_END for letter in letters)]
    known, merges = set(words), []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        if len(words) == VOCABULARY - 2:
            break
        merges.append((left, right))
        if left + right not in known:
            words.append(left + right)
            known.add(left + right)
    vocabulary = {word: number for number, word in enumerate([*words, BOS, EOS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS, padding_side="right")


def make_config(vocabulary: int) -> CLIPConfig:
    """The architecture: SmolVLM-nano's tower with a class token, and a text model that reads many classes cheaply."""
    text = {
        "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "projection_dim": 128,
        "hidden_act": "quick_gelu", "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
        "image_size": IMAGE_SIZE, "patch_size": 8, "projection_dim": 128, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    config.architectures = ["CLIPModel"]
    return config


def write_folder(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write every file of the model folder that is not weights or prose."""
    folder.mkdir(parents=True, exist_ok=True)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, resample=3, do_convert_rgb=True, image_mean=list(MEAN),
        image_std=list(STD),
    )  # fmt: skip
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_config(len(tokenizer)).save_pretrained(folder)
