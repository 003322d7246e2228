"""Alternatives of a regular expression: find which names in `q_proj|o_proj|(fc1|fc2)` match nothing.

A list of targets that was written for another model matches something, and so passes, though half of it is dead. Python
has no public parser of its expressions, so groups and bars are found here: escapes and classes are skipped.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedvlm_jax.lora.sites import Sites, as_patterns, search

# A group may begin so and still be one of names; lookarounds, conditions and comments are not looked into.
_HEAD = re.compile(r"\?(:|P<\w+>|[a-zA-Z-]+:)")
# Flags of the whole expression; Python takes them at its beginning alone.
_FLAGS = re.compile(r"(\(\?[a-zA-Z]+\))*")
_TOKENS = r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]"


class _Group(NamedTuple):
    """The names in a pair of parentheses, or in the whole: from `start` to before `end`, with bars between them."""

    start: int
    end: int
    bars: list[int]
    plain: bool  # exactly one of the names occurs: no lookaround, and nothing that may be repeated or left out


def find_dead_targets(sites: Sites, targets: str | Sequence[str]) -> list[str]:
    """Name the alternatives in `targets` that match no site, in their order; the outermost where they are nested.

    An alternative is tried without those beside it, and with the rest of its expression as it is. Groups that may be
    repeated or left out are taken whole: there the rest of the expression could do without any one of them.

    Raises:
        LoraError: a target is not a regular expression.

    >>> from fedvlm_jax.lora import Site
    >>> sites = {path: Site(path, "dense", (), (), (4,), (4,)) for path in ("fc1", "out_proj")}
    >>> find_dead_targets(sites, "fc1|q_proj|(o|out)_proj")
    ['q_proj', 'o']
    """
    names = [name for site in sites.values() for name in (site.path, site.weight)]
    dead: list[str] = []
    for pattern in as_patterns(targets):
        spans: list[tuple[int, int]] = []
        for start, end, alone in split_alternatives(pattern):
            inside = any(first <= start and end <= last for first, last in spans)
            if not inside and not search(alone, *names):
                spans.append((start, end))
                dead.append(pattern[start:end])
    return list(dict.fromkeys(dead))


def split_alternatives(pattern: str) -> Iterator[tuple[int, int, str]]:
    """Yield the place of each alternative in a pattern, outer ones first, and the pattern without those beside it."""
    branches = [
        (group, before + 1, after)
        for group in sorted(_find_groups(pattern))
        for before, after in itertools.pairwise([group.start - 1, *group.bars, group.end])
    ]
    for group, first, last in branches:
        around = [branch for branch in branches if branch[1] <= first and last <= branch[2]]
        if all(outer.plain for outer, _, _ in around) and (group.bars or group.end == len(pattern)):
            dropped = {at for outer, a, z in around for at in (*range(outer.start, a), *range(z, outer.end))}
            yield first, last, "".join(letter for at, letter in enumerate(pattern) if at not in dropped)


def _find_groups(pattern: str) -> list[_Group]:
    """All pairs of parentheses, and the whole."""
    flags = _FLAGS.match(pattern)
    begin = flags.end() if flags else 0
    tokens = _TOKENS + (r"|#[^\n]*" if "x" in pattern[:begin] else "")
    whole: list[int] = []
    open_, found = [(begin, whole)], list[_Group]()
    for token in re.finditer(tokens, pattern[begin:], re.DOTALL):
        at = begin + token.start()
        if token[0] == "(":
            open_.append((at + 1, []))
        elif token[0] == "|":
            open_[-1][1].append(at)
        elif token[0] == ")" and len(open_) > 1:
            start, bars = open_.pop()
            head = _HEAD.match(pattern, start)
            plain = (bool(head) or pattern[start] != "?") and pattern[at + 1 : at + 2] not in ("?", "*", "+", "{")
            found.append(_Group(head.end() if head else start, at, bars, plain))
    return [_Group(begin, len(pattern), whole, True), *found]
