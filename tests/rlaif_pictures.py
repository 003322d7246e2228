"""What the made-up rows of `rlaif_form` are about: drawn scenes, signs and noise, and the shipped emoji.

A scene has a shape, a colour and a count that its picture shows, so a model can learn to answer; the right answer
(`chosen`) is true of the picture and the wrong one (`rejected`) differs from it in one of these facts.
"""

import functools
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fedvlm_jax

COLOURS = {
    "red": "#d22f27",
    "green": "#2e8b3d",
    "blue": "#1f5fc4",
    "yellow": "#f2c811",
    "black": "#141414",
    "purple": "#8a3fa0",
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three", "four")
WORDS = ("exit", "open", "milk", "bakery", "taxi", "north", "library", "12 km", "café", "sale")
GROUNDS = ("#ffffff", "#f3ecd8", "#dfe8ee", "#e9e4f0")
SIZES = ((64, 64), (96, 72), (60, 110), (160, 120))
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))


class Question(NamedTuple):
    """What is asked about a picture, its right and a wrong answer, and RLAIF-V's name for questions of this kind."""

    text: str
    chosen: str
    rejected: str
    kind: str = "question answering"


class Picture(NamedTuple):
    """An encoded image, the end of its file's name, and all that can be asked about it."""

    encoded: bytes
    suffix: str
    questions: tuple[Question, ...]


def draw_scene(rng: np.random.Generator, colours: np.ndarray, shapes: np.ndarray, style: int) -> Picture:
    """Draw one to four like shapes; `colours` and `shapes` are a source's probabilities, `style` its way of drawing."""
    colour = str(rng.choice(list(COLOURS), p=colours))
    shape = str(rng.choice(SHAPES, p=shapes))
    count = int(rng.integers(1, 5))
    width, height = SIZES[style % len(SIZES)]
    image = Image.new("RGB", (width, height), GROUNDS[style % len(GROUNDS)])
    pen = ImageDraw.Draw(image)
    radius = min(width, height) * float(rng.uniform(0.12, 0.17))
    for corner in rng.permutation(4)[:count]:
        right, below = CORNERS[corner]
        jitter = rng.uniform(-0.04, 0.04, 2)
        _draw_shape(
            pen, shape, width * (0.27 + 0.46 * right + jitter[0]), height * (0.27 + 0.46 * below + jitter[1]), radius,
            COLOURS[colour],
        )  # fmt: skip
    return Picture(*_save(image, ("PNG", "JPEG")[style % 2]), _ask_scene(rng, colour, shape, count))


def draw_sign(rng: np.random.Generator, style: int) -> Picture:
    """Write a word on a board."""
    word, other = (WORDS[place] for place in rng.choice(len(WORDS), 2, replace=False))
    width, height = SIZES[style % len(SIZES)]
    image = Image.new("RGB", (width, height), GROUNDS[style % len(GROUNDS)])
    board = tuple(int(value) for value in rng.integers(150, 230, 3))
    pen = ImageDraw.Draw(image)
    pen.rectangle((3, height // 4, width - 4, height * 3 // 4), fill=board, outline="#333333")
    font = ImageFont.load_default(max(10, width // 6))
    pen.text((width / 2, height / 2), word, fill="#101010", font=font, anchor="mm")
    asked = Question("What is written on the board?", word, other)
    return Picture(*_save(image, ("PNG", "JPEG")[style % 2]), (asked,))


def draw_noise(rng: np.random.Generator, width: int = 48, height: int = 48, kind: str = "JPEG") -> Picture:
    """Fill a picture with noise, which no codec makes small."""
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    asked = Question("What can be seen here?", "noise", "a quiet street")
    return Picture(*_save(image, kind), (asked,))


def draw_odd(number: int) -> Picture:
    """Whole pictures of the forms that loaders trip over: few and many channels, palettes, 16 bits, extreme shapes."""
    rng = np.random.default_rng([11, number])
    mode, (width, height), kind = (
        ("L", (40, 30), "PNG"),
        ("1", (33, 17), "PNG"),
        ("LA", (40, 30), "PNG"),
        ("P", (40, 30), "GIF"),
        ("RGBA", (40, 30), "PNG"),
        ("CMYK", (40, 32), "JPEG"),
        ("I;16", (40, 30), "PNG"),
        ("RGB", (1, 1), "PNG"),
        ("RGB", (2, 400), "PNG"),
        ("RGB", (500, 3), "JPEG"),
        ("RGBA", (30, 40), "WEBP"),
    )[number % 11]
    plain = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if mode == "I;16":
        plain = Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    image = plain if mode in ("I;16", "RGB") else plain.convert(mode)
    asked = Question("How large is this picture?", f"{width} by {height} pixels", f"{height + 1} by {width} pixels")
    return Picture(*_save(image, kind), (asked,))


@functools.cache
def read_emoji() -> tuple[Picture, ...]:
    """The shipped set's pictures, with the questions that one of its English clients is asked about them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = Path(fedvlm_jax.__file__).parent / "assets" / "emoji" / "emoji.parquet"
    columns = ["client", "image", "question", "chosen", "rejected"]
    table = pq.read_table(file, columns=columns, read_dictionary=["image.bytes", "image.path"])
    asked: dict[bytes, tuple[str, list[Question]]] = {}
    for row in table.filter(pc.field("client") == "noto-en").to_pylist():
        entry = asked.setdefault(row["image"]["bytes"], (Path(row["image"]["path"]).suffix, []))
        entry[1].append(Question(row["question"], row["chosen"], row["rejected"]))
    return tuple(Picture(encoded, suffix, tuple(questions)) for encoded, (suffix, questions) in asked.items())


def _ask_scene(rng: np.random.Generator, colour: str, shape: str, count: int) -> tuple[Question, ...]:
    other_colour, other_shape, other_count = (
        str(rng.choice([value for value in values if value != own]))
        for values, own in ((list(COLOURS), colour), (SHAPES, shape), (NUMBERS, NUMBERS[count - 1]))
    )
    number = NUMBERS[count - 1]
    wrong = [(other_count, colour, shape), (number, other_colour, shape), (number, colour, other_shape)]
    seen = _name_scene(number, colour, shape)
    imagined = _name_scene(*wrong[int(rng.integers(3))])
    described = "A picture with {} on a plain ground.".format
    return (
        Question("Which colour is it?", colour, other_colour),
        Question("Which shape is it?", shape, other_shape),
        Question("How many are there?", number, other_count),
        Question("Describe the picture.", described(seen), described(imagined), "detailed description"),
    )


def _name_scene(number: str, colour: str, shape: str) -> str:
    plural = "" if number == "one" else "es" if shape == "cross" else "s"
    return f"{number} {colour} {shape}{plural}"


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: str) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        arm = max(1, round(radius * 0.6))
        pen.line((x - radius, y - radius, x + radius, y + radius), fill=colour, width=arm)
        pen.line((x - radius, y + radius, x + radius, y - radius), fill=colour, width=arm)


def _save(image: Image.Image, kind: str) -> tuple[bytes, str]:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return out.getvalue(), {"JPEG": ".jpg"}.get(kind, f".{kind.lower()}")
