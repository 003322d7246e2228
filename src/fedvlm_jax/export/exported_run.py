"""A finished run with its base and its adapters, as they are exported."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import Params, Vlm, load_weights, read_vlm, resolve_folder
from fedvlm_jax.run_dir import fingerprints
from fedvlm_jax.run_dir.artifacts import BASE, describe_versions, load_base, open_adapters, open_global
from fedvlm_jax.run_dir.config_seal import check_seal
from fedvlm_jax.run_dir.reader import RunRecord, find_client, read_run, refuse_server
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training.round_setup import deal_ranks

SPLITS = ("validation", "test")

ALL = "all"
"""In the place of clients' names: everybody."""


@dataclass(frozen=True, eq=False)
class ExportedRun:
    """A finished run.

    Attributes:
        record: its folder, as it was read.
        run: its options.
        vlm: the base.
        model: the base's folder.
        weights: digest of the base's weights.
        note: is told what is done.
        clients: their names.
        adapter: name -> the client's adapter, on the host.
        general: the adapter of the shared part and the initial private one; None where the run stored none.
    """

    record: RunRecord
    run: Run
    vlm: Vlm
    model: Path
    weights: str
    note: Callable[[str], None]
    clients: tuple[str, ...]
    adapter: Callable[[str], PyTree]
    general: PyTree | None

    @cached_property
    def params(self) -> Params:
        """Load the base's weights, with what the method added to them."""
        self.note(f"loading {self.run.model}")
        return load_base(self.record.folder / "adapters", load_weights(self.vlm, self.model))

    @property
    def moves_base(self) -> bool:
        """Say whether the method added something to the base."""
        return (self.record.folder / "adapters" / BASE).is_file()

    @property
    def base(self) -> str:
        """Name the base for others: its hub id, or the folder where it lies."""
        return find_hub_id(self.run.model) or str(self.model.absolute())

    @property
    def begins_alike(self) -> bool:
        """Say whether all clients began with one adapter, of one rank."""
        return self.run.lora.private_a == "common" and not self.run.lora.ranks

    @property
    def first(self) -> str:
        """Name the client that begins with the largest rank, the first of several."""
        return self.clients[_find_first(self.run, self.clients)]

    def scores(self, model: str, client: str) -> dict[str, dict[str, float]]:
        """Return split -> metric -> the client's score with a model, `personal`, `global` or `zero_shot`."""
        found = dict[str, dict[str, float]]()
        for split in SPLITS:
            for prefix in ("", "held_out/"):
                by_metric = self.record.results.get("held_out") or {} if prefix else self.record.results
                metrics = (by_metric.get(model) or {}).get(split) or {}
                values = {name: self.record.scores(prefix + model, name, split).get(client) for name in metrics}
                found.setdefault(split, {}).update({name: value for name, value in values.items() if value is not None})
        return {split: values for split, values in found.items() if values}

    def describe(self) -> dict[str, Any]:
        """Describe the run and its base, for a manifest."""
        versions = describe_versions()
        return {
            "method": self.record.method,
            "round": self.record.results.get("selected_round"),
            "metric": self.record.metric,
            **({} if self.run.privacy.on else {"seed": self.run.seed}),  # from which noise may come
            "base": {"name": _hide_place(self.run.model), "weights": self.weights, "moved": self.moves_base},
            "data": _hide_place(self.run.data.source),
            "module_names": f"transformers {versions['transformers']}",
            "versions": versions,
        }


def open_run(folder: Path, note: Callable[[str], None] = lambda text: None) -> ExportedRun:
    """Open a finished run for export.

    Raises:
        UserError: it is not finished, a file is missing or damaged, its base is no longer what it was, or what its
            clients use is no adapter alone.
    """
    record = read_run(folder)
    stored = read_config(folder)
    refuse_server(stored, folder)
    check_seal(folder / "config.json", stored.content)
    run = dataclasses.replace(stored.run, out=folder)
    if run.evaluation.neighbours:
        raise UserError(
            f"{folder} is a run of {record.method}: its clients' models ask what they remember of their own training "
            "answers as well, which no file holds. `fedvlm evaluate` uses them; for adapters alone train without "
            "--evaluation.neighbours"
        )
    clients = stored.clients
    adapter = open_adapters(folder / "adapters", clients)
    if Path(run.model).is_absolute() and not Path(run.model).is_dir():
        raise UserError(
            f"{run.model}, the base of the run in {folder}, is not there; if it has moved, say so: fedvlm train "
            f"--resume {folder} --model PLACE"
        )
    model = resolve_folder(run.model)
    digests, then = fingerprints.describe_model(model), stored.content.get("fingerprint") or {}
    fingerprints.compare_sources(folder, run, then, {**digests, "data": then.get("data")})
    vlm = read_vlm(model)
    numbers = {name: number for number, name in enumerate(clients)}
    return ExportedRun(
        record=record,
        run=run,
        vlm=vlm,
        model=model,
        weights=digests["weights"],
        note=note,
        clients=clients,
        adapter=lambda name: jax.tree.map(lambda leaf: leaf[0], adapter(np.asarray([numbers[name]]))),
        general=_read_general(folder / "adapters", run, clients),
    )


def find_hub_id(model: str) -> str:
    """Return a model's hub id; nothing for one that lies on this machine.

    >>> find_hub_id("owner/name"), find_hub_id("florence2-nano")
    ('owner/name', '')
    """
    return model if model.count("/") == 1 and not Path(model).is_absolute() and not Path(model).is_dir() else ""


def _hide_place(source: str) -> str:
    """Leave of a path its last part: where somebody keeps models and data is nobody else's to know."""
    return Path(source).name if Path(source).is_absolute() else source


def _read_general(folder: Path, run: Run, clients: Sequence[str]) -> PyTree | None:
    """Read the global model as a client of the largest rank would begin with it."""
    read = open_global(folder, clients)
    return None if read is None else jax.tree.map(lambda leaf: leaf[0], read(np.asarray([_find_first(run, clients)])))


def _find_first(run: Run, clients: Sequence[str]) -> int:
    ranks = deal_ranks(run.lora.ranks, len(clients))
    return max(range(len(clients)), key=lambda number: ranks[number] if ranks else 0)


def choose_clients(run: ExportedRun, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the clients that are asked for, all of them by default and for "all".

    Raises:
        UserError: the run has no client of such a name.
    """
    if tuple(asked) in ((), (ALL,)):
        return run.clients
    return tuple(dict.fromkeys(find_client(name, run.clients) for name in asked))
