"""A finished run that is to train longer: it becomes one of more rounds, of which those that it has are done.

What is done stays as it is. A round that is added has cohort, batches and rates as in a run that has so many rounds
from the start: whether it lies beyond `--train.decay-at` is judged by the new number, so rates that had decayed may
rise again. The best round is the best of all, old and new. So 16 rounds and then 8 more are those of a run of 24, but
for the rates of rounds that lie beyond `decay_at` of 16 and not of 24, and for round 16, which is always evaluated.
"""

import dataclasses
from pathlib import Path
from typing import Any

from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import Run, to_json
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.privacy.budget import lengthen_budget, publish_budget
from fedvlm_jax.run_dir.config_seal import check_seal, seal
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.reader import refuse_server
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.utils.files import write_json


def lengthen(folder: Path, rounds: int) -> None:
    """Have a finished run go on, when it is resumed, until it has so many rounds.

    Its results so far are kept as `results-16.json`, where it had 16 rounds. A run that has this number of rounds
    already, finished or not, stays as it is.

    Raises:
        UserError: the run is not finished or has more rounds, or something of it depends on how many there are.
    """
    refuse_server(read_config(folder), folder)  # before the folder is claimed, for it may be none
    with Claim(folder):
        stored = read_config(folder)
        run = dataclasses.replace(stored.run, train=dataclasses.replace(stored.run.train, rounds=rounds))
        if run == stored.run:
            return
        validate(run)
        if "node" in stored.content:
            raise UserError(f"--train.rounds: {folder} is a node's, and more rounds need a new deployment")
        budget = None if stored.budget is None else lengthen_budget(stored.budget, rounds)
        _check(folder, stored.run, run)
        check_seal(folder / "config.json", stored.content)
        done = stored.run.train.rounds
        # A kill between two of these steps leaves a run that goes on: with its old rounds, or with the new ones.
        (folder / "evaluation.json").unlink(missing_ok=True)  # of models that will be others
        (folder / "results.json").replace(folder / f"results-{done}.json")
        longer = [*stored.content.get("longer", []), {"from": done, "to": rounds}]
        content: dict[str, Any] = {**stored.content, "run": to_json(run), "longer": longer}
        if budget is not None:
            content["resolved"] = {**content["resolved"], "privacy": publish_budget(budget)}
        if processes.is_first():
            write_json(folder / "config.json", seal(content))


def _check(folder: Path, before: Run, after: Run) -> None:
    done, asked = before.train.rounds, after.train.rounds
    if asked < done:
        raise UserError(
            f"--train.rounds {asked}: {folder} has {format_count(done, 'round')} already; say how many "
            "there shall be in all"
        )
    if not (folder / "results.json").is_file():
        raise UserError(
            f"{folder} is not finished: its {format_count(done, 'round comes', 'rounds come')} first: "
            f"fedvlm train --resume {folder}; then it can have "
            f"--train.rounds {asked}"
        )
    start_anew = f"start a new run with --train.rounds {asked}"
    if before.train.finetune_steps:
        raise UserError(f"{folder} ended with local fine-tuning, after which no federation goes on; {start_anew}")
    if not any((folder / "checkpoints").glob(f"{done}")):
        raise UserError(f"{folder} has no checkpoint of round {done} any more, so it cannot go on; {start_anew}")
    old, new = declare(before.method, before), declare(after.method, after)
    # A method is asked rather than known by name: what of it depends on the number of rounds would change those done.
    if old.base is not None:
        raise UserError(f"{before.method} makes room for its rounds at the start, and here for {done}; {start_anew}")
    if any(old.phase(number) != new.phase(number) for number in range(1, done + 1)):
        raise UserError(
            f"what {before.method} trains in a round depends on how many there are: with {asked} the {done} that are "
            f"done would have been others; {start_anew}"
        )
