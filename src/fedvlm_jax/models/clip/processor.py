"""CLIP's processor: pictures, and classes as the prompts that stand for them.

A question is not read. A class is written into a template, "a photo of a {}.", and tokenised as CLIP's texts are. A
class whose prompt cannot be is left out, so that rows with that answer are refused one by one, and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.prompts import Prompt
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.models import base
from fedvlm_jax.models.clip.answers import END, IMAGE
from fedvlm_jax.models.clip.config import LARGEST_ENDS, read_config
from fedvlm_jax.models.processor_files import (
    digest_settings,
    make_pixels,
    open_files,
    open_settings,
    pad,
    read_crop_size,
    shorten,
    try_out,
)

MOST_CLASSES = 4096
"""Most classes: the text tower reads the prompts of all of them in every step."""

FILLER = "X "
"""A word of one token, in the place of a soft prompt's vectors for which a template has no word."""


@dataclass(frozen=True, eq=False)
class ClassProcessor(base.Processor):
    """The processor of a model that chooses among classes; with none it reads pictures alone.

    Attributes:
        tokenizer, images: transformers' tokenizer and image processor.
        render: pictures in RGB -> pixels [B, 3, H, W].
        positions: most tokens of a class's prompt.
        classes: texts, by id.
        prompt_ids: tokens [C, T] of their prompts, padded on the right.
        prompted_ids: the same with room for a soft prompt before every class's name.
    """

    tokenizer: Any
    images: Any
    render: Callable[[list[Image.Image]], np.ndarray]
    side: tuple[int, int]
    positions: int
    classes: tuple[str, ...] = ()
    prompt_ids: Int[np.ndarray, "C T"] = field(default_factory=lambda: np.zeros((0, 1), np.int32))
    prompted_ids: Int[np.ndarray, "C T"] = field(default_factory=lambda: np.zeros((0, 1), np.int32))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.classes)}

    @property
    def size(self) -> tuple[int, int]:
        return self.side

    @property
    def image_tokens(self) -> int:
        return 1

    @property
    def image_token_id(self) -> int:
        return IMAGE

    @property
    def eos_token_id(self) -> int:
        return END

    @property
    def largest_id(self) -> int:
        return max(len(self.classes), 1) - 1

    @property
    def framing(self) -> frozenset[int]:
        return frozenset({IMAGE, END})

    @property
    def fingerprint(self) -> str:
        return f"{digest_settings(self.images)}-{self.side[0]}x{self.side[1]}"

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise whole texts, begun and ended as CLIP's are."""
        return self.tokenizer(list(texts))["input_ids"] if texts else []

    def make_room(self, template: str, vectors: int) -> str:
        """Fill a template's words before {} up to so many tokens, with X as CoOp (arXiv 2109.01134) does.

        They are what a soft prompt of so many vectors is added to.
        """
        framed, frame = self.tokenise([template.partition("{}")[0], ""])
        return FILLER * max(0, vectors - (len(framed) - len(frame))) + template

    def bind(self, answers: Sequence[str], template: str, vectors: int = 0) -> Self:
        """Choose among answers, each written into the template in the place of {}; those that cannot be are left out.

        With a soft prompt of so many `vectors` the template is made room in, for those who have the prompt.

        Raises:
            UserError: there are none, or more than `MOST_CLASSES`; or more vectors than a prompt has tokens.
        """
        if len(answers) > MOST_CLASSES:
            raise UserError(
                f"the data have {len(answers):,} different answers, and CLIP chooses among {MOST_CLASSES:,} at most: "
                "take data with fewer classes, or a model that writes its answers"
            )
        if vectors > self.positions:  # as many words would be written
            raise UserError(f"--prompt.vectors {vectors}: prompts have {self.positions} tokens at most: take fewer")
        roomy = self.make_room(template, vectors) if vectors else template
        rows, prompted = (
            self.tokenise([wording.replace("{}", text) for text in answers]) for wording in (template, roomy)
        )
        # A text is known by the first token that ends it, which a class must not hold.
        fits = [len(row) <= self.positions and row.index(row[-1]) == len(row) - 1 for row in prompted]
        classes = tuple(text for text, fit in zip(answers, fits, strict=True) if fit)
        if not classes:
            raise UserError(
                f"none of the data's {format_count(len(answers), 'answer')}, written into {roomy!r}, "
                "is a text of at most "
                f"{self.positions} tokens: there is no class to choose; mend --data.class-prompt"
            )
        ids, roomy_ids = (
            pad([row for row, fit in zip(kind, fits, strict=True) if fit], 0) for kind in (rows, prompted)
        )
        return replace(self, classes=classes, prompt_ids=ids, prompted_ids=roomy_ids)

    def pixels(self, images: Sequence[Image.Image], /) -> Float[np.ndarray, "B H W 3"]:
        return make_pixels(self.render, images, self.side)

    def prompts(self, asked: Sequence[str | Prompt], /) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        shape = (len(asked), 1)
        return np.full(shape, IMAGE, np.int32), np.ones(shape, np.int32)

    def answers(self, texts: Sequence[str], max_tokens: int, /) -> Int[np.ndarray, "B U"]:
        del max_tokens  # an answer is one token
        for text in texts:
            if text and text not in self._numbers:
                raise UserError("it is no class, for its prompt is too long, or it holds what ends texts")
        return np.asarray([self._numbers.get(text, IGNORED) for text in texts], np.int32).reshape(-1, 1)

    def decode(self, ids: Int[np.ndarray, "B U"], /) -> list[str]:
        rows = [[number for number in row if 0 <= number < len(self.classes)] for row in np.asarray(ids).tolist()]
        return [self.classes[row[0]] if row else "" for row in rows]


def open_processor(folder: Path) -> ClassProcessor:
    """Open a folder's processor, and try it out.

    Raises:
        UserError: its files are missing, cannot be read, or make nonsense.
    """
    size, config = open_settings(folder, read_config, read_crop_size, "crop_size")

    def join(images: Any, tokenizer: Any) -> ClassProcessor:
        def render(pictures: list[Image.Image]) -> np.ndarray:
            pictures = [shorten(picture, max(size)) for picture in pictures]
            return np.asarray(images(pictures, return_tensors="np")["pixel_values"])

        return ClassProcessor(tokenizer, images, render, size, config.text_config.max_position_embeddings)

    processor = open_files(folder, join, "an image processor and a tokenizer, as CLIP's")
    _check_end(processor, config.text_config, folder)
    try_out(processor.bind(["a"], "{}"), processor.images, folder)
    return processor


def _check_end(processor: ClassProcessor, text: Any, folder: Path) -> None:
    """Refuse a tokenizer whose texts do not end where the configuration looks for their end."""
    try:
        row, largest = processor.tokenise(["a"])[0], max(processor.tokenizer.get_vocab().values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        raise UserError(f"the tokenizer in {folder} fails on a text ({error})") from None
    if largest >= text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has a token {largest}, and vocab_size={text.vocab_size} in config.json: is the "
            "tokenizer another model's?"
        )
    wanted = largest if text.eos_token_id == LARGEST_ENDS else text.eos_token_id
    if not row or row[-1] != wanted or wanted in row[:-1]:
        last = row[-1] if row else "nothing"
        raise UserError(
            f"{folder}: the tokenizer ends texts with {last}, and the model reads a text at token {wanted} "
            f"(eos_token_id={text.eos_token_id} in config.json)"
        )
