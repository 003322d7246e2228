"""A folder of the form of Tux Paint's stamps."""

from pathlib import Path

from rlaif_pictures import read_emoji


def write_stamps(folder: Path, count: int = 24) -> Path:
    """Shipped pictures under the names of stamps, with the texts and drawings that lie beside them."""
    places = ["animals/birds", "food/fruit", "animals/mammals/cats", "animals/mammals/aquatic"]
    for number, picture in enumerate(read_emoji()[::30][:count]):
        file = folder / places[number % len(places)] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.encoded)
        file.with_suffix(".txt").write_text("A picture.\nde.utf8=Ein Bild.\n")
    for drawn in ("animals/birds/cartoon/duck.png", "clothes/hat.png", "food/fruit/pear.svg"):
        file = folder / drawn
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"not read")
    return folder
