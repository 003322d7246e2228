"""How much do messages tell of a client's rows: sharing B with a private A, sharing A, both, or B with a common A?

    python experiments/message_leakage.py            # runs what is missing, then reports; goes on where it was stopped
    python experiments/message_leakage.py --quick    # a smoke run, reported below --out

Each cell is a run on the emoji data and Florence2-nano that keeps its messages, and its audit (`fedvlm audit`): 8
clients of 20 pictures (40 rows), 8 rounds, of which four are attacked, of all clients. Two settings: `usual`, 4 local
steps of AdamW on 16 rows, in which a client's every round has most of its rows; and `few`, a local step of SGD on 2
rows, in which gradients leave almost bare. Rates are the same for all methods. Others are rows of the same client's
test split; the bare base's loss, which no message has touched, says how far these are from the members without any
attack.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import leakage_summary
import tyro
from study_summary import read_lines

from fedvlm_jax.config.audit_options import AuditOptions
from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, Run, TrainOptions
from fedvlm_jax.data.sources import emoji

RESULTS = Path(__file__).parent / "results"
Setting = Literal["usual", "few"]
VARIANTS: Mapping[str, tuple[str, Literal["common", "per-client"]]] = {
    "plora": ("plora", "common"),
    "plora, A per client": ("plora", "per-client"),
    "ffa-lora": ("ffa-lora", "common"),
    "fedsa-lora": ("fedsa-lora", "common"),
    "fedavg-lora": ("fedavg-lora", "common"),
}
"""Name -> method, and how private A's start; where A is shared, or B starts at zero, that means nothing."""
SETTINGS: Mapping[Setting, Mapping[str, Any]] = {
    "usual": {"local_steps": 4, "batch_size": 16},
    "few": {
        "local_steps": 1,
        "batch_size": 2,
        "optimizer": "sgd",
        "learning_rate_a": 0.5,
        "learning_rate_b": 0.5,
    },
}


@dataclass(frozen=True)
class Study:
    """What is run"""

    out: Path = Path("runs/message-leakage")
    """Folder of what is measured: a line per finished cell."""
    results: Path | None = None
    """Where the report goes (default: experiments/results; with --quick, into --out)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = tuple(VARIANTS)
    settings: tuple[Setting, ...] = tuple(SETTINGS)
    rounds: int = 8
    attacked: int = 4
    """Rounds that are attacked, evenly spread, the first and the last among them."""
    images: int = 20
    """Training images per client; each has two questions."""
    held_out: tuple[int, int] = (10, 60)
    """Validation and test images per client."""
    vendors: tuple[str, ...] = emoji.Options.vendors
    languages: tuple[str, ...] = ("en", "de")
    candidates: int = 60
    """Rows of a client that are attacked, of those that were trained on and of the others each."""
    quick: bool = False
    """A smoke run: two clients, two rounds, one seed."""

    def make_run(self, setting: Setting, variant: str, seed: int) -> Run:
        """Make the run of a cell, which leaves the scores of the test split alone."""
        method, start = VARIANTS[variant]
        train = TrainOptions(rounds=self.rounds, **SETTINGS[setting])
        evaluation = EvaluationOptions(
            every=self.rounds, global_model=False, examples=0, before_redistribution=False, test=False,
            metrics=("exact_match",),
        )  # fmt: skip
        data = emoji.Options(
            prompt="client-language", images_per_client=self.images, vendors=self.vendors, languages=self.languages,
            validation_per_client=self.held_out[0], test_per_client=self.held_out[1],
        )  # fmt: skip
        return Run(
            method=method, seed=seed, data=data, train=train, evaluation=evaluation, lora=LoraOptions(private_a=start),
            audit=AuditOptions(keep=True), checkpoint_every=self.rounds, out=self.out / "scratch",
        )  # fmt: skip

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Read the finished cells."""
        return read_lines(self.out / "lines.jsonl")


def list_missing(study: Study) -> Iterator[tuple[Setting, str, int]]:
    """List the cells without a line, a seed of everything before the next, so that a part of it is a study too."""
    there = {(line["setting"], line["variant"], line["seed"]) for line in study.lines}
    for seed in study.seeds:
        for setting in study.settings:
            for variant in study.variants:
                if (setting, variant, seed) not in there:
                    yield setting, variant, seed


def run_missing(study: Study) -> None:
    """Run and audit what has no line yet; a cell that was stopped begins anew."""
    from fedvlm_jax.audit.audit_run import AuditChoices, audit
    from fedvlm_jax.run_dir.reader import read_run
    from fedvlm_jax.training import federated_run
    from fedvlm_jax.training.loaded_model import load_model

    model = None
    choices = AuditChoices(study.attacked, len(study.vendors) * len(study.languages), study.candidates)
    for setting, variant, seed in list(list_missing(study)):
        run = study.make_run(setting, variant, seed)
        assert run.out is not None
        shutil.rmtree(run.out, ignore_errors=True)
        model = model or load_model(run)
        began = time.monotonic()
        federated_run.train(run, model=model)
        trained = time.monotonic()
        found = audit(run.out, choices)
        record = read_run(run.out)
        scores = record.scores("personal", split="validation")
        line = {
            "setting": setting, "variant": variant, "seed": seed, "shares": found["shares"],
            "validation": sum(scores.values()) / len(scores),
            **{part: found[part] for part in ("attribution", "reconstruction")},
            "membership": [leakage_summary.without_curve(one) for one in found["membership"]],
            "seconds": round(time.monotonic() - began, 1), "audit_seconds": round(time.monotonic() - trained, 1),
        }  # fmt: skip
        with (study.out / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        areas = {f"{one['test']} {one['knows']}".strip(): round(one["auroc"][0], 3) for one in found["membership"]}
        print(f"{setting} {variant} seed {seed}: {areas} ({line['seconds']} s)", flush=True)


def report(study: Study, words: Sequence[str]) -> None:
    """Write JSON, tables and picture, and print the tables."""
    folder = study.results or (study.out / "results" if study.quick else RESULTS)
    leakage_summary.write(study.lines, folder, study.settings, study.variants, " ".join(words))


def main() -> None:
    """Run what is missing, and report."""
    study = tyro.cli(Study, description=__doc__)
    if study.quick:
        small = {
            "seeds": (0,),
            "rounds": 2,
            "images": 6,
            "held_out": (2, 12),
            "languages": ("en",),
            "vendors": ("noto", "fluent"),
        }
        study = dataclasses.replace(study, **small)
    study.out.mkdir(parents=True, exist_ok=True)
    run_missing(study)
    report(study, ["python experiments/message_leakage.py", *(["--quick"] if study.quick else [])])


if __name__ == "__main__":
    main()
