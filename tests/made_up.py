"""Folders of runs and comparisons that never ran, with numbers that the tests know."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvlm_jax.config.run_options import Run, to_json

VENDORS, LANGUAGES = ("noto", "twemoji", "fluent", "emojione"), ("en", "de", "fr", "es")
CLIENTS = tuple(f"{vendor}-{language}" for vendor in VENDORS for language in LANGUAGES)

Scores = Mapping[str, float | None]


def write_run(
    folder: Path, zero_shot: Scores, personal: Scores, run: Run | None = None, curve: Sequence[float] = (0.2, 0.3, 0.4)
) -> Path:
    """Write a finished run whose validation accuracy takes the course of `curve`, evaluated every second round."""
    folder.mkdir(parents=True)
    config = {
        "run": to_json(run or Run()),
        "versions": {"jax": "0.10.2", "fedvlm-jax": "0.1.0"},
        "commit": "abc1234",
        "started": "2026-11-28T23:10:00+00:00",
        "command": "fedvlm train --seed 3",
        "devices": ["2 × TPU v5e"],
        "machine": {"platform": "Linux", "cores": 2},
        "examples": {"train": 1960, "validation": 320, "test": 640},
        "resolved": {"wave": 16, "mesh": {"clients": 1}, "clients": list(personal)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for number in range(1, 2 * len(curve) + 1):
        accuracy = curve[(number - 1) // 2]
        seen = {
            "exact_match": accuracy,
            "loss": 1.0,
            "before_redistribution": {"exact_match": accuracy - 0.02},
            "after_redistribution": {"exact_match": accuracy},
        }
        lines.append(
            {
                "round": number,
                "loss": 3.0 / number,
                "aggregation_error": 0.01 * number,
                "aggregation_error/encoder": 0.02 * number,
                "aggregation_error/decoder": 0.005 * number,
                "angle_a": 10.0 * number,
                "update_dissimilarity": 0.1 * number,
                "bytes_up_per_client": 0 if run and run.method == "local" else 180_000,
                "bytes_down_per_client": 0 if run and run.method == "local" else 180_000,
                "seconds": 1.5,
                "clients_per_second": 10.0,
                "validation": seen if number % 2 == 0 else None,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "selected_round": 2 * len(curve),
        "zero_shot": {"validation": {"exact_match": dict(zero_shot)}, "test": score_like(zero_shot)},
        "personal": {"validation": {"exact_match": dict(personal)}, "test": score_like(personal)},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


METHODS = ("local", "fedavg-lora", "fedavg-lora+ft", "plora", *(f"method-number-{number}" for number in range(21)))
"""As many methods as there are, some with long names."""


def write_many(folder: Path, seeds: int = 3) -> Path:
    """Write a comparison of 25 methods and 16 clients, of which many come to nearly the same."""
    own = {client: 0.5 + 0.02 * number for number, client in enumerate(CLIENTS)}
    scores = {
        method: {
            seed: {client: score + 0.004 * (number % 13) + 0.003 * ((7 * seed + place) % 5)
                   for place, (client, score) in enumerate(own.items())}
            for seed in range(seeds)
        }
        for number, method in enumerate(METHODS)
    }  # fmt: skip
    return write_comparison(folder, scores, {seed: dict.fromkeys(CLIENTS, 0.1) for seed in range(seeds)})


def score_like(scores: Scores) -> dict[str, Any]:
    """Give exact match with a token accuracy and a loss beside it."""
    other = {client: None if score is None else 0.5 for client, score in scores.items()}
    return {"exact_match": dict(scores), "token_accuracy": other, "loss": other}


def write_comparison(folder: Path, scores: Mapping[str, Mapping[int, Scores]], zero_shot: Mapping[int, Scores]) -> Path:
    """Write a comparison of methods -> seed -> client -> test exact match, with the folders of its runs."""
    folder.mkdir(parents=True)
    runs = []
    for method, by_seed in scores.items():
        for seed, by_client in by_seed.items():
            inside = f"{method}-{seed}"
            mean = sum(score or 0 for score in by_client.values()) / len(by_client)
            run = Run(method=method.removesuffix("+ft"), seed=seed)
            write_run(folder / inside, zero_shot[seed], by_client, run, [mean * part for part in (0.5, 0.8, 0.9, 1.0)])
            sent = 0 if method == "local" else 180_000
            test = {"exact_match": dict(by_client)}
            runs.append(
                {"method": method, "seed": seed, "folder": inside, "test": test, "validation": test, "seconds": 30.0}
                | {"bytes_up_per_client": sent}
            )
    stored = {
        "methods": list(scores),
        "seeds": sorted(zero_shot),
        "command": "fedvlm compare --seeds 2 --data.prompt client-language",
        "runs": runs,
        "zero_shot": [{"seed": seed, "test": {"exact_match": dict(one)}} for seed, one in zero_shot.items()],
        "settings": {"finetune_steps": 20},
    }
    (folder / "comparison.json").write_text(json.dumps(stored))
    return folder
