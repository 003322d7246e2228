"""Text and pictures to arrays and back: a thin use of transformers' `Florence2Processor`, without PyTorch.

A prompt is what Florence-2 takes (arXiv 2311.06242): image tokens, `<s>`, the text, `</s>`; a task token such as
`<CAPTION>` is written out as its sentence. An answer is tokenised as BART's labels are: `<s>`, the text, `</s>`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax.errors import UserError

IGNORED = -100  # a label that takes part in no loss
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
_IMAGES = ("processor_config.json", "preprocessor_config.json")


def read_size(folder: Path) -> tuple[int, int] | None:
    """Height and width in pixels that a model's pictures are brought to, from its folder's JSON alone; None where it
    has none, or they are not brought to one size."""
    for name in _IMAGES:
        if not (folder / name).is_file():
            continue
        values = json.loads((folder / name).read_text())
        images = values.get("image_processor", values)
        size = images.get("crop_size" if images.get("do_center_crop") else "size") or {}
        if size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
    return None


@dataclass(frozen=True, eq=False)
class Processor:
    """Wraps transformers' own processor; make one with `from_folder`."""

    wrapped: Any
    """transformers' `Florence2Processor`."""

    @classmethod
    def from_folder(cls, path: Path | str) -> Processor:
        """The processor of a model's folder.

        Raises:
            UserError: where its tokenizer's or processor's files are missing or cannot be read.
        """
        folder = Path(path)
        for what, names in (("tokenizer", _TOKENIZERS), ("image processor", _IMAGES)):
            if not any((folder / name).is_file() for name in names):
                raise UserError(f"{folder} has no {what}: none of {', '.join(names)} is there")
        from transformers import Florence2Processor

        try:
            wrapped = Florence2Processor.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds
            raise UserError(
                f"the processor in {folder} cannot be read ({type(error).__name__}: {error}); it needs an image "
                "processor with image_seq_length and a tokenizer with an image token, as Florence-2's has"
            ) from error
        return cls(wrapped)

    @property
    def image_tokens(self) -> int:
        """Image tokens in front of every prompt; must equal `Vlm.image_tokens` of the picture's size."""
        return int(self.wrapped.num_image_tokens)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that every picture is brought to.

        Raises:
            UserError: where the configuration does not bring all pictures to one size.
        """
        images = self.wrapped.image_processor
        size = images.crop_size if images.do_center_crop else images.size
        if not (images.do_center_crop or images.do_resize) or not (size.get("height") and size.get("width")):
            raise UserError(f"the image processor does not bring pictures to one size: {dict(size)}")
        return int(size["height"]), int(size["width"])

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from every channel, after scaling to 0 … 1."""
        return tuple(self.wrapped.image_processor.image_mean)

    @property
    def std(self) -> tuple[float, ...]:
        """What every channel is divided by."""
        return tuple(self.wrapped.image_processor.image_std)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides how a picture becomes pixels, for the key of a cache."""
        settings = self.wrapped.image_processor.to_dict()
        settings = {key: settings[key] for key in sorted(settings) if not key.startswith("_")}
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def pixels(self, images: Sequence[Any], /) -> Float[np.ndarray, "B H W 3"]:
        """PIL images, of any size and mode, to normalised float32 pixels [B, H, W, 3].

        Raises:
            UserError: where pictures come out in another size than `size`.
        """
        height, width = self.size
        if not images:
            return np.empty((0, height, width, 3), np.float32)
        made = self.wrapped.image_processor([image.convert("RGB") for image in images], return_tensors="np")
        pixels = np.asarray(made["pixel_values"], np.float32).transpose(0, 2, 3, 1)
        if pixels.shape[1:] != (height, width, 3):
            raise UserError(f"the image processor made pixels {pixels.shape[1:]}, expected {(height, width, 3)}")
        return np.ascontiguousarray(pixels)

    def expand(self, text: str) -> str:
        """A prompt's text with a task token written out as its sentence.

        Raises:
            UserError: where a task that takes no input stands beside other text.
        """
        for task, sentence in self.wrapped.task_prompts_without_inputs.items():
            if task in text:
                if text != task:
                    raise UserError(f"the task {task} takes no input, but the prompt is {text!r}")
                return sentence
        for task, sentence in self.wrapped.task_prompts_with_input.items():
            if task in text:
                return sentence.format(input=text.replace(task, "").strip())
        return text

    def prompts(self, texts: Sequence[str], /) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        """Texts to `input_ids` and `attention_mask`, int32 [B, T], image tokens included, padded on the right."""
        tokenizer = self.wrapped.tokenizer
        head = self.wrapped.image_token * self.image_tokens + tokenizer.bos_token
        full = [head + self.expand(text) + tokenizer.eos_token for text in texts]
        ids = tokenizer(full, add_special_tokens=False)["input_ids"]
        return _pad(ids, tokenizer.pad_token_id), _pad([[1] * len(row) for row in ids], 0)

    def answers(self, texts: Sequence[str], max_tokens: int, /) -> Int[np.ndarray, "B U"]:
        """Texts to labels, int32 [B, U], padded with -100. Longer ones are cut to `max_tokens`, EOS the last."""
        tokenizer = self.wrapped.tokenizer
        rows = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        eos = tokenizer.eos_token_id
        rows = [row if row and row[-1] == eos else [*row, eos] for row in rows]
        return _pad([row if len(row) <= max_tokens else [*row[: max_tokens - 1], eos] for row in rows], IGNORED)

    def decode(self, ids: Int[np.ndarray, "B U"], /) -> list[str]:
        """Token ids (labels too: -100 is left out) to texts without special tokens."""
        tokenizer = self.wrapped.tokenizer
        rows = np.asarray(ids)
        rows = np.where(rows < 0, tokenizer.pad_token_id, rows)
        texts = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[np.ndarray, "B T"]:
    padded = np.full((len(rows), max(map(len, rows), default=0)), value, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded
