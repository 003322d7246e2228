"""Text and pictures to arrays and back: a thin use of transformers' `Florence2Processor`, without PyTorch.

A prompt is what Florence-2 takes (arXiv 2311.06242): image tokens, `<s>`, the text, `</s>`; a task token such as
`<CAPTION>` is written out as its sentence. An answer is tokenised as BART's labels are: `<s>`, the text, `</s>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.prompts import Prompt, to_prompt
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import base
from fedvlm_jax.models.florence2.microsoft_layout import has_layout, open_tokenizer
from fedvlm_jax.models.folder_files import read_json
from fedvlm_jax.models.hub import resolve_folder
from fedvlm_jax.models.processor_files import (
    IMAGES,
    MOST_TOKENS,
    check_files,
    decode,
    digest_settings,
    list_files,
    make_pixels,
    open_files,
    pad,
    try_out,
)


@dataclass(frozen=True, eq=False)
class Processor(base.Processor):
    """Florence-2's processor, around transformers' own; make one with `from_folder`."""

    wrapped: Any

    @classmethod
    def from_folder(cls, path: Path | str) -> Self:
        """Open the processor of a model, a path as `load_vlm` takes it, and have it make one picture and one prompt.

        Raises:
            UserError: its tokenizer's or processor's files are missing, cannot be read, or make nonsense.
        """
        folder = resolve_folder(path, weights=False)

        def join(images: Any, tokenizer: Any) -> Any:
            from transformers import Florence2Processor

            return Florence2Processor(images, tokenizer)

        check_files(folder)
        needs = "an image processor with image_seq_length and a tokenizer with an image token, as Florence-2's has"
        config = folder / "config.json"
        own = open_tokenizer if config.is_file() and has_layout(read_json(config)) else None
        processor = cls(open_files(folder, join, needs, own))
        count = processor.wrapped.num_image_tokens
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_TOKENS:
            file = folder / list_files(folder, IMAGES)[0]
            raise UserError(f"{file} has image_seq_length={count!r}, expected a whole number from 1 to {MOST_TOKENS}")
        try_out(processor, processor.wrapped.image_processor, folder)
        return processor

    @property
    def image_token_id(self) -> int:
        return int(self.wrapped.image_token_id)

    @property
    def largest_id(self) -> int:
        return max(self.wrapped.tokenizer.get_vocab().values())

    @property
    def eos_token_id(self) -> int:
        return int(self.wrapped.tokenizer.eos_token_id)

    @property
    def image_tokens(self) -> int:
        return int(self.wrapped.num_image_tokens)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all pictures; raises `UserError` where they are not brought to one size."""
        images = self.wrapped.image_processor
        size = images.crop_size if images.do_center_crop else images.size
        if not (images.do_center_crop or images.do_resize) or not (size.get("height") and size.get("width")):
            raise UserError(f"the image processor does not bring pictures to one size: {dict(size)}")
        return int(size["height"]), int(size["width"])

    @property
    def fingerprint(self) -> str:
        return digest_settings(self.wrapped.image_processor)

    def pixels(self, images: Sequence[Any], /) -> Float[np.ndarray, "B H W 3"]:
        return make_pixels(self._render, images, self.size)

    def _render(self, pictures: list[Image.Image]) -> np.ndarray:
        return self.wrapped.image_processor(pictures, return_tensors="np")["pixel_values"]

    def expand(self, text: str) -> str:
        """Write out a task token of a prompt's text as its sentence.

        Raises:
            UserError: a task that takes no input stands beside other text, or the text holds image tokens.
        """
        if self.wrapped.image_token in text:
            raise UserError(f"the text holds {self.wrapped.image_token}, which stands for a picture")
        for task, sentence in self.wrapped.task_prompts_without_inputs.items():
            if task in text:
                if text != task:
                    raise UserError(f"the task {task} takes no input, but stands beside other text")
                return sentence
        for task, sentence in self.wrapped.task_prompts_with_input.items():
            if task in text:
                return sentence.format(input=text.replace(task, "").strip())
        return text

    def prompts(self, asked: Sequence[str | Prompt], /) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        tokenizer = self.wrapped.tokenizer
        head = self.wrapped.image_token * self.image_tokens + tokenizer.bos_token
        full = [head + self.expand(to_prompt(one).text) + tokenizer.eos_token for one in asked]
        ids = tokenizer(full, add_special_tokens=False)["input_ids"]
        if any(row.count(self.image_token_id) != self.image_tokens for row in ids):
            raise UserError(f"the tokenizer makes other than {self.image_tokens} image tokens of a prompt")
        return pad(ids, tokenizer.pad_token_id), pad([[1] * len(row) for row in ids], 0)

    def answers(self, texts: Sequence[str], max_tokens: int, /) -> Int[np.ndarray, "B U"]:
        tokenizer = self.wrapped.tokenizer
        rows = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        eos = tokenizer.eos_token_id
        rows = [row if row and row[-1] == eos else [*row, eos] for row in rows]
        return pad([row if len(row) <= max_tokens else [*row[: max_tokens - 1], eos] for row in rows], IGNORED)

    def decode(self, ids: Int[np.ndarray, "B U"], /) -> list[str]:
        # Added tokens that belong to an answer stay, as `<loc_12>` does, though the tokenizer calls them special too.
        return decode(self.wrapped.tokenizer, ids, self.framing)

    @property
    def framing(self) -> frozenset[int]:
        names = ("bos", "eos", "pad", "cls", "sep", "mask", "unk", "image")
        ids = (getattr(self.wrapped.tokenizer, f"{name}_token_id", None) for name in names)
        return frozenset(number for number in ids if number is not None)
