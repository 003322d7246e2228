"""Opening of a folder's tokenizer and image processor, and trials of them, for every family.

Files may be a stranger's: what is in them is tried on a picture and a text, because most settings are looked at only
when something is made of them.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.models.base import Processor
from fedvlm_jax.models.folder_files import read_json

MOST_PIXELS = 4096
"""Longest side of the pictures that a processor may make; Florence-2 has 768."""

LEAST_CONTRAST, MOST_CONTRAST = 1e-3, 1e6
"""What a processor may make of the difference between black and white: 1 if scaled to 0 … 1, 255 if not, about 4 of
Florence-2. Less is lost beside the numbers of a model, and more loses them."""

MOST_TOKENS = 2**16
"""Most image tokens of a picture; Florence-2 has 577."""

LONGEST = 16
"""Longer sides are looked at up to so many shorter ones."""

TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
IMAGES = ("processor_config.json", "preprocessor_config.json")
_JSON = (*IMAGES, "tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")


def list_files(folder: Path, names: Sequence[str]) -> list[str]:
    """List those of the names that are files of the folder."""
    return [name for name in names if (folder / name).is_file()]


def read_size(folder: Path) -> tuple[int, int] | None:
    """Height and width in pixels of a model's pictures, from its folder's JSON alone; None where they have no one size.

    Raises:
        UserError: its JSON cannot be read, or states no numbers.
    """
    for name in list_files(folder, IMAGES):
        values = read_json(folder / name)
        images = values.get("image_processor", values)
        try:
            size = images.get("crop_size" if images.get("do_center_crop") else "size") or {}
            if size.get("height") and size.get("width"):
                return int(size["height"]), int(size["width"])
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{folder / name} states no size in pixels that can be read") from None
    return None


def read_crop_size(folder: Path) -> tuple[int, int] | None:
    """Height and width in pixels of what the tower sees; None where no file states both.

    Raises:
        UserError: the file's JSON cannot be read, or states no number.
    """
    for name in list_files(folder, IMAGES):
        values = read_json(folder / name)
        values = values.get("image_processor", values)
        try:
            crop = values.get("crop_size") if values.get("do_center_crop", True) else None
            size = values.get("size") if crop is None else crop
            if isinstance(size, int):  # as older files have it
                return size, size
            if size and "height" in size:
                return int(size["height"]), int(size["width"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{folder / name} states no size in pixels that can be read") from None
    return None


def read_size_or_tower(
    folder: Path, read_config: Callable[[dict[str, Any], Path], Any], read: Callable[[Path], tuple[int, int] | None]
) -> tuple[int, int] | None:
    """Height and width in pixels by a folder's image processor; of a folder without one, those of the model's tower.

    So config.json alone says what a plan needs, where a tower takes pictures of one size.

    Args:
        read_config, read: of the family, for config.json and for the files of image processors.

    Raises:
        UserError: a file cannot be read, or the configuration is not supported.
    """
    if list_files(folder, IMAGES):
        return read(folder)
    file = folder / "config.json"
    side = read_config(read_json(file), file).vision_config.image_size
    return (side, side) if isinstance(side, int) else tuple(side)


def open_settings(
    folder: Path, read_config: Callable[[dict[str, Any], Path], Any], read: Callable[[Path], tuple[int, int] | None],
    where: str,
) -> tuple[tuple[int, int], Any]:  # fmt: skip
    """Height and width in pixels by a folder's image processor, and its configuration.

    Args:
        read_config, read: as for `read_size_or_tower`.
        where: the field that states the size, for a message.

    Raises:
        UserError: a file is missing, cannot be read or is not supported, or none states the size.
    """
    check_files(folder)
    size, file = read(folder), folder / "config.json"
    config = read_config(read_json(file), file)
    if size is None:
        raise UserError(f"{folder} does not say how large pictures are: {where} of its image processor")
    return size, config


def shorten(picture: Image.Image, side: int, *, crop: bool = True) -> Image.Image:
    """Shorten a picture that is far longer than wide, of whose pixels processors make gigabytes.

    They bring its shorter side to the tower's `side` and then cut out the middle (`crop`), or pad it to a square.
    """
    width, height = picture.size
    short, long = min(picture.size), max(picture.size)
    if long <= LONGEST * short:
        return picture
    if crop:
        half_width, half_height = (min(length, LONGEST * short) / 2 for length in picture.size)
        left, top = int(width / 2 - half_width), int(height / 2 - half_height)
        return picture.crop((left, top, int(width / 2 + half_width), int(height / 2 + half_height)))
    scale = min(1.0, 4 * side / long)
    return picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))


def check_files(folder: Path) -> None:
    """Refuse a folder without tokenizer or image processor, or with settings that no processor has.

    Raises:
        UserError: naming the file.
    """
    for what, names in (("tokenizer", TOKENIZERS), ("image processor", IMAGES)):
        if not list_files(folder, names):
            raise UserError(f"{folder} has no {what}: none of {', '.join(names)} is there")
    for name in list_files(folder, _JSON):
        model = read_json(folder / name).get("model")
        # With dropout words are cut by chance, so that no text has the same tokens twice. Byte-level tokenizers
        # have no prefix of continued words, and `tokenizers` ends the process over it.
        for field in ("dropout", "continuing_subword_prefix"):
            if isinstance(model, dict) and (value := model.get(field)):
                found = f"model.{field} is {str(value)[:40]!r}"
                raise UserError(f"{folder / name}: {found}, expected none, as Florence-2's has")


def open_files(
    folder: Path, join: Callable[[Any, Any], Any], needs: str, tokenizer_of: Callable[[Path], Any] | None = None
) -> Any:
    """Open a folder's image processor, in the form that needs Pillow alone, and its tokenizer.

    Args:
        join: (image processor, tokenizer) -> what is returned; whatever it raises is the files' fault.
        needs: the parts that the family needs, for the message.
        tokenizer_of: opens the folder's tokenizer in the place of transformers' `AutoTokenizer`.

    Raises:
        UserError: transformers cannot be imported, or cannot read them.
    """
    try:
        from transformers import AutoImageProcessor, AutoTokenizer
    except Exception as error:
        raise UserError(_explain_import(error)) from error
    try:
        auto = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
        tokenizer = (tokenizer_of or auto)(folder)
        images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
        return join(images, tokenizer)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # transformers raises many kinds, and tokenizers a panic that is no Exception
        if "torchvision" in str(error):
            raise UserError(_explain_import(error)) from error
        found = explain_error(error)
        raise UserError(f"the processor in {folder} cannot be read ({found}); it needs {needs}") from error


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


def try_out(processor: Processor, images: Any, folder: Path) -> None:
    """Make a picture and a prompt.

    Args:
        images: transformers' image processor, inside of `processor`.

    Raises:
        UserError: one fails, or the pictures are nothing that a model could see.
    """
    try:
        _try_picture(processor, images)
    except Exception as error:
        file = folder / list_files(folder, IMAGES)[0]
        raise UserError(f"the image processor of {file} cannot be used: {explain_error(error)}") from None
    try:
        processor.prompts(["a"])
        processor.decode(processor.answers(["a"], 4))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        raise UserError(f"the tokenizer in {folder} fails on a text ({explain_error(error)})") from None


def _try_picture(processor: Processor, images: Any) -> None:
    if images.do_normalize and not all(np.isfinite(std) and std > 0 for std in images.image_std):
        raise UserError(f"image_std is {list(images.image_std)}, and pixels are divided by it: it must be above 0")
    # Qwen's `size` is how many pixels a picture has, and here it is brought to `processor.size` before.
    names = ("size", "crop_size", "max_image_size") if not hasattr(images, "merge_size") else ()
    sizes = (getattr(images, name, None) for name in names)
    asked = [side for size in sizes for side in dict(size or {}).values() if side]
    if max(*processor.size, *asked) > MOST_PIXELS:
        raise UserError(f"it brings pictures to {max(asked)} pixels, expected at most {MOST_PIXELS} a side")
    made = processor.pixels([Image.new("RGB", (8, 8), colour) for colour in ("black", "white")])
    black, white = made[0], made[-1]
    see = "see image_mean, image_std and rescale_factor"
    if not np.isfinite([black, white]).all():
        raise UserError(f"it makes numbers that are not finite; {see}")
    contrast = np.abs(white - black).max(axis=(0, 1))
    if not ((contrast >= LEAST_CONTRAST) & (contrast <= MOST_CONTRAST)).all():
        found = ", ".join(f"{value:g}" for value in contrast)
        raise UserError(f"black and white differ by {found} in its channels, so pictures would not be seen; {see}")


def make_pixels(
    render: Callable[[list[Image.Image]], np.ndarray], images: Sequence[Image.Image], size: tuple[int, int]
) -> Float[np.ndarray, "B H W 3"]:
    """Make float32 pixels of pictures of any size and mode; none give an array of length 0.

    Args:
        render: pictures in RGB -> pixels [B, 3, H, W], of each as many as it makes.
        size: height and width that it brings them to.

    Raises:
        UserError: it makes others.
    """
    if not images:
        return np.empty((0, *size, 3), np.float32)
    # Pictures of other modes would keep their number of channels.
    made = np.asarray(render([image.convert("RGB") for image in images]), np.float32).transpose(0, 2, 3, 1)
    if made.shape[1:] != (*size, 3):
        raise UserError(f"the image processor made pixels {made.shape[1:]}, expected {(*size, 3)}")
    return np.ascontiguousarray(made)


def digest_settings(images: Any) -> str:
    """Hash all that decides how a picture becomes pixels."""
    settings = {key: value for key, value in images.to_dict().items() if key[0] != "_"}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def pad(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Fill rows with a value on the right: int32 [B, T].

    >>> pad([[5, 6], [7]], -100).tolist()
    [[5, 6], [7, -100]]
    """
    padded = np.full((len(rows), max(map(len, rows), default=0)), value, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded


def decode(tokenizer: Any, ids: Int[np.ndarray, "B U"], left_out: Collection[int]) -> list[str]:
    """Write tokens as texts without white space around them; negative ids, as of ignored labels, are left out, too."""
    rows = [[number for number in row if number >= 0 and number not in left_out] for row in np.asarray(ids).tolist()]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]
