"""The classes that clients agree on beforehand, for a base that chooses among them: no node knows others' answers.

They are options of the data in the plan, by which nodes bind the base. The server computes nothing with classes.
"""

from pathlib import Path

from fedvlm_jax.config.method_setup import count_vectors
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.table import UNREADABLE
from fedvlm_jax.errors import UserError, describe_os_error, format_count
from fedvlm_jax.models import Vlm, open_processor
from fedvlm_jax.models.clip.processor import MOST_CLASSES
from fedvlm_jax.utils.files import read_plain
from fedvlm_jax.utils.untrusted_text import clean, cut

LONGEST = 300
"""Characters of a class, at most: CLIP reads 77 tokens."""
LARGEST = 2**23
"""Bytes of a file of classes, at most."""


def read_agreed(trained: Path | None, novel: Path | None) -> dict[str, tuple[str, ...]]:
    """Read the classes that are trained among, and those that nobody trains on, as options of the data.

    Raises:
        UserError: a file cannot be read, or has a line that is empty, too long or there before; there are too many
            classes; or there are novel ones alone.
    """
    if trained is None:
        if novel is not None:
            raise UserError("--novel-classes: these come beside those of --classes, which is missing")
        return {}
    first = dict[str, str]()
    found = {"agreed_classes": _read(trained, "--classes", first)}
    return found if novel is None else {**found, "agreed_novel": _read(novel, "--novel-classes", first)}


def _read(file: Path, flag: str, first: dict[str, str]) -> tuple[str, ...]:
    """Read a file of classes; `first` has where each class was met first, of all files."""
    named = clean(f"{flag} {file}")
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"{named}: more than {LARGEST:,} bytes; expected a text with a class per line")
        lines = read_plain(file).decode("utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(clean(f"{flag}: {describe_os_error(error)}")) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: not UTF-8 at byte {error.start:,}; expected a text with a class per line") from None
    for number, text in enumerate(map(str.strip, lines), 1):
        where, shown = f"{named}, line {number:,}", repr(clean(cut(text, 40)))
        if text in ("", UNREADABLE):
            raise UserError(f"{where}: there is no class; expected a text with a class per line")
        if len(text) > LONGEST:
            raise UserError(f"{where}: {shown} has {len(text):,} characters; expected {LONGEST} at most")
        if text in first:
            raise UserError(f"{where}: {shown} is there already ({first[text]}); expected each class once")
        first[text] = f"{flag}, line {number:,}"
    if len(first) > MOST_CLASSES:
        raise UserError(f"{named}: {format_count(len(first), 'class', 'classes')}; expected {MOST_CLASSES:,} at most")
    return tuple(line.strip() for line in lines)


def check_agreed(run: Run, vlm: Vlm) -> None:
    """Refuse a base that chooses among classes where none are agreed on, and classes for a base that writes.

    Raises:
        UserError: it is so.
    """
    if vlm.bind is not None and not run.data.agreed_classes:
        raise UserError(
            f"{run.model} chooses among the answers of all clients' rows, and no node knows the others': agree on them "
            "beforehand, and give a text with a class per line, --classes FILE"
        )
    if vlm.bind is None and run.data.agreed_classes:
        raise UserError(f"--classes: {run.model} writes its answers and has no classes: leave it out")


def try_agreed(run: Run, vlm: Vlm) -> None:
    """Refuse classes that the base cannot be asked about, of which rows would be left out at every node.

    Raises:
        UserError: it is so, or the base's tokenizer cannot be read.
    """
    data = run.data
    if vlm.bind is None:
        return
    every = (*data.agreed_classes, *data.agreed_novel)
    bound, _ = vlm.bind(open_processor(run.model), every, data.class_prompt, count_vectors(run))
    if lost := set(every).difference(bound.classes):
        raise UserError(
            f"--classes: {run.model} cannot read {clean(cut(min(lost), 40))!r}, written into {data.class_prompt!r}: it "
            f"is longer than {vlm.positions} tokens, or holds what ends texts; give it another name, in the rows too"
        )
