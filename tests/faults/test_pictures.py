"""Pictures as they should be shown, on values: turned, scaled, laid on white, in sRGB; large ones bounded."""

import io
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_parquet import draw_image, make_row, make_rows, write_rows
from malformed import make_png
from PIL import Image, ImageCms

from fedvlm_jax.data import image_decoding
from fedvlm_jax.data.config import MAX_IMAGE_PIXELS
from fedvlm_jax.data.dataset_summary import describe
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.image_decoding import BrokenImageError, decode_picture
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.unique_images import unique_images
from fedvlm_jax.errors import UserError

RAMP = np.linspace(0, 1, 60)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def show(encoded: bytes, **options: Any) -> np.ndarray:
    picture = decode_picture(encoded, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


CORNERS = np.asarray([[[200, 0, 0], [0, 200, 0], [0, 0, 200]], [[90, 90, 90], [9, 9, 9], [250, 250, 250]]], np.uint8)
TURNED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: np.rot90(CORNERS, -1),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(CORNERS),
    9: CORNERS,  # there is no such orientation
}


@pytest.mark.parametrize("orientation", list(TURNED))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    image = Image.fromarray(CORNERS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    if kind == "JPEG":  # blocks of one colour survive its coding
        image = image.resize((48, 32), Image.Resampling.NEAREST)
    seen = show(save(image, kind, exif=exif, **options))
    if kind == "JPEG":
        seen = seen[8::16, 8::16]
    assert np.abs(seen.astype(int) - TURNED[orientation]).max() <= (3 if kind == "JPEG" else 0)


def test_exif_that_is_damaged_turns_nothing() -> None:
    image = Image.fromarray(CORNERS)
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"junk" * 9):
        np.testing.assert_array_equal(show(save(image, "PNG", exif=exif)), CORNERS)


def make_tiff_12(values: np.ndarray) -> bytes:
    """A TIFF of 12 bits a sample, packed, by hand: Pillow reads such and writes none."""
    flat = [int(value) for value in values.reshape(-1)]
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(flat[::2], flat[1::2], strict=True)
    )
    height, width = values.shape
    tags = (
        (256, width),
        (257, height),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(packed)),
    )
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + struct.pack("<I", 0)


def row(values: np.ndarray, kind: type) -> np.ndarray:
    return np.repeat(values.astype(kind)[None], 2, axis=0)


GREYS = {
    "16 bits, PNG": (save(Image.fromarray(row(RAMP * 65535, np.uint16)), "PNG"), 65535),
    "16 bits, TIFF": (save(Image.fromarray(row(RAMP * 65535, np.uint16)), "TIFF"), 65535),
    "16 bits, the other end first": (save(Image.fromarray(row(RAMP * 65535, np.dtype(">u2"))), "TIFF"), 65535),
    "12 bits in 16, PNG": (save(Image.fromarray(row(RAMP * 4095, np.uint16)), "PNG"), 4095),
    "12 bits, packed": (make_tiff_12(row(RAMP * 4095, np.uint16)), 4095),
    "8 bits in 16": (save(Image.fromarray(row(RAMP * 255, np.uint16)), "PNG"), 255),
    "32 bits, to 65535": (save(Image.fromarray(row(RAMP * 65535, np.int32)), "TIFF"), 65535),
    "32 bits, to 255": (save(Image.fromarray(row(RAMP * 255, np.int32)), "TIFF"), 255),
    "32 bits, to 2 billion": (save(Image.fromarray(row(RAMP * 2_000_000_000, np.int32)), "TIFF"), 2_000_000_000),
    "fractions": (save(Image.fromarray(row(RAMP, np.float32)), "TIFF"), 1),
    "floats to 255": (save(Image.fromarray(row(RAMP * 255, np.float32)), "TIFF"), 255),
    "floats to 65535": (save(Image.fromarray(row(RAMP * 65535, np.float32)), "TIFF"), 65535),
    "floats to 10^9": (save(Image.fromarray(row(RAMP * 1e9, np.float32)), "TIFF"), 1e9),
}


@pytest.mark.parametrize("name", list(GREYS))
def test_a_ramp_of_greys_stays_one(name: str) -> None:
    encoded, white = GREYS[name]
    seen = show(encoded)
    assert (seen == seen[:1, :, :1]).all()
    assert len(np.unique(seen)) == 60
    expected = RAMP * 255 if name.startswith(("floats", "fractions")) else np.floor(RAMP * white) / white * 255
    assert np.abs(seen[0, :, 0] - expected).max() <= 0.51


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_greys_below_zero_go_from_the_darkest_to_the_lightest(kind: type) -> None:
    seen = show(save(Image.fromarray(row((RAMP - 0.5) * 3000, kind)), "TIFF"))
    assert (seen[0, 0, 0], seen[0, -1, 0], len(np.unique(seen))) == (0, 255, 60)
    assert (np.diff(seen[0, :, 0].astype(int)) > 0).all()


def test_an_even_grey_has_the_value_that_it_had() -> None:
    assert set(show(save(Image.fromarray(np.full((4, 5), 60_000, np.uint16)), "PNG")).flat) == {233}
    assert set(show(save(Image.fromarray(np.zeros((4, 5), np.uint16)), "PNG")).flat) == {0}
    assert set(show(save(Image.fromarray(np.full((4, 5), -7, np.int32)), "TIFF")).flat) == {0}
    assert set(show(save(Image.fromarray(np.full((4, 5), 0.5, np.float32)), "TIFF")).flat) == {128}


def test_white_is_the_least_that_holds_all_values_and_no_less_than_a_tiff_says() -> None:
    """So 12 bits in a PNG of 16 are no black picture, and two frames on both sides of a bound differ."""

    def brightest(values: list[int]) -> int:
        return int(show(save(Image.fromarray(np.asarray([values], np.uint16)), "PNG")).max())

    assert [brightest([0, high]) for high in (255, 256, 4095, 4096, 65535)] == [255, 16, 255, 16, 255]
    assert show(make_tiff_12(np.asarray([[0, 200, 2048, 100]])))[0, :, 0].tolist() == [0, 12, 128, 6]
    assert show(make_tiff_12(np.asarray([[0, 200, 150, 100]])))[0, :, 0].tolist() == [0, 12, 9, 6]


@pytest.mark.parametrize(("kind", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_a_tiff_in_which_0_is_white_is_inverted(kind: type, white: float) -> None:
    """Pillow does that itself for 8 bits."""
    encoded = save(Image.fromarray(row(RAMP * white, kind)), "TIFF")
    entry = struct.pack("<HHI", 262, 3, 1)
    assert encoded.count(entry) == 1
    place = encoded.index(entry) + len(entry)
    inverted = encoded[:place] + b"\0\0" + encoded[place + 2 :]
    np.testing.assert_array_equal(show(inverted), 255 - show(encoded))
    assert show(inverted)[0, [0, -1], 0].tolist() == [255, 0]


@pytest.mark.parametrize("kind", ["I;16", "I", "F"])
@pytest.mark.parametrize("band", [1, 1000])
def test_greys_are_scaled_band_by_band_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch, kind: str, band: int
) -> None:
    encoded = save(make_noise(kind), "TIFF")
    whole = show(encoded)
    monkeypatch.setattr(image_decoding, "BAND_PIXELS", band)
    np.testing.assert_array_equal(show(encoded), whole)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_greys_that_are_no_numbers_are_refused(odd: float) -> None:
    values = row(RAMP, np.float32)
    values[1, 7] = odd
    with pytest.raises(BrokenImageError, match="values that are no numbers"):
        decode_picture(save(Image.fromarray(values), "TIFF"))


def make_palette(**options: Any) -> bytes:
    image = Image.fromarray(np.asarray([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 200] + [0] * 759)
    return save(image, options.pop("kind", "PNG"), **options)


def half(colour: int) -> int:
    return round((colour * 128 + 255 * 127) / 255)


WHITE = [255, 255, 255]
ALPHAS = {
    "a palette": (make_palette(), [[10, 20, 30], [200, 0, 0], [0, 0, 200]]),
    "a palette with one colour clear": (make_palette(transparency=0), [WHITE, [200, 0, 0], [0, 0, 200]]),
    "a palette of alphas": (
        make_palette(transparency=b"\x00\x80\xff"),
        [WHITE, [half(200), half(0), half(0)], [0, 0, 200]],
    ),
    "a GIF with one colour clear": (
        make_palette(kind="GIF", transparency=1, optimize=False),
        [[10, 20, 30], WHITE, [0, 0, 200]],
    ),
    "grey with alpha": (
        save(Image.fromarray(np.asarray([[[9, 0], [9, 128], [9, 255]]], np.uint8), "LA"), "PNG"),
        [WHITE, [half(9)] * 3, [9] * 3],
    ),
    "colour with alpha": (
        save(Image.fromarray(np.asarray([[[9, 0, 99, 0], [9, 0, 99, 128], [9, 0, 99, 255]]], np.uint8)), "PNG"),
        [WHITE, [half(9), half(0), half(99)], [9, 0, 99]],
    ),
    "grey with one clear": (
        save(Image.fromarray(np.asarray([[7, 8, 9]], np.uint8)), "PNG", transparency=8),
        [[7] * 3, WHITE, [9] * 3],
    ),
    "16-bit grey with one clear": (
        save(Image.fromarray(np.asarray([[0, 257, 65535]], np.uint16)), "PNG", transparency=257),
        [[0] * 3, WHITE, WHITE],
    ),
    "colour with one clear": (
        save(Image.fromarray(CORNERS[:1]), "PNG", transparency=(0, 200, 0)),
        [[200, 0, 0], WHITE, [0, 0, 200]],
    ),
    "black and white": (save(Image.fromarray(np.asarray([[True, False, True]])), "PNG"), [WHITE, [0] * 3, WHITE]),
    "black and white, black clear": (
        save(Image.fromarray(np.asarray([[True, False, True]])), "PNG", transparency=0),
        [WHITE, WHITE, WHITE],
    ),
    "16-bit colour with alpha": (
        make_png(
            3, 1, 16, 6, b"\0" + struct.pack(">12H", 9, 0, 0, 0, 0x0900, 0, 0x6300, 0x8080, 0x900, 0, 0x6300, 65535)
        ),
        [WHITE, [half(9), half(0), half(99)], [9, 0, 99]],
    ),
}


@pytest.mark.parametrize("name", list(ALPHAS))
def test_what_is_transparent_lies_on_white(name: str) -> None:
    encoded, expected = ALPHAS[name]
    assert np.abs(show(encoded)[0].astype(int) - expected).max() <= 1


CMYK = Image.new("CMYK", (16, 16), (0, 255, 255, 0))


def test_the_four_inks_of_print_are_colours() -> None:
    for encoded in (save(CMYK, "TIFF"), save(CMYK, "JPEG", quality=100)):
        assert np.abs(show(encoded).astype(int) - [255, 0, 0]).max() <= 2
    photoshop = save(CMYK, "JPEG", quality=100)
    assert b"Adobe" in photoshop  # such files hold the inks inverted, which is what Pillow expects
    dark = save(Image.new("CMYK", (16, 16), (0, 0, 0, 204)), "JPEG", quality=100)
    assert np.abs(show(dark).astype(int) - 51).max() <= 2


def test_lab_becomes_colours() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 40, 90)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )  # fmt: skip
    assert lab is not None
    assert np.abs(show(save(lab, "TIFF")).astype(int) - [200, 40, 90]).max() <= 3


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def make_swapped() -> bytes:
    """A profile by which red is blue: sRGB with the columns of its matrix exchanged, and another name."""
    swapped = SRGB.replace(b"rXYZ", b"xxxx", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"xxxx", b"bXYZ", 1)
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


SWAPPED = make_swapped()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_colour_profile_is_taken_to_srgb(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert np.abs(show(save(red, kind, icc_profile=SWAPPED, **options)).astype(int) - [0, 0, 255]).max() <= 2
    np.testing.assert_array_equal(show(save(red, kind, icc_profile=SRGB, **options))[0, 0], [255, 0, 0])


def test_a_colour_profile_counts_before_the_alpha_and_the_palette() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert np.abs(show(save(clear, "PNG", icc_profile=SWAPPED)).astype(int) - [half(0), half(0), 255]).max() <= 2
    palette = Image.new("RGB", (4, 4), (255, 0, 0)).quantize(4)
    assert np.abs(show(save(palette, "PNG", icc_profile=SWAPPED)).astype(int) - [0, 0, 255]).max() <= 2
    grey = Image.new("L", (4, 4), 99)
    assert np.abs(show(save(grey, "PNG", icc_profile=SWAPPED)).astype(int) - 99).max() <= 2


def change_curve(gamma: float, linear: bool = False) -> bytes:
    """sRGB's profile with another curve and its own name: a power, or the straight line that is a linear sRGB."""
    numbers = (gamma, 1, 0, 1, 0) if linear else (gamma, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = SRGB.index(b"para") + 12
    return SRGB[:curve] + struct.pack(">5i", *(round(number * 65536) for number in numbers)) + SRGB[curve + 20 :]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_a_linear_profile_that_is_called_srgb_is_taken_to_srgb(mode: str) -> None:
    """Linear light of 55/255 is sRGB's 128: 255 · (1.055 · (55/255)^(1/2.4) - 0.055)."""
    grey = Image.new("L", (4, 4), 55).convert(mode)
    linear = change_curve(1, linear=True)
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(linear)))
    assert np.abs(show(save(grey, "PNG", icc_profile=linear)).astype(int) - 128).max() <= 1
    assert np.abs(show(save(grey, "PNG", icc_profile=change_curve(1.8))).astype(int) - 55).min() > 5


@pytest.mark.parametrize("name", ["sRGB", "c2ci", "swap"])
def test_pictures_in_srgb_keep_their_very_pixels_whatever_their_profile_is_called(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    noise = make_noise("RGB", (64, 64))
    encoded = save(noise, "PNG", icc_profile=SRGB.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be")))
    np.testing.assert_array_equal(show(encoded), np.asarray(noise))
    monkeypatch.setattr(image_decoding, "_transform", None)  # a profile is looked at once
    np.testing.assert_array_equal(show(encoded), np.asarray(noise))


@pytest.mark.parametrize("place", ["PIL.Image.Image.getexif", "PIL.ImageCms.profileToProfile", "PIL.Image.open"])
def test_a_picture_for_which_there_is_no_memory_is_not_broken(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    encoded = save(Image.new("RGB", (4, 4)), "PNG", icc_profile=SWAPPED)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError):
        decode_picture(encoded)


@pytest.mark.parametrize("profile", [b"", b"junk" * 50, SRGB[:200], SWAPPED[:128] + bytes(400), bytes(5000)])
def test_a_colour_profile_that_is_damaged_or_of_another_space_is_not_used(profile: bytes) -> None:
    image = Image.fromarray(CORNERS)
    np.testing.assert_array_equal(show(save(image, "PNG", icc_profile=profile)), CORNERS)
    inks = show(save(CMYK, "TIFF", icc_profile=SWAPPED))
    np.testing.assert_array_equal(inks, show(save(CMYK, "TIFF")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    seen = show(save(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    np.testing.assert_array_equal(seen, np.broadcast_to([255, 0, 0], (4, 6, 3)))


def make_noise(mode: str, size: tuple[int, int] = (300, 212)) -> Image.Image:
    rng = np.random.default_rng([len(mode), ord(mode[0])])
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(rng.integers(0, 65536, size[::-1]).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode]))
    if mode in ("L", "P", "1"):
        image = Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8))
        return image.convert(mode)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], len(mode)), np.uint8), mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("band", [1, 1000, 10**6])
def test_large_pictures_are_reduced_band_by_band_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch, mode: str, band: int
) -> None:
    encoded = save(make_noise(mode), "TIFF")
    monkeypatch.setattr(image_decoding, "REDUCED", 300 * 212 // 9)
    monkeypatch.setattr(image_decoding, "SHORT_SIDE", 50)
    monkeypatch.setattr(image_decoding, "BAND_PIXELS", band)
    seen = show(encoded)
    assert seen.shape == (-(-212 // 3), 100, 3)
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        whole = image_decoding._lay_on_white(image_decoding._convert(image).reduce(3), None)
    np.testing.assert_array_equal(seen, np.asarray(whole))


def test_a_reduced_picture_keeps_its_short_side_and_ordinary_ones_their_size() -> None:
    factors = {
        (4000, 3000): 1, (4095, 4095): 1, (4096, 4096): 2, (9400, 9400): 4, (100_000, 800): 1, (30_000, 2100): 2,
    }  # fmt: skip
    assert {size: image_decoding._choose_factor(*size) for size in factors} == factors


def test_jpegs_are_decoded_at_a_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = save(Image.new("RGB", (512, 384), (200, 40, 90)), "JPEG")
    monkeypatch.setattr(image_decoding, "REDUCED", 64 * 48)
    monkeypatch.setattr(image_decoding, "SHORT_SIDE", 48)
    asked: list[tuple[int, int]] = []
    convert = image_decoding._convert
    monkeypatch.setattr(image_decoding, "_convert", lambda image: (asked.append(image.size), convert(image))[1])
    seen = show(encoded)
    assert asked == [(64, 48)]
    assert seen.shape == (48, 64, 3)
    assert np.abs(seen.astype(int) - [200, 40, 90]).max() <= 3


def measure_decoding(encoded: bytes) -> tuple[int, int, int]:
    """Width, height, and bytes at the peak, in a process of its own."""
    source = Path(image_decoding.__file__).parents[2]
    warm = [save(Image.new(mode, (9, 9)), kind) for mode, kind in (("RGB", "JPEG"), ("I;16", "TIFF"), ("LA", "PNG"))]
    script = (  # ru_maxrss is no use: a child's begins with its parent's
        f"import sys; sys.path.insert(0, {str(source)!r})\n"
        "from fedvlm_jax.data.image_decoding import decode_picture\n"
        "def peak(): return int(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])\n"
        f"for small in {warm!r}: decode_picture(small)\n"
        "encoded = sys.stdin.buffer.read(); before = peak()\n"
        "picture = decode_picture(encoded); print(*picture.size, peak() - before)"
    )
    told = subprocess.run([sys.executable, "-c", script], input=encoded, capture_output=True, check=True)
    width, height, kibibytes = map(int, told.stdout.split())
    return width, height, kibibytes * 1024


def test_the_picture_of_nine_thousand_pixels_squared_takes_a_tenth_of_what_it_took() -> None:
    width, height, peak = measure_decoding(save(Image.new("L", (9400, 9400), 200), "JPEG"))
    assert (width, height) == (2350, 2350)
    assert 2350 * 2350 < peak < 150 * 2**20  # 674 MiB before, and 1517 with the processor's work


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("RGBA", "WEBP")]
)
def test_a_picture_takes_no_more_memory_than_it_is_given_room_for(mode: str, kind: str) -> None:
    size = (2000, 1500)
    width, height, peak = measure_decoding(save(Image.new(mode, size), kind))
    assert (width, height) == size
    assert width * height < peak < image_decoding.BYTES_PER_PIXEL * width * height + 2**20 * 9  # a band's own arrays


SPREAD = make_options("rows.parquet", max_bad_share=1.0)


def test_images_beyond_the_bound_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*make_rows(3), make_row(3, image={"bytes": draw_image(3, (60, 50)), "path": None})]
    path = str(write_rows(tmp_path / "a.parquet", rows))
    reason = "image of more than 2,999 pixels (--data.max-image-pixels)"

    def find(bound: int) -> dict[int, str]:
        table = read_table(make_options(source=path, max_image_pixels=bound))
        return unique_images(table, range(4))[0].find_broken()

    assert find(MAX_IMAGE_PIXELS) == {}
    assert find(3000) == {}
    assert find(2999) == {3: reason}  # though an earlier look found nothing wrong
    assert find(MAX_IMAGE_PIXELS) == {}
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BrokenImageError, match="of more than 2,999 pixels"):
        decode_picture(draw_image(3, (60, 50)), max_pixels=2999)


@pytest.mark.parametrize("bound", [0, -1, 2**63, 2 * MAX_IMAGE_PIXELS + 1])
def test_bounds_that_cannot_be_are_refused(bound: int) -> None:
    allowed = "from 1 to 178956970" if bound < 1 else "a whole number of at most 178956970"
    with pytest.raises(UserError, match=rf"--data\.max-image-pixels is {bound}: it must be {allowed}$"):
        make_options("rows.parquet", max_image_pixels=bound)


def test_threads_share_a_bound_of_memory() -> None:
    room, held, most = image_decoding._SharedMemory(10), 0, 0
    lock = threading.Lock()

    def work(wanted: int) -> None:
        nonlocal held, most
        with room.take(wanted):
            with lock:
                held += wanted
                most = max(most, held)
                assert held <= 10 or held == wanted
            time.sleep(0.002)
            with lock:
                held -= wanted

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in (4, 5, 3, 50, 6, 1, 2, 9, 4, 10, 7, 70) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert (held, most) == (0, 70)


def test_a_leak_shows_though_a_picture_was_saved_anew(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(draw_image(4)))
    exif = Image.Exif()
    exif[0x0112] = 6
    again = save(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    rows = [make_row(n, client="ab"[n % 2], split="train") for n in range(4)]
    rows.append(make_row(4, client="a", split="train", image={"bytes": draw_image(4), "path": None}))
    rows.append(make_row(5, client="a", split="test", image={"bytes": again, "path": None}))
    options = make_options(source=str(write_rows(tmp_path / "a.parquet", rows)))
    table = read_table(options)
    federation = federate(table, options, 0)
    found = {
        checked: describe(table, federation, options, check_images=checked)["overlap"]["images"]["between_splits"]
        for checked in (False, True)
    }
    assert found[False]["train/test"]["distinct"] == 0
    assert (found[True]["train/test"]["distinct"], found[True]["train/test"]["examples"]) == (1, [[4, 5]])


def test_the_report_shows_what_was_trained_on(tmp_path: Path) -> None:
    from fedvlm_jax.training.example_outputs import save_picture

    values = np.repeat((RAMP[:50] * 65535).astype(np.uint16)[None], 40, axis=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = [make_row(0, image={"bytes": save(Image.fromarray(values), "PNG", exif=exif), "path": None})]
    images = unique_images(read_table(str(write_rows(tmp_path / "a.parquet", rows))), [0])[0]
    save_picture(images, 0, tmp_path / "shown.png")
    shown = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB"))
    np.testing.assert_array_equal(shown, np.asarray(images.decode(0)))
    assert shown.shape == (50, 40, 3)
    assert len(np.unique(shown)) == 50
