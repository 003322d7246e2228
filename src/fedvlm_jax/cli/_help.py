"""The help of a command with many options: what people use first, and `--help-all` for the rest."""

import re
import textwrap
from collections.abc import Sequence

ALL = "--help-all"
WIDTH = 80

FIRST = (
    *("--method", "--methods", "--share", "--model", "--data", "--clients", "--cohort", "--rounds", "--batch-size"),
    *(
        "--rank",
        "--objective",
        "--topology",
        "--seed",
        "--seeds",
        "--baseline",
        "--check-images",
        "--strict",
        "--out",
        "--resume",
    ),
)
"""Options that are used first; those of the chosen method are shown with them."""

NOT_OF_COMPARISON = {"--method", "--resume"}

FEW = 24
"""A command with no more options shows all of them."""


def find_help(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return which help is asked for, or nothing, and the words as tyro understands them."""
    asked = next((word for word in words if word in ("-h", "--help", ALL)), "")
    return asked, ["--help" if word == ALL else word for word in words]


def show_help(text: str, *, everything: bool) -> str:
    """Leave of a help the options that people use first, unless everything is asked for.

    Args:
        text: tyro's, without frames: groups of options, each a line of flags and lines about it, indented further.
        everything: change nothing but lines that are too long.
    """
    lines = [line.rstrip() for line in text.splitlines()]
    start = next((number for number, line in enumerate(lines) if re.match(r" \w", line)), len(lines))
    head = [part for line in lines[:start] for part in textwrap.wrap(line, WIDTH) or [""]]
    entries = _list_entries(lines[start:])
    if everything or len(entries) <= FEW:
        return "\n".join([*head, *lines[start:]])
    flags = {flag for entry in entries for flag in _find_flags(entry)}
    wanted = [flag for flag in FIRST if "--methods" not in flags or flag not in NOT_OF_COMPARISON]
    chosen = {min(map(wanted.index, found)): entry for entry in entries if (found := _find_flags(entry) & {*wanted})}
    numbers = [entry for entry in entries if entry[0].startswith("  --method.")]
    first = [*(chosen[place] for place in sorted(chosen)), *numbers]
    rates = "; --lr X sets both learning rates" * ("--train.learning-rate-a" in flags)
    more = f"{ALL} lists {len(entries) - len(first)} more, in groups{rates}."
    return "\n".join([*head, *(line for entry in first for line in entry), "", *textwrap.wrap(more, WIDTH), ""])


def _list_entries(lines: Sequence[str]) -> list[list[str]]:
    """List the options with their flags in the first line; titles, rules and what stands below them are left out."""
    entries: list[list[str]] = []
    inside = False
    for line in lines:
        if re.match(r"  -[-\w]\w", line):
            entries.append([line])
            inside = True
        elif not line or not line.strip(" -"):
            inside = False
        elif inside:
            entries[-1].append(line)
    return entries


def _find_flags(entry: Sequence[str]) -> set[str]:
    return {word.rstrip(",") for word in entry[0].split() if word.startswith("--")}
