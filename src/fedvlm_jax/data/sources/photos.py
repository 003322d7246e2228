"""Photographs of animals, plants and things, asked about in several languages: those of Tux Paint's stamps.

The pictures are those of Debian's package tuxpaint-stamps-default (GPL-2, 161 MB), which does not ship; they are read
where it puts them, or from `--data.path`. Folders of drawings are left out. The kind of thing is that of the folder,
named as the emoji set names it in twelve languages: the words are those which the shipped bases have learnt, and the
pictures are of another nature. A client has a language and a part of the pictures, dealt anew for each language.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import tyro

from fedvlm_jax.data.config import Source, check_names
from fedvlm_jax.data.forms.base import FormOptions, RowOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.files import Content, Part, Record, gather, walk
from fedvlm_jax.utils.digests import digest_parts
from fedvlm_jax.utils.option_ranges import Count

if TYPE_CHECKING:
    from fedvlm_jax.data.table import Table

NAME, PACKAGE = "photos", "tuxpaint-stamps-default"
PLACE = Path("/usr/share/tuxpaint/stamps")
"""Where Debian's package puts the pictures."""
DRAWN = ("cartoon", "toys", "plastic")
"""Folders whose pictures are no photographs of the thing."""
KINDS = {
    "animals/birds": "birds",
    "animals/fish": "marine life",
    "animals/insects": "bugs",
    "animals/mammals": "mammals",
    "animals/mammals/aquatic": "marine life",
    "animals/marsupials": "mammals",
    "animals/shellfish": "marine life",
    "food/fruit": "fruit",
    "food/vegetables": "vegetables",
    "hobbies/music": "musical instruments",
    "household/tools": "tools",
    "plants": "other plants",
    "plants/flowers": "flowers",
    "sports": "sports",
    "vehicles/auto": "ground transportation",
    "vehicles/construction": "ground transportation",
    "vehicles/cycle": "ground transportation",
    "vehicles/emergency": "ground transportation",
    "vehicles/masstransit": "ground transportation",
    "vehicles/race": "ground transportation",
}
"""Folder -> the subgroup of emoji that its pictures show, and those of folders in it that are not named themselves."""
TASK = "subgroup"


@dataclass(frozen=True)
class Options(RowOptions):
    """Photographs of Tux Paint's stamps"""

    source: Source = NAME
    path: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=f"(default: {PLACE})")] = None
    """Folder of the stamps."""
    languages: tuple[str, ...] = ("en", "de", "fr", "es")
    """Languages of the clients. Ours, not the paper's."""
    clients_per_language: Count = 2
    """Clients of a language, among whom its pictures are dealt. Ours, not the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.languages:
            raise UserError("--data.languages is empty: it must have at least one name")
        check_names("--data.languages", self.languages)

    def read_rows(self) -> "Table":
        """Open the pictures, with a row for each language."""
        form = f"{NAME} {self.clients_per_language} {' '.join(self.languages)}"
        source = str(self.path or PLACE)
        stamps = _Stamps(
            source=source, form=form, languages=self.languages, clients_per_language=self.clients_per_language
        )
        return dataclasses.replace(stamps.read_rows(), name=NAME, form="")

    @property
    def place(self) -> tuple[object, ...]:
        """Return all that the opened rows depend on."""
        return (*super().place, self.languages, self.clients_per_language)


@dataclass(frozen=True)
class _Stamps(FormOptions):
    languages: tuple[str, ...] = ()
    clients_per_language: int = 1

    def find_content(self) -> Content:
        """Find the photographs.

        Raises:
            UserError: the folder is not there, or has none.
        """
        folder = Path(self.source).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"--data {NAME}: there is no folder {folder}. Debian's package {PACKAGE} has it: apt-get install "
                f"{PACKAGE}; or apt-get download {PACKAGE}, dpkg-deb -x {PACKAGE}_*.deb DIR and --data.path "
                f"DIR{PLACE}"
            )
        found = sorted(place / name for place, names in walk(folder) for name in names if find_kind(place / name))
        if not found:
            raise UserError(f"--data {NAME}: {folder} has no pictures in {', '.join(list(KINDS)[:3])} and so on")
        content = gather(folder, found)
        return content._replace(
            parts=tuple(part._replace(base="", split=None, label=part.name) for part in content.parts)
        )

    def read_records(self, part: Part, pictures: bool) -> Iterator[Record]:
        """Give the rows of a photograph, one for each language."""
        kind, words = find_kind(PurePath(part.label)), read_words()
        for language in self.languages:
            if language not in words:
                raise UserError(f"--data.languages has {language}; there are {', '.join(sorted(words))}")
            neutral, question, answers = words[language]
            dealt = digest_parts([os.fsencode(part.label), language.encode()])
            number = int.from_bytes(dealt[:8]) % self.clients_per_language + 1
            yield {
                "image": part.label,
                "question": neutral,
                "question_client": question,
                "chosen": answers[kind],
                "idx": f"{language}/{part.label}",
                "language": language,
                "kind": kind,
                "client": f"{language}-{number}",
            }


def find_kind(name: PurePath) -> str:
    """Return what is on a picture, by its path from the stamps' folder; nothing for what is left out.

    >>> find_kind(PurePath("animals/mammals/cats/lion.png")), find_kind(PurePath("food/fruit/cartoon/pear.png"))
    ('mammals', '')
    """
    if name.suffix != ".png" or {*DRAWN} & {*name.parts}:
        return ""
    return next((KINDS[str(folder)] for folder in name.parents if str(folder) in KINDS), "")


@lru_cache(maxsize=1)
def read_words() -> dict[str, tuple[str, str, dict[str, str]]]:
    """Return language -> the neutral question, the language's own, and the name of every kind, of the emoji set.

    >>> read_words()["de"][2]["birds"]
    'Vögel'
    """
    from fedvlm_jax.data.sources.registry import read_table

    table = read_table("emoji")
    columns = [
        table.read_text(name) for name in ("task", "language", "concept", "chosen", "question", "question_client")
    ]
    rows = [row for row in zip(*columns, strict=True) if row[0] == TASK]
    english = {concept: answer for _, language, concept, answer, _, _ in rows if language == "en"}
    words: dict[str, tuple[str, str, dict[str, str]]] = {}
    for _, language, concept, answer, neutral, question in rows:
        if (kind := english.get(concept)) in KINDS.values():
            words.setdefault(str(language), (str(neutral), str(question), {}))[2][str(kind)] = str(answer)
    return words
