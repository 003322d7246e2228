"""Reading the folders that runs and comparisons leave: plain JSON in, records out, without jax or a model.

A run's folder has `config.json` (options, versions, commit, what was resolved), `metrics.jsonl` (one line per round)
and, once finished, `results.json`. A comparison's folder has `comparison.json`, which names the folders of its runs.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir import absolute_paths, config_seal, validated_files
from fedvlm_jax.utils.untrusted_text import clean, cut

LISTED, LONG = 12, 60
"""Clients that a message lists, and characters of a name."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run, as its folder has it."""

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the run, nested as in `Run`."""
        return self.config["run"]

    @property
    def method(self) -> str:
        """The method's name, with "+ft" where local fine-tuning followed and "+knn" where neighbours are mixed in.

        >>> RunRecord(Path("run"), {"run": {"method": "plora", "train": {"finetune_steps": 5}}}, [], {}).method
        'plora+ft'
        """
        # Folders of version 0.1 have no such options.
        finetuned = "+ft" if self.options.get("train", {}).get("finetune_steps", 0) > 0 else ""
        remembers = "+knn" if self.options.get("evaluation", {}).get("neighbours", 0) > 0 else ""
        return f"{self.options['method']}{finetuned}{remembers}"

    @property
    def attackers(self) -> list[str]:
        """The clients that were hostile, or would have been: no score is theirs."""
        return (self.config.get("resolved") or {}).get("attackers") or []

    @property
    def answer_distances(self) -> dict[str, float]:
        """How unlike the others' each client's answers are, where the run says so."""
        return (self.config.get("resolved") or {}).get("answer_distances") or {}

    @property
    def pool(self) -> str:
        """The rule that made one update of a round's."""
        return (self.options.get("messages") or {}).get("pool", "mean")

    @property
    def metric(self) -> str:
        """The metric by which the run chose its models, which is the one it is judged by."""
        return self.results.get("selected_by", "exact_match")

    def scores(self, model: str, metric: str | None = None, split: str = "test") -> dict[str, float]:
        """Give a metric of a model by client; clients without examples are left out.

        Args:
            model: "zero_shot", "personal" or "global"; of clients that never trained "held_out/zero_shot" or
                "held_out/personal".
            metric: the one the run is judged by, unless it is named.
            split: "validation" or "test".
        """
        found: Any = self.results
        for part in (*model.split("/"), split, metric or self.metric):
            found = (found or {}).get(part)
        return drop_missing(found or {})

    def metrics(self, model: str = "personal", split: str = "test") -> tuple[str, ...]:
        """Name the metrics that there are."""
        return tuple(name for name, values in (self.results[model].get(split) or {}).items() if drop_missing(values))


@dataclass(frozen=True)
class ComparisonRecord:
    """A finished comparison, as its folder has it."""

    folder: Path
    methods: list[str]
    seeds: list[int]
    command: str
    runs: list[dict[str, Any]]
    zero_shot: list[dict[str, Any]]
    settings: dict[str, Any]
    metric: str = "exact_match"

    def scores(self, method: str, metric: str | None = None, split: str = "test") -> dict[int, dict[str, float]]:
        """Give a metric of a method (or "zero-shot") by seed and client; the one it is judged by, unless named."""
        entries = self.zero_shot if method == "zero-shot" else [run for run in self.runs if run["method"] == method]
        name = metric or self.metric
        by_seed = {entry["seed"]: drop_missing((entry.get(split) or {}).get(name) or {}) for entry in entries}
        return {seed: scores for seed, scores in sorted(by_seed.items()) if scores}

    def folder_of(self, run: Mapping[str, Any]) -> Path:
        """Find the folder of one of its runs, which lies inside the comparison's unless it was given elsewhere."""
        inside = self.folder / run["folder"]
        return inside if inside.is_dir() else Path(run["folder"])


def drop_missing(scores: Mapping[str, float | None]) -> dict[str, float]:
    """Leave out clients without examples, whose score is `null` or NaN.

    >>> drop_missing({"ann": 0.5, "bob": None})
    {'ann': 0.5}
    """
    return {client: float(score) for client, score in scores.items() if score is not None and not math.isnan(score)}


def is_comparison(folder: Path) -> bool:
    """Tell a comparison's folder from a run's."""
    return (folder / "comparison.json").is_file()


def read_run(folder: Path) -> RunRecord:
    """Read a finished run.

    Raises:
        UserError: the folder is no run's, the run is not finished, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there, so it is not the folder of a run")
    config = validated_files.read_json(folder / "config.json", validated_files.ORIGIN)
    if not (folder / "results.json").is_file():
        again = f"fedvlm train --resume {folder}" if not find_deployment(config) else "flwr run, given again"
        raise UserError(f"{folder}: this run is not finished; go on with: {again}")
    if config_seal.SEAL in config:
        config_seal.check_seal(folder / "config.json", config)
    return RunRecord(folder, config, read_metrics(folder), validated_files.read_results(folder / "results.json"))


def read_finished(folder: Path) -> validated_files.StoredConfig:
    """Read what a finished run says of itself; its model and data are where they were, and nothing is loaded.

    Raises:
        UserError: the folder is no run's, the run is not finished, its config was edited, or what it was made of has
            gone.
    """
    stored = validated_files.read_config(folder)
    refuse_server(stored, folder)
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder}: this run is not finished; go on with: fedvlm train --resume {folder}")
    config_seal.check_seal(folder / "config.json", stored.content)
    absolute_paths.find_places(folder, stored.run)
    return stored


def refuse_server(stored: validated_files.StoredConfig, folder: Path) -> None:
    """Refuse the folder of a deployment's server to what needs rows or clients' models, which are at the nodes.

    Raises:
        UserError: it is such a folder.
    """
    if find_deployment(stored.content):
        raise UserError(
            f"{folder} is that of a deployment's server, which has no rows and no client's model: say the folder `run` "
            "of a node, on its machine. `fedvlm report` works here, and what is unfinished goes on with `flwr run`"
        )


def find_deployment(config: Mapping[str, Any]) -> str:
    """Return what the `config.json` of a deployment's server says of its nodes; nothing where it is another run's.

    >>> find_deployment({"federation": {"deployment": "3 nodes"}}), find_deployment({"federation": {"kind": "iid"}})
    ('3 nodes', '')
    """
    federation = config.get("federation")
    return str(federation.get("deployment", "")) if isinstance(federation, Mapping) else ""


def find_client(name: str | None, clients: Sequence[str]) -> str:
    """Return the name of one of a run's clients; where there is only one it need not be named.

    Raises:
        UserError: there is no such client, or none is named; with those that it may have meant.

    >>> find_client("noto_de", ["noto-de", "noto-en"])
    Traceback (most recent call last):
    fedvlm_jax.errors.UserError: there is no client 'noto_de'; did you mean noto-de or noto-en?
    """
    if name is None and len(clients) == 1:
        return clients[0]
    if name in clients:
        return str(name)
    shown = [cut(clean(each), LONG) for each in clients[:LISTED]]  # strangers', who may write lines into a message
    listed = ", ".join(shown) + (f" and {len(clients) - LISTED} more" if len(clients) > LISTED else "")
    if name is None:
        raise UserError(f"say whose model: --client NAME; the run's clients are {listed}")
    if close := difflib.get_close_matches(name, clients, n=3):
        meant = " or ".join(cut(clean(each), LONG) for each in close)
        raise UserError(f"there is no client {cut(repr(name), LONG)}; did you mean {meant}?")
    raise UserError(f"there is no client {cut(repr(name), LONG)}; the run's are {listed}")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; where a killed and resumed run wrote a round twice, the later line holds.

    Raises:
        UserError: a line is not that of a round. One that a kill cut short is left out.
    """
    path = folder / "metrics.jsonl"
    texts = validated_files.read_text(path).split("\n") if path.is_file() else [""]
    try:
        json.loads(texts[-1])
    except (ValueError, RecursionError):  # nothing, after the end of the last line, or what a kill left of a line
        texts.pop()
    lines: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(texts, start=1):
        line = validated_files.parse_line(path, text, f", line {number}")
        lines[line["round"]] = line  # a killed run wrote rounds that the resumed one wrote again
    return [lines[number] for number in sorted(lines)]


def read_comparison(folder: Path) -> ComparisonRecord:
    """Read a finished comparison.

    Raises:
        UserError: the folder is no comparison's, or its file is damaged.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        raise UserError(f"{folder}: no comparison.json there, so it is not the folder of a finished comparison")
    stored = validated_files.read_json(path, validated_files.COMPARISON)
    return ComparisonRecord(
        folder,
        methods=stored["methods"],
        seeds=stored["seeds"],
        command=stored.get("command", ""),
        runs=stored["runs"],
        zero_shot=stored["zero_shot"],
        settings=stored.get("settings") or {},
        metric=stored.get("selected_by", "exact_match"),
    )
