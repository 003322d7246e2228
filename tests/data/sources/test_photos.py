"""Tux Paint's photographs, on a folder of the same form; where Debian's package is installed, on its own."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from stamps import write_stamps

from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.sources.photos import KINDS, PACKAGE, PLACE, read_words
from fedvlm_jax.data.sources.registry import make_options, read_table
from fedvlm_jax.data.unique_images import digest_rows
from fedvlm_jax.errors import UserError


def test_every_language_has_every_picture_once_in_its_own_words(tmp_path: Path):
    options = make_options("photos", path=write_stamps(tmp_path), languages=("en", "de"), clients_per_language=2)
    table = read_table(options)
    assert (table.name, len(table)) == ("photos", 48)
    languages, kinds, clients = (table.read_text(name) for name in ("language", "kind", "client"))
    answers, asked = table.read_text("chosen"), table.read_text("question_client")
    assert {(kind, answer) for kind, answer, lang in zip(kinds, answers, languages, strict=True) if lang == "de"} == {
        ("birds", "Vögel"), ("fruit", "Obst"), ("mammals", "Säugetiere"), ("marine life", "Meereslebewesen"),
    }  # fmt: skip
    assert {text for text, language in zip(asked, languages, strict=True) if language == "de"} == {
        read_words()["de"][1]
    }
    assert {*clients} == {"en-1", "en-2", "de-1", "de-2"}
    names = table.read_text("idx")
    for language in ("en", "de"):
        mine = [name for name, lang in zip(names, languages, strict=True) if lang == language]
        assert len(mine) == len({*mine}) == 24
    # Dealt anew: who shares a client in one language does not in another.
    dealt = dict(zip(names, clients, strict=True))
    pairs = {str(name)[3:]: (dealt[f"en/{str(name)[3:]}"], dealt[f"de/{str(name)[3:]}"]) for name in names}
    assert len({*pairs.values()}) == 4


def test_no_picture_is_trained_on_and_tested(tmp_path: Path):
    options = make_options("photos", path=write_stamps(tmp_path), test_share=0.4, validation_share=0.1)
    table = read_table(options)
    federation = federate(table, options, 0)
    shown = {
        split: set(digest_rows(table, np.concatenate([client.rows_of(split) for client in federation.clients]))[0])
        for split in ("train", "test")
    }
    assert shown["train"]
    assert shown["test"]
    assert not shown["train"] & shown["test"]


def test_a_picture_in_another_folder_is_of_another_kind(tmp_path: Path):
    """The rows are kept by what the files hold, and their folders say what they show."""
    options = make_options("photos", path=write_stamps(tmp_path), languages=("en",))
    assert "vegetables" not in read_table(options).read_text("chosen")
    (tmp_path / "food" / "fruit").rename(tmp_path / "food" / "vegetables")
    assert "vegetables" in read_table(options).read_text("chosen")


def test_the_words_are_those_of_the_emoji_set():
    words = read_words()
    assert len(words) == 12
    for _, _, names in words.values():
        assert {*names} == {*KINDS.values()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: {"path": folder / "none"}, "apt-get install tuxpaint-stamps-default"),
        (lambda folder: {"path": folder}, "has no pictures in animals/birds"),
        (lambda folder: {"path": write_stamps(folder), "languages": ("en", "xx")}, "--data.languages has xx"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(tmp_path: Path, make, message: str):
    with pytest.raises(UserError, match=message) as refused:
        read_table(make_options("photos", **make(tmp_path)))
    assert "\n" not in str(refused.value)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Debian's package where it is installed, else fetched as the docs say."""
    if PLACE.is_dir():
        return PLACE
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("this is no Debian")
    fetched = subprocess.run(["apt-get", "download", PACKAGE], cwd=tmp_path, capture_output=True, check=False)
    if fetched.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched here")
    (file,) = tmp_path.glob(f"{PACKAGE}_*.deb")
    subprocess.run(["dpkg-deb", "-x", file, tmp_path / "photos"], check=True)
    return tmp_path / "photos" / PLACE.relative_to("/")


@pytest.mark.slow
def test_the_package_s_own_photographs(package: Path):
    options = make_options("photos", path=package)
    table = read_table(options)
    assert len(table) == 4 * 251
    assert {*table.read_text("kind")} == {*KINDS.values()}
    assert all(len(digests) == 1 for digests in digest_rows(table, range(len(table)))[0])
    federation = federate(table, options, 0)
    assert len(federation.clients) == 8
    assert not federation.skipped
