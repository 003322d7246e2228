"""The help of a command with many options: what people use first, and `--help-all` for the rest."""

import re
import textwrap
from collections.abc import Collection, Sequence

ALL = "--help-all"
WIDTH = 80
# Options that are used first; those of the chosen method are shown with them.
FIRST = (
    "--method", "--methods", "--share", "--model", "--data", "--clients", "--at-least", "--classes", "--timeout",
    "--secure", "--port", "--cohort", "--rounds", "--batch-size",
    "--rank", "--objective", "--topology", "--seed", "--seeds", "--baseline", "--check-images", "--strict", "--track",
    "--out", "--resume", "--adapter", "--benchmark", "--check",
)  # fmt: skip

FEW = 28  # a command with no more options shows all of them


def show_help(text: str, *, everything: bool, refused: Collection[str] = (), required: Collection[str] = ()) -> str:
    """Leave of tyro's help the options that people use first; of all of it, break only lines that are too long.

    The text has no frames: groups of options, each a line of flags and lines about it, indented further.

    Args:
        text: tyro's.
        everything: whether `--help-all` asked.
        refused: options that the command always refuses, with the reason; they are not listed.
        required: options that it refuses to go without, though they have a default elsewhere.
    """
    lines = _correct([line.rstrip() for line in text.splitlines()], refused, required)
    start = next((number for number, line in enumerate(lines) if re.match(r" \w", line)), len(lines))
    head = [part for line in lines[:start] for part in textwrap.wrap(line, WIDTH) or [""]]
    entries = list_entries(lines[start:])
    if everything or len(entries) <= FEW:
        return "\n".join([*head, *lines[start:]])
    flags = {flag for entry in entries for flag in _find_flags(entry)}
    # A comparison has its methods in the place of one, and goes on without being asked to.
    wanted = [flag for flag in FIRST if not ("--methods" in flags and flag in ("--method", "--resume"))]
    chosen = {min(map(wanted.index, found)): entry for entry in entries if (found := _find_flags(entry) & {*wanted})}
    numbers = [entry for entry in entries if entry[0].startswith("  --method.")]
    first = [*(chosen[place] for place in sorted(chosen)), *numbers]
    rates = "; --lr X sets both learning rates" * ("--train.learning-rate-a" in flags)
    more = f"{ALL} lists {len(entries) - len(first)} more, in groups{rates}."
    return "\n".join([*head, *(line for entry in first for line in entry), "", *textwrap.wrap(more, WIDTH), ""])


def list_entries(lines: Sequence[str]) -> list[list[str]]:
    """List the options with their flags in the first line; titles, rules and what stands below them are left out.

    >>> list_entries([" options", " ----", "  --seed INT", "      the run's", "", "  --out DIR"])
    [['  --seed INT', "      the run's"], ['  --out DIR']]
    """
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


def _correct(lines: Sequence[str], refused: Collection[str], required: Collection[str]) -> list[str]:
    """Take out the entries of options that are refused, and correct those of options that must be there.

    A group of which no option is left goes with its title.

    >>> _correct(["  --data NAME", "        rows. (default: x)", "  --old INT", "        y"], ["--old"], ["--data"])
    ['  --data NAME', '        rows. (required)']
    >>> _correct([" one options", " ---", "  --old INT", "", " two options", " ---", "  --new INT"], ["--old"], [])
    [' two options', ' ---', '  --new INT']
    """
    kept, at, title = list[str](), 0, 0
    while at < len(lines):
        end = at + 1
        if re.match(r" \w", lines[at]):
            title = len(kept)
        if flags := _find_flags([lines[at]]) if _starts_entry(lines[at]) else set():
            while end < len(lines) and lines[end].startswith("   "):
                end += 1
        entry = "\n".join(lines[at:end])
        if flags & {*required}:
            entry = re.sub(r"\(default:\s[^)]*\)", "(required)", entry)
        last = end == len(lines) or not lines[end].strip()  # of its group
        if not (flags and flags <= {*refused}):
            kept += entry.split("\n")
        elif last and not any(map(_starts_entry, kept[title:])):
            kept, end = kept[:title], end + 1
        at = end
    return kept


def _starts_entry(line: str) -> bool:
    return re.match(r"  -[-\w]\w", line) is not None


def _find_flags(entry: Sequence[str]) -> set[str]:
    return {word.rstrip(",") for word in entry[0].split() if word.startswith("--")}
