"""What each robust rule is worth against each simulated attack: honest clients' test scores on the shipped data.

    python benchmarks/hostile_clients.py > benchmarks/results/hostile_clients.md
    python benchmarks/hostile_clients.py --methods plora --pools mean krum --attacks none scale --rounds 3

Every cell is a run of `fedvlm train` with 2 of the 16 clients hostile (`none`: the same two behave), scored on the
other 14. A cell that is there is read, one that was stopped goes on. The default is 84 runs: give --methods and --pools
to share them out over machines.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedvlm_jax.config.run_options import EvaluationOptions, Run, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.reporting.tables import Table, to_markdown
from fedvlm_jax.run_dir.reader import RunRecord, read_run
from fedvlm_jax.utils.compilation_cache import keep_programs

POOLS = ("mean", "median", "trimmed", "krum", "multi-krum", "geometric", "bound")
ATTACKS = ("none", "sign-flip", "scale", "noise", "label-flip", "backdoor")
WITH_HOSTILE = ("trimmed", "krum", "multi-krum")


@dataclass(frozen=True)
class Options:
    """The cells, and how long each is trained."""

    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("plora", "fedavg-lora")
    pools: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POOL [POOL ...]")] = POOLS
    attacks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ATTACK [ATTACK ...]")] = ATTACKS
    attackers: int = 2
    """Of the 16 clients; what `hostile` is, too."""
    bound: float = 0.5
    """Norm of `bound`; at these rates a client's update has about 1.4 in the first round."""
    rounds: int = 16
    local_steps: int = 4
    seed: int = 0
    out: Path = Path("runs/hostile-clients")


def make_run(options: Options, method: str, pool: Any, attack: Any) -> Run:
    """Make the run of a cell."""
    messages = MessageOptions(
        pool=pool,
        hostile=options.attackers if pool in WITH_HOSTILE else MessageOptions.hostile,
        bound=options.bound if pool == "bound" else MessageOptions.bound,
    )
    return Run(
        method=method,
        seed=options.seed,
        messages=messages,
        participation=ParticipationOptions(attack=attack, attackers=options.attackers),
        train=TrainOptions(rounds=options.rounds, local_steps=options.local_steps),
        evaluation=EvaluationOptions(every=options.rounds, before_redistribution=False, examples=0),
        checkpoint_every=options.rounds,
        out=options.out / f"{method}-{pool}-{attack}-seed{options.seed}-rounds{options.rounds}",
    )


def finish(run: Run, model: Callable[[Run], Any]) -> RunRecord:
    """Read a run that is finished, go on with one that was stopped, or begin it."""
    from fedvlm_jax.training import federated_run

    assert run.out is not None
    if not (run.out / "results.json").is_file():
        print(f"{run.out.name} ...", file=sys.stderr, flush=True)
        if (run.out / "config.json").is_file():
            federated_run.resume(run.out, model=model)
        else:
            federated_run.train(run, model=model)
    return read_run(run.out)


def describe(record: RunRecord) -> str:
    """Write the honest clients' mean exact match in per cent, and of a backdoor how often it opens."""
    text = f"{100 * summarise(record.scores('personal')).mean:.1f}"
    opened = ((record.results.get("attack") or {}).get("with_mark") or {}).values()
    return f"{text} ({100 * sum(opened) / len(opened):.0f})" if opened else text


def tabulate(options: Options, method: str, records: dict[tuple[str, str], RunRecord]) -> Table:
    """Lay out a method's cells, rules down and attacks across."""
    rows = tuple((pool, *(describe(records[pool, attack]) for attack in options.attacks)) for pool in options.pools)
    any_ = next(iter(records.values()))
    base = 100 * summarise(any_.scores("zero_shot")).mean
    return Table(
        title=f"{method}: exact match of {len(any_.scores('personal'))} honest clients, %",
        columns=("rule", *options.attacks),
        rows=rows,
        note=f"{options.attackers} of 16 clients hostile, {options.rounds} rounds of {options.local_steps} steps, seed "
        f"{options.seed}; zero-shot {base:.1f}. In brackets: marked pictures that get the backdoor's answer, %.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells and print the tables."""
    from fedvlm_jax.training.federated_run import load_later
    from fedvlm_jax.utils.progress import SilentProgress

    keep_programs()
    options = tyro.cli(Options, description=__doc__, args=arguments)
    load = load_later(SilentProgress())
    try:
        for method in options.methods:
            cells = [(pool, attack) for pool in options.pools for attack in options.attacks]
            records = {cell: finish(make_run(options, method, *cell), load) for cell in cells}
            print(to_markdown(tabulate(options, method, records)), flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
