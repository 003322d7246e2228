"""The drawings and texts behind the emoji set: which packages, how they are fetched, matched and rasterised.

Every drawing comes as one SVG body per icon. An emoji of Unicode finds its icon by code point where the package lists
code points, else by the exact slug of its English CLDR name. Looser rules would pair wrong pictures, so there are none.
"""

import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
"""Side of a sprite in pixels."""

MIN_INK = 24
"""Fewest pixels that must differ visibly from the white ground; below that a raster counts as blank."""


@dataclass(frozen=True)
class Style:
    """One vendor's set of drawings: npm package, exact version, licence and the name to credit."""

    name: str
    package: str
    version: str
    licence: str
    credit: str


CLIENT_STYLES = (
    Style("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google, Noto Emoji"),
    Style("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Inc. and contributors, Twemoji"),
    Style("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation, Fluent UI Emoji"),
    Style("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne 2 / Emojitwo contributors"),
)
PUBLIC_STYLES = (
    Style("openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "HfG Schwäbisch Gmünd, OpenMoji"),
    Style("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google, Noto Emoji (blob style)"),
    Style("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0", "Emoji One, legacy set 1.5"),
)
TEXTS = Style("emojibase", "emojibase-data", "17.0.0", "MIT", "Miles Johnson, Emojibase (texts: Unicode CLDR)")


def open_package(style: Style, cache: Path) -> Path:
    """Fetch one package with npm's own client, unless the cache has it, and return the unpacked folder.

    Raises:
        RuntimeError: npm is missing or refused, with its message.
    """
    folder = cache / f"{style.package.strip('@').replace('/', '-')}-{style.version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", f"{style.package}@{style.version}"]
    try:
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"building the emoji set needs npm on the path (wanted: {' '.join(command)})") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
    unfinished = folder.with_suffix(".part")
    with tarfile.open(cache / done.stdout.split()[-1]) as archive:
        archive.extractall(unfinished, filter="data")
    (unfinished / "package").rename(folder)
    unfinished.rmdir()
    return folder


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def slugify(label: str) -> str:
    """English CLDR name -> icon name: "person in bed" -> "person-in-bed", accents and apostrophes folded away."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("&", " and ")).strip("-")


def strip_selectors(code: str) -> str:
    """Upper-case code points joined by '-', without the presentation selector FE0F."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def match_icons(folder: Path, labels: dict[str, str]) -> dict[str, str]:
    """Code point -> icon name for every emoji of `labels` (code point -> English name) that the package draws."""
    icons = read_json(folder / "icons.json")
    drawn = set(icons["icons"]) | set(icons.get("aliases", {}))
    by_code = {strip_selectors(code): name for code, name in read_json(folder / "chars.json").items() if name in drawn}
    # A slug that two names share ("keycap: #", "keycap: *") says nothing.
    shared = Counter(map(slugify, labels.values()))
    matched = {}
    for code, label in labels.items():
        slug = slugify(label)
        name = by_code.get(code) or (slug if shared[slug] == 1 else None)
        if name in drawn:
            matched[code] = name
    return matched


def compose_svg(icons: dict, name: str) -> str:
    """One icon of an icon-set file as a stand-alone square SVG; aliases may mirror or turn their parent."""
    box = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)}
    flips, chain = [False, False], [name]
    turns = 0
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
        chain.append(name)
    for link in chain:
        entry = icons["icons"].get(link) or icons["aliases"][link]
        flips = [flips[0] ^ entry.get("hFlip", False), flips[1] ^ entry.get("vFlip", False)]
        turns += entry.get("rotate", 0)
        box |= {key: entry[key] for key in box if key in entry}
    left, top, width, height = box.values()
    centre = f"{left + width / 2} {top + height / 2}"
    scale = f"{-1 if flips[0] else 1} {-1 if flips[1] else 1}"
    back = f"{-left - width / 2} {-top - height / 2}"
    body = icons["icons"][name]["body"]
    if any(flips) or turns % 4:
        body = f'<g transform="translate({centre}) rotate({90 * turns}) scale({scale}) translate({back})">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{body}</svg>'
    )


def rasterise(svg: str) -> np.ndarray | None:
    """SVG -> uint8 [SIZE, SIZE, 3] on white, or None for a blank picture."""
    import resvg_py  # here, for whoever reads the texts alone has no need of it

    # Fonts of the building machine must not leak into the pictures.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected a {SIZE}×{SIZE} raster, the rasteriser gave {pixels.shape}")
    return pixels if (pixels.min(-1) < 232).sum() >= MIN_INK else None


def draw_style(style: Style, cache: Path, labels: dict[str, str]) -> dict[str, np.ndarray]:
    """Code point -> uint8 [SIZE, SIZE, 3] for every emoji of `labels` that `style` draws; blanks dropped."""
    folder = open_package(style, cache)
    icons = read_json(folder / "icons.json")
    drawn = {code: rasterise(compose_svg(icons, name)) for code, name in match_icons(folder, labels).items()}
    return {code: pixels for code, pixels in drawn.items() if pixels is not None}
