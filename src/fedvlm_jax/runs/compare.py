"""Several methods and seeds on the same clients, cohorts and initial adapter, in one folder.

Everything that does not depend on the method (model, data, frozen features, zero-shot scores) is shared, and a method's
compiled programs serve all its seeds. A comparison that was interrupted goes on where it stopped: finished runs are
read, a half-finished one is resumed.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.runs import loop
from fedvlm_jax.runs.config import Compare, Run, from_json, to_json
from fedvlm_jax.runs.folders import RunRecord, read_run
from fedvlm_jax.runs.prepare import Session, open_session
from fedvlm_jax.runs.progress import Progress, SilentProgress
from fedvlm_jax.runs.storage import describe_environment, write_json
from fedvlm_jax.runs.validation import FINETUNED, validate_comparison

__all__ = ["compare"]


def compare(comparison: Compare, show: Progress | None = None, session: Session | None = None) -> Path:
    """Run every method with every seed; returns the folder with `comparison.json` and a folder per run.

    Raises:
        UserError: as `loop.train`, or the folder holds runs with other options.
    """
    validate_comparison(comparison)
    folder = comparison.out
    if folder is None:
        raise UserError("a comparison needs a folder: set out")
    show = show or SilentProgress()
    session = session or open_session(comparison.base, show.note)
    seeds = [comparison.base.seed + number for number in range(comparison.seeds)]
    entries: list[dict[str, Any]] = []
    zero_shot: list[dict[str, Any]] = []
    for seed in seeds:
        records = {}
        for method in comparison.methods:
            run = _make_run(comparison, method, seed, folder / "runs" / f"{method}-seed{seed}")
            records[method] = _finish(run, show, session)
            entries.append(_describe(records[method], method, seed, folder))
        zero_shot.append({"seed": seed, **records[comparison.methods[0]].results["zero_shot"]})
    content = {
        "methods": list(comparison.methods),
        "seeds": seeds,
        "command": shlex.join(["fedvlm", *sys.argv[1:]]),
        "runs": entries,
        "zero_shot": zero_shot,
        "settings": to_json(dataclasses.replace(comparison.base, out=None)),
        **describe_environment(),
    }
    write_json(folder / "comparison.json", content)
    return folder


def _make_run(comparison: Compare, method: str, seed: int, out: Path) -> Run:
    base = comparison.base
    steps = comparison.finetune_steps if method.endswith(FINETUNED) else 0
    train = dataclasses.replace(base.train, finetune_steps=steps)
    return dataclasses.replace(base, method=method.removesuffix(FINETUNED), seed=seed, train=train, out=out)


def _finish(run: Run, show: Progress, session: Session) -> RunRecord:
    """Read the run if it is finished, go on with it if it was begun, else run it."""
    assert run.out is not None
    config = run.out / "config.json"
    if not config.exists():
        loop.train(run, show, session)
        return read_run(run.out)
    begun = from_json(json.loads(config.read_text(encoding="utf-8"))["run"])
    if dataclasses.replace(begun, out=run.out) != run:
        raise UserError(f"{run.out} was made with other options: choose another --out, or repeat the first command")
    loop.resume(run.out, show, session)
    return read_run(run.out)


def _describe(record: RunRecord, method: str, seed: int, folder: Path) -> dict[str, Any]:
    first = record.rounds[0]
    return {
        "method": method,
        "seed": seed,
        "folder": str(record.folder.relative_to(folder)),
        **record.results["personal"],
        "selected_round": record.results["selected_round"],
        "seconds": sum(line["seconds"] for line in record.rounds),
        "bytes_up_per_client": first["bytes_up_per_client"],
        "bytes_down_per_client": first["bytes_down_per_client"],
    }
