"""Decode a picture's bytes into the RGB image that its maker meant: for training, reports and comparisons alike.

It is turned as EXIF says; grey of more than 8 bits is scaled, not cut; transparency is laid on white; a colour profile
is taken to sRGB; of several frames it is the first. Sizes are bounded, and threads share a bound on memory.
"""

import contextlib
import functools
import io
import math
import threading
import warnings
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from fedvlm_jax.data.config import MAX_IMAGE_PIXELS

DECODING = 3  # version of these rules: what is cached of a picture is valid for one version

# Pictures of four times as many pixels and more are brought to about so many (2048 × 2048), by a whole factor.
REDUCED = 2**22
SHORT_SIDE = 1024  # pixels that a reduced picture's shorter side keeps at least
BAND_PIXELS = 2**20  # pixels of a large picture that change their mode at a time

# Memory that decoding takes at its peak: measured 5 (grey) to 12, 18 with alpha, 16 of WebP and 25 of WebP with it.
BYTES_PER_PIXEL = 25

RUN_PROGRAMS = ("EPS", "WMF")  # formats for which PIL would start another program on what the file says
# Modes that are not computed with -> those that are; the second where a colour or a palette's entry is transparent.
MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "HSV": "RGB", "YCbCr": "RGB"}
WITH_ALPHA = {"1": "LA", "L": "LA", "RGB": "RGBA", "P": "RGBA"}

# Whites of integer greys: the least that holds all values is taken, and no less than a TIFF says. A PNG of 16 bits has
# 65535 for white by its format, but scanners and cameras put 12 bits and fewer into such files as they are. The price:
# of two frames of a camera, one whose brightest value is 4095 comes out 16 times as bright as one with a 4096.
RANGES = (255, 4095, 65535)

ALIKE = 3  # steps of 255 by which a profile's colours may differ from sRGB's for its pictures to be left as they are
ORIENTATION = 0x0112  # EXIF's tag
BITS, PHOTOMETRIC = 258, 262  # TIFF's tags: bits of a sample, and whether 0 is white (0) or black (1)
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> the `PIL.Image.Transpose` that undoes it


class BrokenImageError(ValueError):
    """An image that is missing or cannot be decoded; the message is the reason, in a few words."""


def decode_picture(encoded: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS, quick: bool = False) -> Image.Image:
    """Decode a picture in a file of any format that PIL decodes itself, [H, W] in RGB.

    With `quick` only to find out whether it can be decoded: JPEGs at an eighth of their size.

    Raises:
        BrokenImageError: the bytes are cut short, no image, or of too many pixels.

    >>> Image.new("LA", (3, 2), (0, 0)).save(file := io.BytesIO(), "PNG")  # black, but transparent
    >>> picture = decode_picture(file.getvalue())
    >>> picture.mode, picture.size, picture.getpixel((0, 0))
    ('RGB', (3, 2), (255, 255, 255))
    """
    _hush_pillow()
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _check(image, max_pixels)
            with _MEMORY.take(BYTES_PER_PIXEL * image.width * image.height):
                factor = 8 if quick else _choose_factor(*image.size)
                if factor > 1:  # JPEGs are decoded at a half, a quarter or an eighth; other formats ignore it
                    image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
                # A TIFF's least white, and whether 0 is white: Pillow inverts such greys in 8 bits, but not in more.
                tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
                greys = (4095 if tags.get(BITS) in (12, (12,)) else 0, tags.get(PHOTOMETRIC) == 0)
                image.load()
                _check(image, max_pixels)  # an icon's header may say less than it holds
                return _turn(image, _lay_on_white(_to_working_mode(image), image.info.get("icc_profile"), greys))
    except Image.DecompressionBombError as error:
        raise BrokenImageError(f"image of more than {max_pixels:,} pixels (--data.max-image-pixels)") from error
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        raise BrokenImageError("broken or truncated image") from error


@functools.cache
def _hush_pillow() -> None:
    """Silence Pillow's warnings of sizes, which are bounded here, and of damaged EXIF, which is not applied."""
    # Not on import: filters are the whole process's, and importing the package changes nothing of it.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _check(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError
    if image.format in RUN_PROGRAMS:
        raise BrokenImageError("image of a kind that is not read")


def _choose_factor(width: int, height: int) -> int:
    """Choose the whole number by which a picture of this size is reduced."""
    return max(1, min(math.isqrt(width * height // REDUCED), min(width, height) // SHORT_SIDE))


def _to_working_mode(image: Image.Image) -> Image.Image:
    """Bring a picture to L, LA, RGB, RGBA, CMYK, LAB, I or F, reduced where it is large: band by band, for memory."""
    factor = _choose_factor(*image.size)
    if factor == 1:
        return _convert(image)
    reduced: Image.Image | None = None
    for top, band in _crop_bands(image, factor):
        part = _convert(band).reduce(factor)
        if reduced is None:
            reduced = Image.new(part.mode, (part.width, -(-image.height // factor)))
            reduced.info = part.info
        reduced.paste(part, (0, top // factor))
    assert reduced is not None
    return reduced


def _crop_bands(image: Image.Image, step: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Crop a picture into bands of a multiple of `step` rows, each with the row in which it begins."""
    rows = step * max(1, BAND_PIXELS // (image.width * step))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return image.convert("I")
    alpha = image.has_transparency_data
    mode = WITH_ALPHA.get(image.mode, MODES.get(image.mode)) if alpha else MODES.get(image.mode)
    return image if mode is None else image.convert(mode)


def _lay_on_white(image: Image.Image, profile: bytes | None, greys: tuple[int, bool] = (0, False)) -> Image.Image:
    """Bring a picture in a working mode to RGB in sRGB, without transparency."""
    if image.mode in ("I", "F"):
        image = _scale_grey(image, *greys)
    if image.mode not in ("LA", "RGBA"):
        return _to_srgb(image, profile)
    alpha = image.getchannel("A")
    colour = _to_srgb(image.convert("L" if image.mode == "LA" else "RGB"), profile).convert("RGBA")
    colour.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def _scale_grey(image: Image.Image, least: int, inverted: bool) -> Image.Image:
    """Scale greys of more than 8 bits, or fractions, to 8 bits: band by band, for memory.

    White is the least of `RANGES` that holds all values, for fractions also 1. Without one, or with values below 0, the
    darkest becomes black and the lightest white.
    """
    low, high = math.inf, -math.inf
    for _, band in _crop_bands(image):
        values = np.asarray(band, np.float64)
        if not np.isfinite(values).all():
            raise BrokenImageError("image with values that are no numbers")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    ranges = (1, *RANGES) if image.mode == "F" else RANGES
    whites = [white for white in ranges if white >= max(high, least)]
    low, white = (0.0, float(whites[0])) if low >= 0 and whites else (low, high)
    transparent = image.info.get("transparency")
    scaled = Image.new("L", image.size)
    for top, band in _crop_bands(image):
        values = np.asarray(band, np.float64)
        grey = np.rint((values - low) / ((white - low) or 1) * 255).astype(np.uint8)
        if inverted:
            grey = 255 - grey
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        scaled.paste(Image.fromarray(grey), (0, top))
    return scaled


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Bring a picture in L, RGB, CMYK or LAB to RGB; a profile that is damaged, or of another space, is not used."""
    if image.mode == "LAB":
        return _transform(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if profile:
        try:
            opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            about: Any = opened.profile  # typed by Pillow as what it was read from
            space = about.xcolor_space.strip()
            given = image.convert("RGB") if space == "RGB" and image.mode == "L" else image
            if {"GRAY": "L"}.get(space, space) == given.mode and not _is_srgb(profile, given.mode):
                return _transform(given, opened)
        except MemoryError:
            raise
        except Exception:  # LittleCMS raises several kinds for what strangers embed
            return image.convert("RGB")
    return image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _is_srgb(profile: bytes, mode: str) -> bool:
    """Tell whether a profile's colours are sRGB's, by what they become and not by its name.

    Most profiles are one of the many of sRGB; their pictures then decode as quickly as others, without a rounding.
    """
    if mode not in ("L", "RGB"):
        return False
    levels = np.arange(0, 256, 15).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    asked = Image.fromarray(cube if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    # By the colours themselves: a profile's table for the eye's comfort also says how they are to be pleasant.
    made = _transform(asked, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.Intent.RELATIVE_COLORIMETRIC)
    return bool(np.abs(np.asarray(made, np.int16) - np.asarray(asked.convert("RGB"), np.int16)).max() <= ALIKE)


def _transform(
    image: Image.Image, profile: ImageCms.ImageCmsProfile, intent: ImageCms.Intent = ImageCms.Intent.PERCEPTUAL
) -> Image.Image:
    made = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), intent, outputMode="RGB")
    assert made is not None  # only what is changed in place comes back as None
    return made


def _turn(image: Image.Image, picture: Image.Image) -> Image.Image:
    """Turn a picture as the EXIF of its file says; EXIF that cannot be read is not applied."""
    try:
        method = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        method = None
    return picture if method is None else picture.transpose(Image.Transpose(method))


class _SharedMemory:
    """Memory that threads share: a thread that wants more than is left waits, unless no other has any."""

    def __init__(self, size: int) -> None:
        self._size, self._taken, self._changed = size, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, wanted: int) -> Generator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= self._size)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


# Bytes that all threads of a process decode into at a time; a larger picture waits until it is alone.
_MEMORY = _SharedMemory(2**30)
