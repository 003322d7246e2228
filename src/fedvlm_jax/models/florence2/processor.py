"""Text and pictures to arrays and back: a thin use of transformers' `Florence2Processor`, without PyTorch.

A prompt is what Florence-2 takes (arXiv 2311.06242): image tokens, `<s>`, the text, `</s>`; a task token such as
`<CAPTION>` is written out as its sentence. An answer is tokenised as BART's labels are: `<s>`, the text, `</s>`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.models import base
from fedvlm_jax.models.folder_files import read_json
from fedvlm_jax.models.hub import resolve_folder

MOST_PIXELS = 4096
"""Longest side of the pictures that a processor may make; Florence-2 has 768."""

LEAST_CONTRAST, MOST_CONTRAST = 1e-3, 1e6
"""What a processor may make of the difference between black and white: 1 if scaled to 0 … 1, 255 if not, about 4 of
Florence-2. Less is lost beside the numbers of a model, and more loses them."""

MOST_TOKENS = 2**16
"""Most image tokens of a picture; Florence-2 has 577."""

_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
_IMAGES = ("processor_config.json", "preprocessor_config.json")
_JSON = (*_IMAGES, "tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")


def _list_files(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def read_size(folder: Path) -> tuple[int, int] | None:
    """Height and width in pixels of a model's pictures, from its folder's JSON alone; None where they have no one size.

    JSON that cannot be read, or states no numbers, is refused.
    """
    for name in _list_files(folder, _IMAGES):
        values = read_json(folder / name)
        images = values.get("image_processor", values)
        try:
            size = images.get("crop_size" if images.get("do_center_crop") else "size") or {}
            if size.get("height") and size.get("width"):
                return int(size["height"]), int(size["width"])
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{folder / name} states no size in pixels that can be read") from None
    return None


def _open_wrapped(folder: Path) -> Any:
    """transformers' `Florence2Processor` of a folder, its image processor in the form that needs Pillow alone."""
    try:
        from transformers import AutoImageProcessor, AutoTokenizer, Florence2Processor
    except Exception as error:
        raise UserError(_explain_import(error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
        return Florence2Processor(images, tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises many kinds, and tokenizers a panic that is no Exception
        if "torchvision" in str(error):
            raise UserError(_explain_import(error)) from error
        raise UserError(
            f"the processor in {folder} cannot be read ({explain_error(error)}); it needs an image "
            "processor with image_seq_length and a tokenizer with an image token, as Florence-2's has"
        ) from error


def _explain_import(error: BaseException) -> str:
    """Say why transformers does not import, and what to do."""
    chain = [error]
    while found := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(found)
    first = next((cause for cause in reversed(chain) if "torchvision" in str(cause)), None)
    if first is None:
        return f"transformers cannot be imported ({explain_error(chain[-1])})"
    return (
        f"transformers cannot be imported, for it imports torchvision, which fails ({explain_error(first)}): it does "
        "not fit the PyTorch that is installed. fedvlm needs neither: pip uninstall torchvision, or install the one "
        "that fits"
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
        for what, names in (("tokenizer", _TOKENIZERS), ("image processor", _IMAGES)):
            if not _list_files(folder, names):
                raise UserError(f"{folder} has no {what}: none of {', '.join(names)} is there")
        for name in _list_files(folder, _JSON):
            model = read_json(folder / name).get("model")
            # With dropout words are cut by chance, so that no text has the same tokens twice. Byte-level tokenizers
            # have no prefix of continued words, and `tokenizers` ends the process over it.
            for field in ("dropout", "continuing_subword_prefix"):
                if isinstance(model, dict) and (value := model.get(field)):
                    found = f"model.{field} is {str(value)[:40]!r}"
                    raise UserError(f"{folder / name}: {found}, expected none, as Florence-2's has")
        processor = cls(_open_wrapped(folder))
        processor._try_out(folder)
        return processor

    def _try_out(self, folder: Path) -> None:
        """Make a picture and a prompt, because most settings are looked at only then."""
        images = folder / _list_files(folder, _IMAGES)[0]
        count = self.wrapped.num_image_tokens
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_TOKENS:
            raise UserError(f"{images} has image_seq_length={count!r}, expected a whole number from 1 to {MOST_TOKENS}")
        try:
            self._try_picture()
        except Exception as error:
            raise UserError(f"the image processor of {images} cannot be used: {explain_error(error)}") from None
        try:
            self.prompts(["a"])
            self.decode(self.answers(["a"], 4))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception
            raise UserError(f"the tokenizer in {folder} fails on a text ({explain_error(error)})") from None

    def _try_picture(self) -> None:
        images = self.wrapped.image_processor
        if images.do_normalize and not all(np.isfinite(std) and std > 0 for std in images.image_std):
            raise UserError(f"image_std is {list(images.image_std)}, and pixels are divided by it: it must be above 0")
        asked = [side for size in (images.size, images.crop_size) for side in dict(size or {}).values() if side]
        if max(*self.size, *asked) > MOST_PIXELS:
            raise UserError(f"it brings pictures to {max(asked)} pixels, expected at most {MOST_PIXELS} a side")
        black, white = self.pixels([Image.new("RGB", (8, 8), colour) for colour in ("black", "white")])
        see = "see image_mean, image_std and rescale_factor"
        if not np.isfinite([black, white]).all():
            raise UserError(f"it makes numbers that are not finite; {see}")
        contrast = np.abs(white - black).max(axis=(0, 1))
        if not ((contrast >= LEAST_CONTRAST) & (contrast <= MOST_CONTRAST)).all():
            found = ", ".join(f"{value:g}" for value in contrast)
            raise UserError(f"black and white differ by {found} in its channels, so pictures would not be seen; {see}")

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
        settings = self.wrapped.image_processor.to_dict()
        text = json.dumps({key: value for key, value in settings.items() if key[0] != "_"}, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def pixels(self, images: Sequence[Any], /) -> Float[np.ndarray, "B H W 3"]:
        height, width = self.size
        if not images:
            return np.empty((0, height, width, 3), np.float32)
        # Pictures of other modes would keep their number of channels.
        made = self.wrapped.image_processor([image.convert("RGB") for image in images], return_tensors="np")
        pixels = np.asarray(made["pixel_values"], np.float32).transpose(0, 2, 3, 1)
        if pixels.shape[1:] != (height, width, 3):
            raise UserError(f"the image processor made pixels {pixels.shape[1:]}, expected {(height, width, 3)}")
        return np.ascontiguousarray(pixels)

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

    def prompts(self, texts: Sequence[str], /) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        tokenizer = self.wrapped.tokenizer
        head = self.wrapped.image_token * self.image_tokens + tokenizer.bos_token
        full = [head + self.expand(text) + tokenizer.eos_token for text in texts]
        ids = tokenizer(full, add_special_tokens=False)["input_ids"]
        if any(row.count(self.image_token_id) != self.image_tokens for row in ids):
            raise UserError(f"the tokenizer makes other than {self.image_tokens} image tokens of a prompt")
        return _pad(ids, tokenizer.pad_token_id), _pad([[1] * len(row) for row in ids], 0)

    def answers(self, texts: Sequence[str], max_tokens: int, /) -> Int[np.ndarray, "B U"]:
        tokenizer = self.wrapped.tokenizer
        rows = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        eos = tokenizer.eos_token_id
        rows = [row if row and row[-1] == eos else [*row, eos] for row in rows]
        return _pad([row if len(row) <= max_tokens else [*row[: max_tokens - 1], eos] for row in rows], IGNORED)

    def decode(self, ids: Int[np.ndarray, "B U"], /) -> list[str]:
        framing = self.framing
        rows = [[number for number in row if number >= 0 and number not in framing] for row in np.asarray(ids).tolist()]
        # Added tokens that belong to an answer stay, as `<loc_12>` does, though the tokenizer calls them special too.
        texts = self.wrapped.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    @property
    def framing(self) -> frozenset[int]:
        names = ("bos", "eos", "pad", "cls", "sep", "mask", "unk", "image")
        ids = (getattr(self.wrapped.tokenizer, f"{name}_token_id", None) for name in names)
        return frozenset(number for number in ids if number is not None)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[np.ndarray, "B T"]:
    """Fill rows with a value on the right.

    >>> _pad([[5, 6], [7]], -100).tolist()
    [[5, 6], [7, -100]]
    """
    padded = np.full((len(rows), max(map(len, rows), default=0)), value, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded
