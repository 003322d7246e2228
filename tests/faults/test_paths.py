"""Names in a table or in a run's folder that lead elsewhere: nothing outside is read, and the reason says so."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from make_parquet import draw_image, make_row, write_rows
from malformed import LOST, OUTSIDE

from fedvlm_jax.data.image_decoding import BrokenImageError
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError
from fedvlm_jax.reporting.example_cards import read_cards
from fedvlm_jax.utils.safe_paths import OutsideError, read_below

SECRET = draw_image(9)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A data folder with ways out of it, and the folder beside it."""
    data, beside = tmp_path / "data", tmp_path / "beside"
    (data / "pictures").mkdir(parents=True)
    beside.mkdir()
    (beside / "secret.png").write_bytes(SECRET)
    (data / "good.png").write_bytes(draw_image(1))
    (data / "pictures" / "inner.png").write_bytes(draw_image(2))
    (data / "link.png").symlink_to(beside / "secret.png")
    (data / "inside-link.png").symlink_to("pictures/inner.png")
    (data / "out").symlink_to(beside)
    (data / "in").symlink_to("pictures")
    (data / "loop.png").symlink_to("loop.png")
    (data / "loop").symlink_to("loop")
    (data / "around").symlink_to("../data")
    os.mkfifo(data / "pipe.png")
    os.link(data / "good.png", data / "hard.png")
    return data, beside


def open_table(data: Path, path: str, **options: object) -> Table:
    write_rows(data / "a.parquet", [make_row(0, image={"bytes": None, "path": path})])
    return read_table(make_options(source=str(data), **options))


CASES: dict[str, tuple[Callable[[Path, Path], str], str | int]] = {
    "a name": (lambda data, beside: "good.png", 1),
    "a name with dots that stays": (lambda data, beside: "pictures/../good.png", 1),
    "up and down again": (lambda data, beside: "../data/good.png", 1),
    "an absolute path inside": (lambda data, beside: str(data / "good.png"), 1),
    "a second name of the file": (lambda data, beside: "hard.png", 1),
    "a link inside": (lambda data, beside: "inside-link.png", 2),
    "a folder that is a link inside": (lambda data, beside: "in/inner.png", 2),
    "a link around": (lambda data, beside: "around/around/good.png", 1),
    "an absolute path": (lambda data, beside: str(beside / "secret.png"), OUTSIDE),
    "upwards": (lambda data, beside: "../beside/secret.png", OUTSIDE),
    "a sibling that begins alike": (lambda data, beside: "../data2/secret.png", OUTSIDE),
    "upwards to nothing": (lambda data, beside: "../beside/none.png", OUTSIDE),
    "a link out": (lambda data, beside: "link.png", OUTSIDE),
    "a folder that is a link out": (lambda data, beside: "out/secret.png", OUTSIDE),
    "a folder that is a link out, to nothing": (lambda data, beside: "out/none.png", OUTSIDE),
    "the system's own": (lambda data, beside: "/etc/hostname", OUTSIDE),
    "a process's open file": (lambda data, beside: "/proc/self/environ", OUTSIDE),
    "a link to itself": (lambda data, beside: "loop.png", LOST),
    "a folder that links to itself": (lambda data, beside: "loop/a.png", LOST),
    "a pipe": (lambda data, beside: "pipe.png", LOST),
    "nothing": (lambda data, beside: "none.png", LOST),
    "a file as a folder": (lambda data, beside: "good.png/x.png", LOST),
    "the folder": (lambda data, beside: ".", LOST),
    "a home": (lambda data, beside: "~/x.png", LOST),
}


@pytest.mark.parametrize("name", list(CASES))
def test_an_image_s_path_stays_below_the_data(places: tuple[Path, Path], name: str) -> None:
    make, expected = CASES[name]
    table = open_table(places[0], make(*places))
    if isinstance(expected, int):
        assert table.read_image(0) == draw_image(expected)
        return
    with pytest.raises(BrokenImageError) as caught:
        table.read_image(0)
    assert str(caught.value) == expected


@pytest.mark.parametrize("path", ["secret.png", "link.png", "out/secret.png", "../beside/secret.png", "ABSOLUTE"])
def test_a_second_root_may_be_allowed(places: tuple[Path, Path], path: str) -> None:
    data, beside = places
    path = str(beside / "secret.png") if path == "ABSOLUTE" else path
    assert open_table(data, path, image_root=beside).read_image(0) == SECRET
    with pytest.raises(BrokenImageError, match="outside"):
        open_table(data, "/etc/hostname", image_root=beside).read_image(0)


def test_a_second_root_that_is_none_is_told(places: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"--data\.image-root .*nowhere is no folder"):
        open_table(places[0], "good.png", image_root=places[0] / "nowhere")


def test_a_data_folder_that_is_a_link_is_a_folder(places: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(places[0])
    assert open_table(tmp_path / "alias", "good.png").read_image(0) == draw_image(1)


def test_a_link_that_takes_the_place_of_a_resolved_file_is_not_followed(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, beside = places

    def swap(path: Path) -> bool:
        Path(path).unlink()
        Path(path).symlink_to(beside / "secret.png")
        return True

    monkeypatch.setattr(os.path, "lexists", swap)
    with pytest.raises(OSError, match="symbolic links"):
        read_below("good.png", [data])


def test_a_file_larger_than_wanted_is_not_read(places: tuple[Path, Path]) -> None:
    size = (places[0] / "good.png").stat().st_size
    assert len(read_below("good.png", [places[0]], size)) == size
    with pytest.raises(OSError, match="no regular file of at most"):
        read_below("good.png", [places[0]], size - 1)
    with pytest.raises(OutsideError):
        read_below("..", [places[0]])


def write_card(folder: Path, picture: object) -> None:
    said = {"zero_shot": {"text": "a dog", "exact_match": 0.0, "token_f1": 0.0}}
    entry = {"client": "a", "row": 3, "picture": picture, "question": "?", "answer": "cat", "answers": said}
    (folder / "examples.json").write_text(json.dumps({"looked_at": {"a": 1}, "examples": [entry]}))


@pytest.mark.parametrize(
    "name", [name for name, (_, found) in CASES.items() if found == OUTSIDE] + ["a pipe", "a link to itself"]
)
def test_a_report_embeds_no_file_from_elsewhere(places: tuple[Path, Path], name: str) -> None:
    data, beside = places
    write_card(data, CASES[name][0](data, beside))
    with pytest.raises(UserError, match=r"examples\.json: picture .* is no PNG of at most 1 MiB below .*data"):
        read_cards(data)


def test_a_report_embeds_pictures_alone(places: tuple[Path, Path]) -> None:
    data, _ = places
    write_card(data, "good.png")
    assert [card.content for card in read_cards(data)[0]] == [draw_image(1)]
    write_card(data, "in/inner.png")
    assert [card.content for card in read_cards(data)[0]] == [draw_image(2)]
    write_card(data, "none.png")
    assert read_cards(data) == ([], {"a": 1})
    write_card(data, "examples.json")
    with pytest.raises(UserError, match=r"picture 'examples\.json' is no PNG"):
        read_cards(data)
    for odd in (3, None, ["x"], "a\0b"):
        write_card(data, odd)
        with pytest.raises(UserError, match=r"examples\.json: .*(is the file damaged|is no PNG)"):
            read_cards(data)


def test_bytes_count_before_any_path(places: tuple[Path, Path]) -> None:
    image = {"bytes": draw_image(5), "path": "/etc/hostname"}
    write_rows(places[0] / "a.parquet", [make_row(0, image=image)])
    assert read_table(str(places[0])).read_image(0) == draw_image(5)


def test_a_column_of_paths_is_held_to_the_same(places: tuple[Path, Path]) -> None:
    data, beside = places
    rows = [make_row(0, image="good.png"), make_row(1, image=str(beside / "secret.png"))]
    write_rows(data / "a.parquet", rows, image=pa.string())
    table = read_table(str(data))
    assert table.read_image(0) == draw_image(1)
    with pytest.raises(BrokenImageError, match="outside of the data's folder"):
        table.read_image(1)
