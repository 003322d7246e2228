"""A federation before any training, as JSON: how much of what each client has, and what is in two splits or clients.

Nothing here needs a model, so prompts that are too long for one are not known yet. Images are hashed and not decoded,
unless that is asked for.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.distinct import number_distinct
from fedvlm_jax.data.federated_dataset import Federation
from fedvlm_jax.data.leakage import Places, find_overlap, place_rows
from fedvlm_jax.data.partitioning.row_keys import UNKNOWN, list_keys, read_key
from fedvlm_jax.data.skipped_rows import count_reasons, describe_lost, find_pair_fault, find_text_fault, skip_rows
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import find_question_column
from fedvlm_jax.data.unique_images import unique_images

# Keys that are counted where a table has them, after the one that the partition is made by.
KEYS = ("group", "origin_dataset", "question_type", "language")

SHOWN = 20  # unusable rows that are listed


def describe(
    table: Table,
    federation: Federation,
    options: DataOptions,
    *,
    check_images: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Describe a federation, rows that will be skipped included.

    Args:
        table: of its rows.
        federation: the clients.
        options: those that made it.
        check_images: decode every image, to find those that are broken, and those with equal pixels though their bytes
            differ.
        note: called with a line before long work.

    Returns:
        As JSON. `rows`: how many the table has, clients have, and no client has. `clients`: name, held_out, rows per
        split, distinct images. `keys`: for each key the rows per value, in all and by client, and the clients'
        unlikeness; `label` is the key that says most. `texts`: lengths. `images`, `unusable`, `pairs`: counts.
        `overlap`: see `find_overlap`.
    """
    places = place_rows(federation)
    note(f"hashing the images of {len(places.rows)} rows")
    images, image, missing = unique_images(table, places.rows)
    columns = {"question": find_question_column(table, options), "chosen": "chosen", "rejected": "rejected"}
    texts = {
        name: [(text or "").strip() for text in table.read_text(column, places.rows)]
        for name, column in columns.items()
        if column in table.columns
    }
    pictures, broken = np.arange(len(images)), dict[int, str]()
    if check_images:
        note(f"decoding {len(images)} images")
        pictures, broken = images.number_pictures()
    picture = np.where(image >= 0, pictures[image], -1) if len(images) else image
    faults: dict[int, str] = {}  # place -> why the row there will be skipped, in the order of `encode`
    for place, (row, index) in enumerate(zip(places.rows.tolist(), image.tolist(), strict=True)):
        seen = missing.get(row) if index < 0 else broken.get(index)
        if reason := seen or find_text_fault(texts["question"][place], texts["chosen"][place]):
            faults[place] = reason
    unusable = federation.skipped + skip_rows(table, places.rows[list(faults)], list(faults.values()))
    keys = _count_keys(table, federation, places)
    _, asked = number_distinct(zip(texts["question"], texts["chosen"], strict=True))
    return {
        "source": options.source,
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
            "reasons": count_reasons(unusable),
            "first": [{"row": entry.row, "idx": entry.idx, "reason": entry.reason} for entry in unusable[:SHOWN]],
            "lost": describe_lost(table, unusable),
        },
        "pairs": _describe_pairs(texts["chosen"], texts.get("rejected", [])),
        "overlap": {
            "images": find_overlap(picture.astype(np.int64), places, federation.names),
            "texts": find_overlap(asked, places, federation.names),
        },
        "repeated_rows": len(asked) - len({*zip(asked.tolist(), picture.tolist(), strict=True)}),
    }


def _count_keys(table: Table, federation: Federation, places: Places) -> dict[str, Any]:
    by = (federation.description.get("partition") or {}).get("by")
    known = list_keys(table)
    found = {}
    for key in dict.fromkeys(key for key in (by, *KEYS) if key in known):
        values = [value or UNKNOWN for value in read_key(table, key, places.rows)]
        ranked = [value for value, _ in Counter(values).most_common()]
        number = {value: place for place, value in enumerate(ranked)}
        counts = np.zeros((len(federation.clients), len(ranked)), np.int64)
        np.add.at(counts, (places.clients, np.asarray([number[value] for value in values], np.int64)), 1)
        found[key] = {
            "values": dict(zip(ranked, counts.sum(axis=0).tolist(), strict=True)),
            "unlikeness": measure_unlikeness(counts),
            "by_client": {
                name: {value: count for value, count in zip(ranked, of_client, strict=True) if count}
                for name, of_client in zip(federation.names, counts.tolist(), strict=True)
            },
        }
    return found


def measure_unlikeness(counts: Int[np.ndarray, "clients values"]) -> float | None:
    """Average the total variation distance between a client's mix of values and the mix of all.

    0 where clients are alike, towards 1 where they are disjoint. Clients without rows do not count; None where none has
    rows.

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


def _describe_clients(federation: Federation, places: Places, image: np.ndarray) -> list[dict[str, Any]]:
    known = image >= 0
    pairs = np.unique(np.stack([places.clients[known], image[known]]), axis=1)
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


def _describe_pairs(chosen: list[str], rejected: list[str]) -> dict[str, Any] | None:
    """Count the rows that state a preference, and why others do not; None where there are no rejected answers."""
    if not rejected:
        return None
    faults = Counter(filter(None, map(find_pair_fault, chosen, rejected)))
    return {"rows": len(rejected) - faults.total(), "reasons": dict(faults.most_common())}
