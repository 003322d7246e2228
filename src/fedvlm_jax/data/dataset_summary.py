"""A federation before any training, as JSON: how much of what each client has, and what is in two splits or clients.

Nothing here needs a model, so prompts that are too long for one are not known yet. An image in train and in test makes
a test score too good; one with two clients makes them less apart than they seem (some sets mean it so). Sameness is
that of the encoded bytes, or of the pixels where images are decoded.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data import federated_dataset as federated
from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.partitioning.row_keys import UNKNOWN, list_keys, read_key
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import find_question_column
from fedvlm_jax.data.unique_images import number_distinct, unique_images
from fedvlm_jax.errors import format_count

# Keys that are counted where a table has them, after the one that the partition is made by.
KEYS = ("group", "origin_dataset", "question_type", "language")
SHOWN = 20  # unusable rows that are listed
NAMED = 5  # examples of an overlap, and pairs of clients, that are named


class Places(NamedTuple):
    """Rows in use: [N] row numbers, each row's client as a number, each row's split as a place in `SPLITS`."""

    rows: Int[np.ndarray, " rows"]
    clients: Int[np.ndarray, " rows"]
    splits: Int[np.ndarray, " rows"]


def describe(
    table: Table,
    federation: federated.Federation,
    options: DataOptions,
    *,
    check_images: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Describe a federation, rows that will be skipped included; `note` gets a line before long work.

    With `check_images` every image is decoded, to find those that are broken, and those with equal pixels though their
    bytes differ.

    Returns:
        JSON of counts, of rows unless they are called `distinct` or `images`. `keys` has for each key the rows per
        value, in all and by client, and the clients' unlikeness, 0 to 1; `label` is the key that says most. `texts` has
        the lengths in characters and in words.
    """
    places = place_rows(federation)
    note(f"hashing the images of {format_count(len(places.rows), 'row')}")
    images, image, missing = unique_images(table, places.rows)
    columns = {"question": find_question_column(table, options), "chosen": "chosen", "rejected": "rejected"}
    texts = {name: table.read_stripped(c, places.rows) for name, c in columns.items() if c in table.columns}
    pictures, broken = np.arange(len(images)), dict[int, str]()
    if check_images:
        note(f"decoding {format_count(len(images), 'image')}")
        pictures, broken = images.number_pictures()
    picture = np.where(image >= 0, pictures[image], -1) if len(images) else image  # [rows, pictures of a row]
    faults: dict[int, str] = {}  # place -> why the row there will be skipped, in the order of `encode`
    for place, (row, held) in enumerate(zip(places.rows.tolist(), image.tolist(), strict=True)):
        seen = missing.get(row) or next((broken[index] for index in held if index in broken), None)
        if reason := seen or federated.find_text_fault(texts["question"][place], texts["chosen"][place]):
            faults[place] = reason
    unusable = federation.skipped + federated.skip_rows(table, places.rows[list(faults)], list(faults.values()))
    pairs = None
    if texts.get("rejected"):
        unpaired = Counter(filter(None, map(federated.find_pair_fault, texts["chosen"], texts["rejected"])))
        pairs = {"rows": len(places.rows) - unpaired.total(), "reasons": dict(unpaired.most_common())}
    keys = _count_keys(table, federation, places)
    _, asked = number_distinct(zip(texts["question"], texts["chosen"], strict=True))
    # Of a row whose pictures cannot be read, which are told by no number, it is not known what it shows.
    shown = [
        row for row in zip(asked.tolist(), map(tuple, picture.tolist()), strict=True) if max(row[1], default=-1) >= 0
    ]
    return {
        "source": options.source,
        "form": table.form,
        "rows": {"in_table": len(table), "in_use": len(places.rows), "without_client": len(federation.skipped)},
        "federation": federation.description,
        "clients": _describe_clients(federation, places, image),
        "keys": keys,
        "label": _choose_label(keys),
        "texts": {name: _measure_texts(values) for name, values in texts.items() if values},
        "images": {
            "distinct": len(images),
            "most_rows": int(np.bincount(image[image >= 0]).max(initial=0)),
            "decoded": check_images,
        },
        "unusable": {
            "rows": len(unusable),
            "reasons": federated.count_reasons(unusable),
            "first": [{"row": entry.row, "idx": entry.idx, "reason": entry.reason} for entry in unusable[:SHOWN]],
            "lost": federated.describe_lost(table, unusable),
        },
        "pairs": pairs,
        "overlap": {
            "images": find_overlap(picture.astype(np.int64), places, federation.names),
            "texts": find_overlap(asked, places, federation.names),
        },
        "repeated_rows": len(shown) - len(set(shown)),
    }


def _count_keys(table: Table, federation: federated.Federation, places: Places) -> dict[str, Any]:
    by = (federation.description.get("partition") or {}).get("by")
    found = {}
    for key in dict.fromkeys(key for key in (by, *KEYS) if key in list_keys(table)):
        values = [value or UNKNOWN for value in read_key(table, key, places.rows)]
        total = dict(Counter(values).most_common())
        held = {name: Counter[str]() for name in federation.names}
        for client, value in zip(places.clients.tolist(), values, strict=True):
            held[federation.clients[client].name][value] += 1
        found[key] = {
            "values": total,
            "unlikeness": measure_unlikeness(
                np.asarray([[counts[value] for value in total] for counts in held.values()])
            ),
            "by_client": {name: {v: counts[v] for v in total if counts[v]} for name, counts in held.items()},
        }
    return found


def measure_unlikeness(counts: Int[np.ndarray, "clients values"]) -> float | None:
    """Average the total variation distance between a client's mix of values and the mix of all.

    0 where clients are alike, towards 1 where they are disjoint; clients without rows do not count.

    >>> measure_unlikeness(np.asarray([[9, 1], [1, 9]]))
    0.4
    """
    sizes = counts.sum(axis=1, keepdims=True)
    filled = counts[sizes[:, 0] > 0] / sizes[sizes[:, 0] > 0]
    if not len(filled):
        return None
    return float(0.5 * np.abs(filled - counts.sum(axis=0) / counts.sum()).sum(axis=1).mean())


def _choose_label(keys: dict[str, Any]) -> str | None:
    """Choose the first key with several values that does not just repeat the client."""
    for key, found in keys.items():
        held = [values for values in found["by_client"].values() if values]
        if len(found["values"]) > 1 and (any(len(values) > 1 for values in held) or len(found["values"]) < len(held)):
            return key
    return None


def _describe_clients(federation: federated.Federation, places: Places, image: np.ndarray) -> list[dict[str, Any]]:
    known = image >= 0
    pairs = np.unique(np.stack([places.clients[np.nonzero(known)[0]], image[known]]), axis=1)
    distinct = np.bincount(pairs[0], minlength=len(federation.clients)).tolist()
    described = []
    for client, images in zip(federation.clients, distinct, strict=True):
        rows = {split: len(client.rows_of(split)) for split in SPLITS}
        described.append({"name": client.name, "held_out": client.held_out, **rows, "images": images})
    return described


def _measure_texts(texts: Sequence[str]) -> dict[str, Any]:
    """Count texts, and their characters and words."""
    filled = [text for text in texts if text]
    measured: dict[str, Any] = {"filled": len(filled), "distinct": len(set(filled))}
    lengths = {"characters": [len(text) for text in filled], "words": [len(text.split()) for text in filled]}
    for unit in lengths if filled else ():
        values = np.asarray(lengths[unit])
        median, high = np.quantile(values, [0.5, 0.95])
        measured[unit] = {
            "least": int(values.min()),
            "median": float(median),
            "mean": round(float(values.mean()), 2),
            "p95": float(high),
            "most": int(values.max()),
        }
    return measured


def place_rows(federation: federated.Federation) -> Places:
    """Line up a federation's rows as `Federation.rows` does, each with its client and split."""
    sizes = np.asarray([[len(client.rows_of(split)) for split in SPLITS] for client in federation.clients], np.int64)
    places = np.repeat(np.arange(sizes.size), sizes.reshape(-1))
    return Places(federation.rows, places // len(SPLITS), places % len(SPLITS))


def find_overlap(things: Int[np.ndarray, "rows ..."], places: Places, names: Sequence[str]) -> dict[str, Any]:
    """Find things that are in two splits, or with two clients, given every row's, one or more, by number (-1: none).

    For two splits: the things in both (`distinct`), the `rows` of the second split about them, those of these whose
    thing is in the first split of the same client, and `examples`, a row of the first split with one of the second. For
    clients: the things with several, the `rows` about them, and the pairs that share `most`, with how many.
    """
    known = things >= 0
    owner = np.nonzero(known)[0]  # each thing's row, as a place
    numbers, rows, clients, splits = (things[known], *(part[owner] for part in places))
    count = int(numbers.max(initial=-1)) + 1
    met = np.zeros((count, len(SPLITS)), bool)
    met[numbers, splits] = True
    # Thing and client as one number, to be looked up among those of another split.
    held = numbers * len(names) + clients

    def compare(first: int, second: int) -> dict[str, Any]:
        both = met[:, first] & met[:, second]
        earlier, later = (np.flatnonzero((splits == split) & both[numbers]) for split in (first, second))
        # Backwards, so that a thing's first row is the one that stays.
        row_of = dict(zip(numbers[earlier][::-1].tolist(), rows[earlier][::-1].tolist(), strict=True))
        shown = zip(numbers[later[:NAMED]].tolist(), rows[later[:NAMED]].tolist(), strict=True)
        return {
            "distinct": int(both.sum()),
            "rows": len({*owner[later].tolist()}),
            "rows_of_the_same_client": len({*owner[later[np.isin(held[later], held[earlier])]].tolist()}),
            "examples": [[row_of[thing], row] for thing, row in shown],
        }

    holders = np.unique(np.stack([numbers, clients]), axis=1)
    shared = np.bincount(holders[0], minlength=count) > 1
    pairs = itertools.combinations(range(len(SPLITS)), 2)
    return {
        "distinct": int(met.any(axis=1).sum()),
        "between_splits": {f"{SPLITS[first]}/{SPLITS[second]}": compare(first, second) for first, second in pairs},
        "between_clients": {
            "distinct": int(shared.sum()),
            "rows": len({*owner[shared[numbers]].tolist()}),
            "most": _count_pairs(holders[:, shared[holders[0]]], names),
        },
    }


def _count_pairs(holders: Int[np.ndarray, "2 held"], names: Sequence[str]) -> list[list[Any]]:
    """Count what the pairs of clients with most in common share, out of (thing, client)."""
    from scipy.sparse import csr_array, triu

    if not holders.size:
        return []
    held = csr_array((np.ones(holders.shape[1], np.int64), holders), shape=(int(holders[0].max()) + 1, len(names)))
    common = triu(held.T @ held, k=1).tocoo()
    counts: Int[np.ndarray, " pairs"] = common.data
    most = np.lexsort((common.col, common.row, -counts))[:NAMED].tolist()
    return [[names[int(common.row[at])], names[int(common.col[at])], int(counts[at])] for at in most]
