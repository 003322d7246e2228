"""The ε of a run with noise, bounded from below by canaries, beside the ε that it accounted."""

from typing import Any

from jaxtyping import PyTree

from fedvlm_jax.audit import canaries
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.training.experiment import Experiment, make_simulator
from fedvlm_jax.utils.progress import Progress, working
from fedvlm_jax.utils.random_streams import Stream

MOST_NUMBERS = 2**28
"""Of all canaries' messages, a GiB."""


def bound_run(experiment: Experiment, simulator: Simulator, count: int, show: Progress) -> dict[str, Any] | None:
    """Bound the ε of a run with noise from below, beside the ε that it accounted; None without noise."""
    run, budget = experiment.run, experiment.budget
    if budget is None:
        return None
    # Lines may be lost, and those of local fine-tuning release nothing: what was settled is what the rounds spent.
    found: dict[str, Any] = {"accounted": budget.epsilon, "delta": budget.delta}
    if run.privacy.sampling == "fixed":
        return {**found, "lower": None, "why": "cohorts of a fixed size replace clients, and canaries come and go"}
    blank = make_simulator(experiment)
    blank.inputs = experiment.blank_inputs
    replay = make_replay(run, simulator, blank.find_messages(blank.read_round(1)), budget.rounds)
    many = min(count, MOST_NUMBERS // replay.entries)
    if many < 8:
        return {**found, "lower": None, "why": f"a message has {replay.entries:,} numbers, too many for canaries"}
    with working(show, f"replaying the noise of {replay.rounds} rounds with {many} canaries"):
        bound = canaries.audit_mechanism(replay, many, budget.delta, [Stream.CANARIES, run.seed])
    counts = {"correct": bound.correct, "guesses": bound.guesses, "canaries": bound.canaries}
    return {**found, "lower": bound.epsilon, **counts}


def make_replay(run: Run, simulator: Simulator, message: PyTree, rounds: int) -> canaries.Replay:
    """Make the replay of a run's mechanism: its method, with the pool around it, from the start."""
    options, population = run.privacy, int(sum(client.trains for client in simulator.examples.clients))
    groups = options.bands if options.mechanism == "banded" else 1
    expected = population / groups if options.sampling == "all" or run.cohort is None else run.cohort
    chance = 1.0 if options.sampling == "all" else min(1.0, expected * groups / population)
    return canaries.Replay(
        simulator.programs.method, simulator.server, message, rounds, chance, canaries.LOUD * options.clip, groups
    )
