"""Which emoji count as a concept, which concepts belong together, and which split each of them gets.

The split is by concept, never by image, and is fixed once: `emoji_splits.json` is committed and the build reads it.
Concepts that would give one another away (a role drawn for several genders, two code points with one picture) form a
family, and a family stays in one split.
"""

from collections import defaultdict

import numpy as np

SEED = 2507_17088
FRACTIONS = {"train": 0.60, "validation": 0.15, "test": 0.25}
LEFT_OUT_GROUPS = {"component", "flags"}

SAME_PICTURE = 6.0
"""Root-mean-square difference (grey levels of 255) below which two pictures of one style are one picture."""

SHARED_PICTURE = 1.5
"""The same measure, for a picture that a set files under two names."""

MAN, WOMAN, PERSON = "1F468", "1F469", "1F9D1"
GENDER_SIGNS = {"2640", "2642"}
NEUTRAL = {
    "1F466": "1F9D2",  # boy, girl: child
    "1F467": "1F9D2",
    MAN: PERSON,
    WOMAN: PERSON,
    "1F474": "1F9D3",  # old man, old woman: older person
    "1F475": "1F9D3",
    "1F46C": "1F46B",  # couples hand in hand: the one that every vendor draws
    "1F46D": "1F46B",
}
"""Gendered single code points that are dropped, and the concept that stays for them."""

RELATIVES = (
    ("1F46B", "1F9D1-200D-1F91D-200D-1F9D1"),  # couples hand in hand
    ("1F934", "1F478", "1FAC5"),  # prince, princess, person with crown
    ("1F385", "1F936", "1F9D1-200D-1F384"),  # Santa Claus, Mrs. Claus, Mx Claus
    ("1F483", "1F57A"),  # dancers
    ("1F930", "1FAC3", "1FAC4"),  # pregnant people
    ("1F931", "1F9D1-200D-1F37C"),  # feeding a baby
    ("1F6B9", "1F6BA", "1F6BB"),  # signs on a door
    ("1F48F", "1F491"),  # kiss, couple with heart
)
"""Survivors of one family for which Unicode's sequences give no rule."""


def find_neutral(code: str, known: set[str]) -> str | None:
    """The concept that stands in for a gendered one, or None when `code` itself is to stay."""
    if code in NEUTRAL:
        return NEUTRAL[code]
    parts = code.split("-")
    if parts[-1] in GENDER_SIGNS and len(parts) > 1:
        return "-".join(parts[:-2])
    people = [part for part in parts if part in NEUTRAL]
    if "2764" in parts and people:
        return "1F48F" if "1F48B" in parts else "1F491"
    if len(people) > 1 or (parts[0] == PERSON and "1F9D2" in parts):
        return "1F46A"  # families: one picture, or nearly so, with most vendors
    if people and parts[0] in (MAN, WOMAN):
        neutral = "-".join([PERSON, *parts[1:]])
        return neutral if neutral in known else None
    return None


def is_directed(code: str) -> bool:
    """The right-facing variants repeat a picture mirrored, and half the vendors do not mirror it."""
    return code.endswith("-200D-27A1")


def choose_concepts(codes: list[str]) -> list[str]:
    """Sorted code points of the concepts that stay: nothing gendered where a neutral one exists."""
    known = set(codes)
    return sorted(code for code in known if not is_directed(code) and find_neutral(code, known) not in known)


def drop_shared(pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out every picture that one style gives to two concepts: at least one of the two names is wrong."""
    shared = {code for pair in find_twins(pictures, SHARED_PICTURE) for code in pair}
    return {code: pixels for code, pixels in pictures.items() if code not in shared}


def find_twins(pictures: dict[str, np.ndarray], limit: float) -> list[tuple[str, str]]:
    """Pairs of concepts of one style whose pictures differ by less than `limit` (RMS grey levels)."""
    codes = sorted(pictures)
    flat = np.stack([pictures[code] for code in codes]).reshape(len(codes), -1)
    distance = measure_rms(flat, flat)
    rows, columns = np.nonzero(np.triu(distance < limit, k=1))
    return [(codes[i], codes[j]) for i, j in zip(rows, columns, strict=True)]


def measure_rms(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Root-mean-square difference of every picture [N, P] to every picture [M, P] of uint8 -> float64 [N, M].

    Sums run in float64 over exact integers, so that the answer does not depend on the order of the addition.
    """
    left, right = left.astype(np.float64), right.astype(np.float64)
    squared = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    return np.sqrt(np.maximum(squared, 0) / left.shape[1])


def group_families(concepts: list[str], twins: list[tuple[str, str]]) -> list[list[str]]:
    """Concepts joined through RELATIVES and `twins`, each family sorted, families by their first code point."""
    head = {code: code for code in concepts}

    def find(code: str) -> str:
        while head[code] != code:
            code = head[code]
        return code

    chains = [tuple(code for code in chain if code in head) for chain in RELATIVES]
    for chain in [*chains, *twins]:
        for other in chain[1:]:
            first, second = sorted((find(chain[0]), find(other)))
            head[second] = first
    families = defaultdict(list)
    for code in sorted(concepts):
        families[find(code)].append(code)
    return [families[first] for first in sorted(families)]


def split_concepts(families: list[list[str]], subgroup: dict[str, str]) -> dict[str, str]:
    """Concept -> split, about FRACTIONS within every subgroup; a subgroup's first concept goes to train."""
    strata = defaultdict(list)
    for family in families:
        strata[subgroup[family[0]]].append(family)
    rng = np.random.default_rng(SEED)
    splits = {}
    for name in sorted(strata):
        have = dict.fromkeys(FRACTIONS, 0)
        for index in rng.permutation(len(strata[name])):
            family = strata[name][index]
            total = sum(have.values()) + len(family)
            wanting = {split: part * total - have[split] for split, part in FRACTIONS.items()}
            split = max(wanting, key=wanting.get)
            have[split] += len(family)
            splits |= dict.fromkeys(family, split)
    return dict(sorted(splits.items()))
