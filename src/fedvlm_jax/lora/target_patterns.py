"""Alternatives of a regular expression, one by one: which names in `q_proj|o_proj|(fc1|fc2)` match nothing.

A list of targets that was written for another model matches something, and so passes, though half of it is dead. Python
has no public parser of its expressions, so groups and bars are found here: escapes and classes are skipped.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedvlm_jax.lora.sites import Sites, as_patterns, search

__all__ = ["find_dead_targets", "split_alternatives"]

_HEAD = re.compile(r"\?(:|P<\w+>|[a-zA-Z-]+:)")
"""What a group may begin with and still be one of names; lookarounds, conditions and comments are not looked into."""


_FLAGS = re.compile(r"(\(\?[a-zA-Z]+\))*")
"""Flags of the whole expression; Python takes them at its beginning alone."""


class _Group(NamedTuple):
    """The inside of a pair of parentheses, or a whole pattern: from `start` to before `end`, with bars at `bars`."""

    start: int
    end: int
    bars: tuple[int, ...]


class _Branch(NamedTuple):
    """One alternative of a group: from `first` to before `last`."""

    group: _Group
    first: int
    last: int


def find_dead_targets(sites: Sites, targets: str | Sequence[str]) -> list[str]:
    """Name the alternatives in `targets` that match no site, in their order; the outermost where they are nested.

    An alternative is tried without those beside it, and with the rest of its expression as it is. Groups that may be
    repeated or left out are taken whole: there the rest of the expression could do without any one of them.

    Examples:
        With the sites `fc1` and `out_proj`, `fc1|q_proj|(o|out)_proj` has the dead alternatives `q_proj` and `o`.

    Raises:
        LoraError: a target is not a regular expression.
    """
    names = [name for site in sites.values() for name in (site.path, site.weight)]
    dead: list[str] = []
    for pattern in as_patterns(targets):
        spans: list[tuple[int, int]] = []
        for start, end, alone in split_alternatives(pattern):
            inside = any(first <= start and end <= last for first, last in spans)
            if not inside and not any(search(alone, name) for name in names):
                spans.append((start, end))
                dead.append(pattern[start:end])
    return list(dict.fromkeys(dead))


def split_alternatives(pattern: str) -> Iterator[tuple[int, int, str]]:
    """Where each alternative stands in a pattern, outer ones first, and the pattern without those beside it.

    A pattern without a bar is its own only alternative.
    """
    groups = sorted(_find_groups(pattern))
    branches = [branch for group in groups for branch in _list_branches(pattern, group)]
    for branch in branches:
        around = [one for one in branches if one.first <= branch.first and branch.last <= one.last]
        known = all(_is_plain(pattern, one.group) for one in around)
        if known and (branch.group.bars or branch.group.end == len(pattern)):
            yield branch.first, branch.last, _isolate(pattern, around)


def _isolate(pattern: str, around: Sequence[_Branch]) -> str:
    """The pattern with one alternative of each of these groups."""
    dropped: set[int] = set()
    for group, first, last in around:
        dropped.update(range(_skip_head(pattern, group), first), range(last, group.end))
    return "".join(character for at, character in enumerate(pattern) if at not in dropped)


def _list_branches(pattern: str, group: _Group) -> Iterator[_Branch]:
    edges = [_skip_head(pattern, group) - 1, *group.bars, group.end]
    for before, after in itertools.pairwise(edges):
        yield _Branch(group, before + 1, after)


def _find_groups(pattern: str) -> list[_Group]:
    """All pairs of parentheses, and the whole."""
    open_: list[tuple[int, list[int]]] = [(0, [])]
    found: list[_Group] = []
    flags = _FLAGS.match(pattern)
    verbose = flags is not None and "x" in flags[0]
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "[":
            at = _end_class(pattern, at)
        elif character == "#" and verbose:
            at = pattern.find("\n", at) if "\n" in pattern[at:] else len(pattern)
        elif character == "(":
            open_.append((at + 1, []))
        elif character == ")" and len(open_) > 1:
            start, bars = open_.pop()
            found.append(_Group(start, at, tuple(bars)))
        elif character == "|":
            open_[-1][1].append(at)
        at += 1
    return [_Group(0, len(pattern), tuple(open_[0][1])), *found]


def _end_class(pattern: str, at: int) -> int:
    """Where the class that begins here ends; a bracket right at its start is one of its characters."""
    at += 2 if pattern[at + 1 : at + 2] == "^" else 1
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


def _is_plain(pattern: str, group: _Group) -> bool:
    """Is it a group of names, there exactly once? The whole pattern is."""
    if group.end == len(pattern):
        return True
    looks = pattern[group.start] == "?" and not _HEAD.match(pattern, group.start)
    return not looks and pattern[group.end + 1 : group.end + 2] not in ("?", "*", "+", "{")


def _skip_head(pattern: str, group: _Group) -> int:
    """Where the names of a group begin, after `?:`, `?P<name>` or flags; those of the whole stay with each of them."""
    head = (_HEAD if group.end < len(pattern) else _FLAGS).match(pattern, group.start)
    return head.end() if head else group.start
