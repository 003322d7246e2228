"""Fingerprints of what a run was made of: digests of its data, its clients and its base, kept in `config.json`.

They are compared when a run is resumed or evaluated again: other data or another base under the same name would go
unnoticed otherwise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.config.start_folder import digest_start
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.config import SPLITS
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.folder_files import find_files
from fedvlm_jax.run_dir.artifacts import describe_versions
from fedvlm_jax.utils import digests


def describe_model(folder: Path) -> dict[str, Any]:
    """Digest the weights of a base and all files in its folder that decide how it is used.

    Raises:
        UserError: a file cannot be read.
    """
    # Configuration, tokenizer and processor. An index only lists in which file each weight is.
    paths = sorted(path for pattern in ("*.json", "*.txt", "*.model") for path in folder.glob(pattern))
    read = [path for path in paths if path.is_file() and not path.name.endswith(".index.json")]
    return {
        "weights": digests.digest_files(find_files(folder)),
        "model_files": {path.name: digests.digest_file(path) for path in read},
    }


def describe_clients(examples: Examples) -> dict[str, str]:
    """Digest each client's rows, in their order and by split: pictures, tokens and answers, as they are used."""
    rows = np.empty((len(examples), digests.DIGEST_SIZE), np.uint8)
    keys = [key.encode() for key in examples.views.keys]
    rejected = examples.rejected_answers or [""] * len(examples)
    labels = [each for each in (examples.labels, examples.rejected) if each is not None]
    for row in range(len(examples)):
        texts = [text.encode("utf-8", "surrogatepass") for text in (examples.answers[row], rejected[row])]
        # Without their padding: how wide tokens are padded does not count.
        tokens = [examples.input_ids[row][examples.attention_mask[row] > 0]]
        tokens += [each[row][each[row] != IGNORED] for each in labels]
        first, *others = (keys[index] for index in examples.pictures[row].tolist() if index >= 0)
        parts = [first, *texts, *tokens, *others]
        rows[row] = np.frombuffer(digests.digest_parts(parts, *map(len, parts)), np.uint8)
    return {
        client.name: digests.digest_parts(
            [rows[client.rows_of(split)] for split in SPLITS],
            client.held_out,
            *(len(client.rows_of(split)) for split in SPLITS),
        ).hex()
        for client in examples.clients
    }


def compare_sources(folder: Path, run: Run, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse files that are not those which the run in a folder began with.

    Raises:
        UserError: each that differs, a line for each.
    """
    _refuse(folder, list_other_sources(run, stored, now))


def list_other_sources(run: Run, stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in a line each what of data, weights and the model's files is another than it was."""
    lines = list[str]()
    if stored["data"] != now["data"]:
        lines.append(f"the data, {getattr(run.data, 'path', None) or run.data.source}, have another content")
    if stored["weights"] != now["weights"]:
        lines.append(f"the weights of the model {run.model} are others")
    files = _list_differences(stored["model_files"], now["model_files"], "has another content")
    return [*lines, *(f"{name} of the model {run.model} {what}" for name, what in files)]


def describe_given(run: Run) -> dict[str, str]:
    """Digest what a run was given beside data and model: a PEFT folder to start with, a file of rewards.

    Raises:
        UserError: a file cannot be read.

    >>> describe_given(Run())
    {}
    """
    rewards = run.preference.reward_file
    found = {} if run.start is None else {"start": digest_start(run.start)}
    return found if rewards is None else {**found, "rewards": digests.digest_file(rewards)}


def compare_given(folder: Path, run: Run, stored: Mapping[str, Any]) -> None:
    """Refuse what a run was given beside data and model, where it is not what the run in a folder began with.

    Raises:
        UserError: it is gone, or has another content.
    """
    names = {"start": f"the adapter to start with, {run.start},"}
    names |= {"rewards": f"the file of rewards, {run.preference.reward_file},"}
    now = describe_given(run)
    _refuse(folder, [f"{names[key]} is gone or has another content" for key in now if now[key] != stored.get(key)])


def compare_clients(folder: Path, stored: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse clients that are not those which the run in a folder began with.

    Raises:
        UserError: each that differs, a line for each.

    >>> compare_clients(Path("run"), {"ann": "0f"}, {"ann": "1e"})
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: run was not made of what is there now, so its numbers would be those of neither:
      the client ann has other rows
    Put back what was there, or start a new run.
    """
    lines = [f"the client {name} {what}" for name, what in _list_differences(stored, now, "has other rows")]
    if not lines and list(stored) != list(now):  # states and random draws go by their numbers
        lines = ["the clients are in another order"]
    _refuse(folder, lines)


def tell_versions(stored: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Note the versions that are not those that the run began with."""
    now = describe_versions()
    changed = [f"{name} {stored[name]} is now {now.get(name)}" for name in stored if stored[name] != now.get(name)]
    if changed:
        note(
            f"not all versions are those that the run began with ({', '.join(changed)}): what is computed from here on "
            "agrees to rounding, and equal bits are not promised"
        )


def _list_differences(then: Mapping[str, str], now: Mapping[str, str], other: str) -> list[tuple[str, str]]:
    """List names and how each differs; of many the first five."""
    found = [(name, "is gone") for name in then if name not in now]
    found += [(name, "is new") for name in now if name not in then]
    found += [(name, other) for name in then if name in now and then[name] != now[name]]
    return found[:5] + ([(f"and {len(found) - 5} more", "differ")] if len(found) > 5 else [])


def _refuse(folder: Path, lines: list[str]) -> None:
    if lines:
        raise UserError(
            f"{folder} was not made of what is there now, so its numbers would be those of neither:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nPut back what was there, or start a new run."
        )
