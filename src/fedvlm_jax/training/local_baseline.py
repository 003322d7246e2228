"""Training alone beside a run: the same clients, data, adapter, rounds, steps and rates, and nothing shared.

What sharing is worth is the difference to it, so `fedvlm train` has it too: a run of the method `local` in the folder
`baseline` of the run. It is resumed, and read, like every other run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fedvlm_jax.config.method_checks import declare, for_method
from fedvlm_jax.config.method_setup import count_vectors
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import PromptOptions, Run, from_json
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.run_dir.stored_baseline import BASELINE
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.compare import finish_run, refuse_other_sources
from fedvlm_jax.training.experiment import keep_within
from fedvlm_jax.training.extend_run import lengthen
from fedvlm_jax.training.trainer import Callback
from fedvlm_jax.utils.progress import Progress

ALONE = "local"
"""The method in which nothing is shared."""


def make_baseline(run: Run) -> Run:
    """Give the run of the same budget that trains every client alone, with a soft prompt where the run has one.

    What is scored only for the report of a method (other clients' data, examples) is left out.

    >>> make_baseline(Run(method="plora", out=Path("runs/a"))).method
    'local'

    Raises:
        UserError: options of the run mean something else, or nothing, where nothing is shared; or nothing trains
            adapters of its form alone.
    """
    out = run.out
    assert out is not None
    if declare(run.method, run).parallel:
        raise UserError(f"--method {run.method} has adapters beside whole layers, and --method {ALONE} has none")
    if vectors := count_vectors(run):
        run = dataclasses.replace(run, soft_prompt=PromptOptions(vectors))
    evaluation = dataclasses.replace(run.evaluation, cross_clients=False, examples=0)
    alone = dataclasses.replace(for_method(run, ALONE), evaluation=evaluation, resume=None, out=out / BASELINE)
    validate(alone)
    return alone


def find_reason_against(run: Run) -> str:
    """Say why no baseline can stand beside this run; empty where one can.

    >>> find_reason_against(Run(method="local"))
    '--method local is that itself'
    """
    if run.method == ALONE:
        return f"--method {ALONE} is that itself"
    try:
        make_baseline(run)
    except UserError as error:
        return str(error)
    return ""


def train_alone(
    folder: Path, show: Progress, model: federated_run.Model, make_callbacks: Callable[[], Sequence[Callback]] = tuple
) -> None:
    """Train every client of a finished run alone, or go on with that, or find that it is done.

    `make_callbacks` makes those that come after the callbacks of every run.

    Raises:
        UserError: as `make_baseline`, what lies in its folder is a run with other options, or data or model are not
            those of the finished run any more.
    """
    run, budget = dataclasses.replace(from_json(read_run(folder).options), out=folder), read_config(folder).budget
    if budget is not None:
        run = keep_within(run, budget)  # as many rounds as the run had
    alone = make_baseline(run)
    assert alone.out is not None
    if not (alone.out / "results.json").is_file():
        refuse_other_sources(folder, run, model(alone) if callable(model) else model)
    if (alone.out / "config.json").is_file() and read_config(alone.out).run.train.rounds < alone.train.rounds:
        # The run was trained longer: so is this, once it has its first rounds.
        federated_run.resume(alone.out, show, model, make_callbacks())
        processes.tell_all(partial(lengthen, alone.out, alone.train.rounds))
    finish_run(alone, show, model, callbacks=make_callbacks())
