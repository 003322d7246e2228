"""The report of `fedvlm data`: a federation before any training, as `data.json`, a figure, tables and warnings."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.dataset_summary import describe
from fedvlm_jax.data.federated_dataset import federate
from fedvlm_jax.data.sources.registry import read_table
from fedvlm_jax.errors import format_count
from fedvlm_jax.reporting.figures.data_figures import draw_data
from fedvlm_jax.reporting.figures.theme import save_png
from fedvlm_jax.reporting.tables import Table, keep_ends
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.serialization import encode
from fedvlm_jax.utils.untrusted_text import clean

MISSING = frozenset({"nan", "none", "null", "<na>", "n/a", "nat"})  # missing values, once they were turned into text
LISTED = 12  # values of a key, and reasons, that a table shows


def describe_data(
    options: DataOptions,
    seed: int,
    out: Path,
    *,
    check_images: bool = False,
    model: str | None = None,
    image_size: int | None = None,
    image_tiles: int | None = None,
    image_pixels: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make the federation that a run with these options and this seed would have, and describe it.

    With a `model` its tokens are counted too, in `tokens`; see `analysis.token_lengths`.

    Returns:
        The content of `out`/data.json, beside which `data.png` lies: the seed, the options, and what
        `data.dataset_summary.describe` found.

    Raises:
        UserError: the data cannot be read, or make no federation; or the model cannot.
    """
    opened = None
    if model is not None:  # quick to fail
        from fedvlm_jax.models import open_model  # late: it imports jax

        opened = open_model(model, image_size=image_size, image_tiles=image_tiles, image_pixels=image_pixels)
    note(f"reading {options.source}")
    table = read_table(options)
    note(f"giving {format_count(len(table), 'row')} to clients")
    federation = federate(table, options, seed)
    found = describe(table, federation, options, check_images=check_images, note=note)
    description = {"seed": seed, "options": encode(options), **found}
    if opened is not None:
        from fedvlm_jax.analysis.token_lengths import describe_lengths

        note(f"counting the tokens of {model}")
        description["tokens"] = {"model": model, **describe_lengths(table, federation, options, *opened)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "data.json", description)
    save_png(draw_data(description), out / "data.png")
    return description


def find_leaks(description: Mapping[str, Any]) -> list[str]:
    """Describe which images are in two splits; nothing where none is."""
    sentences = []
    for line, found in description["overlap"]["images"]["between_splits"].items():
        if found["distinct"]:
            first, second = line.split("/")
            row, other = found["examples"][0]
            sentences.append(
                f"LEAK: {format_count(found['distinct'], 'image is', 'images are')} in {first} and in {second}, on "
                f"{format_count(found['rows'], 'row', 'rows')} of {second} "
                f"({found['rows_of_the_same_client']:,} of them the "
                f"same client's). Row {other}, for example, shows what row {row} shows."
            )
    return sentences


def word_findings(description: Mapping[str, Any]) -> list[str]:
    """Describe where a run would fail, and what its scores would hide; nothing where all is well."""
    findings = []
    tokens = description.get("tokens")
    unusable = description["unusable"]["rows"] if tokens is None else sum(tokens["left_out"].values())
    total = description["rows"]["in_use"] + description["rows"]["without_client"]
    allowed = description["options"]["max_bad_share"]
    if unusable > allowed * total:
        findings.append(
            f"{unusable:,} of {format_count(total, 'row')} cannot be used, more than --data.max-bad-share "
            f"{allowed:g} allows: "
            "training would refuse them."
        )
    clients = description["clients"]
    for split, meaning in (("train", "nothing to train on"), ("test", "nothing to be tested on")):
        # Clients that are held out never train.
        needing = [client for client in clients if split == "test" or not client["held_out"]]
        lacking = [client["name"] for client in needing if not client[split]]
        if lacking:
            names = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
            findings.append(f"{format_count(len(lacking), 'client has', 'clients have')} {meaning}: {names}.")
    names = [client["name"] for client in clients]
    missing = [name for name in names if name.casefold() in MISSING]
    if missing:
        findings.append(f"A client is called {missing[0]!r}, as missing values are that were turned into text.")
    alike = defaultdict[str, list[str]](list)
    for name in names:
        alike[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    if twins := [group for group in alike.values() if len(group) > 1]:
        findings.append(
            f"{format_count(len(twins), 'name is', 'names are')} written in more than one way, and counts "
            "as many clients: "
            f"{twins[0][0]!r} and {twins[0][1]!r}, for example."
        )
    shared = description["overlap"]["images"]["between_clients"]
    if shared["distinct"]:
        first, second, count = shared["most"][0]
        findings.append(
            f"{format_count(shared['distinct'], 'image is', 'images are')} with two or more clients, on "
            f"{format_count(shared['rows'], 'row')}; {first} and {second} have most in common ({count:,})."
        )
    return findings


def tabulate_data(description: Mapping[str, Any]) -> list[Table]:
    """Tabulate a description: clients, values of keys, texts, rows left out, overlaps."""
    tables = [
        _tabulate_clients(description),
        *(_tabulate_key(key, found) for key, found in description["keys"].items()),
        _tabulate_texts(description),
        *([_tabulate_tokens(description["tokens"])] if "tokens" in description else []),
        _tabulate_left_out(description),
        _tabulate_overlap(description),
    ]
    return [table for table in tables if table.rows]


def _tabulate_clients(description: Mapping[str, Any]) -> Table:
    clients = sorted(description["clients"], key=lambda client: -sum(client[split] for split in SPLITS))
    columns = ("client", *SPLITS, "images")
    rows = [
        (client["name"] + (" (held out)" if client["held_out"] else ""), *(f"{client[name]:,}" for name in columns[1:]))
        for client in clients
    ]
    shown, note = keep_ends(rows, "largest and the smallest")
    images = f"{description['images']['distinct']:,}"
    sums = ("all", *(f"{sum(client[split] for client in clients):,}" for split in SPLITS), images)
    title = f"{description['source']}, seed {description['seed']}: {format_count(len(clients), 'client', 'clients')}"
    return Table(title, columns, (*shown, sums), frozenset({len(shown)}), note)


def _tabulate_key(key: str, found: Mapping[str, Any]) -> Table:
    values, clients = found["values"], found["by_client"].values()
    total = sum(values.values())
    rows = [
        (value, f"{count:,}", f"{100 * count / total:.1f} %", str(sum(value in counts for counts in clients)))
        for value, count in list(values.items())[:LISTED]
    ]
    if len(values) > LISTED:
        rest = sum(list(values.values())[LISTED:])
        rows.append((f"{len(values) - LISTED} others", f"{rest:,}", f"{100 * rest / total:.1f} %", ""))
    note = (
        f"A client's mix is {100 * found['unlikeness']:.0f} % away from that of all clients, on average (total "
        "variation distance: 0 % alike, 100 % nothing in common)."
    )
    return Table(key, ("value", "rows", "share", "clients"), tuple(rows), note=note)


def _tabulate_texts(description: Mapping[str, Any]) -> Table:
    rows = []
    for name, found in description["texts"].items():
        words, characters = found.get("words"), found.get("characters")
        lengths = (words["median"], words["p95"], words["most"], characters["most"]) if words else ()
        shown = tuple(f"{length:,.0f}" for length in lengths) or ("–",) * 4
        rows.append((name, f"{found['filled']:,}", f"{found['distinct']:,}", *shown))
    columns = ("text", "rows", "distinct", "median words", "95 % have at most", "longest", "in characters")
    pairs = description["pairs"]
    note = ""
    if pairs is not None:
        why = "".join(f"; {count:,} × {reason}" for reason, count in pairs["reasons"].items())
        note = f"{format_count(pairs['rows'], 'row states', 'rows state')} a preference{why}."
    return Table("Texts", columns, tuple(rows), note=note)


def _tabulate_tokens(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (name, *(f"{found[name][length]:,.0f}" for length in ("median", "p95", "most", "limit")))
        for name in ("prompt", "answer")
    )
    pictures, each, most = (found[name] for name in ("most_pictures", "image_tokens", "most_image_tokens"))
    note = f"Of a prompt {most:,} tokens are the picture's."
    if found["own_grids"]:
        note = f"Of a prompt up to {most:,} tokens are pictures', of each up to {each:,}."
    elif pictures > 1:
        note = f"A prompt has up to {pictures} pictures and tiles of {format_count(each, 'token')} each."
    if found["cut"]:
        note += f" {format_count(found['cut'], 'answer is longer and is', 'answers are longer and are')} cut."
    if found["left_out"]:
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in found["left_out"].items())
        note += f" Left out: {reasons}."
    columns = ("tokens", "median", "95 % have at most", "longest", "most there may be")
    return Table(f"Tokens of {clean(found['model'])}", columns, rows, note=note)


def _tabulate_left_out(description: Mapping[str, Any]) -> Table:
    unusable = description["unusable"]
    rows = tuple((reason, f"{count:,}") for reason, count in list(unusable["reasons"].items())[:LISTED])
    more = list[str]()
    if "tokens" not in description:
        more = ["prompts that are too long for the model, which --model counts"]
        more += [] if description["images"]["decoded"] else ["broken images, which --check-images looks for"]
    note = f"{unusable['lost']}On top come {', and '.join(more)}." if more else unusable["lost"]
    return Table("Rows that will be left out", ("reason", "rows"), rows, note=note)


def _tabulate_overlap(description: Mapping[str, Any]) -> Table:
    kinds = (description["overlap"]["images"], description["overlap"]["texts"])
    lines = kinds[0]["between_splits"]
    places = {line.replace("/", " and "): [kind["between_splits"][line] for kind in kinds] for line in lines}
    places["two or more clients"] = [kind["between_clients"] for kind in kinds]
    rows = tuple(
        (place, *(f"{kind[name]:,}" for kind in found for name in ("distinct", "rows")))
        for place, found in places.items()
    )
    alike = "pixels" if description["images"]["decoded"] else "bytes (by pixels with --check-images)"
    note = f"The same image: the same {alike}. A question with its answer may well recur."
    if description["repeated_rows"]:
        repeated = format_count(description["repeated_rows"], "row repeats", "rows repeat")
        note += f" {repeated} another: image, question and answer."
    columns = ("in both", "images", "rows", "questions with answer", "rows ")
    return Table("What is in two places", columns, rows, note=note)
