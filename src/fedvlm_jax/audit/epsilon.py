"""The ε of a run with noise, bounded from below by canaries, beside the ε that it accounted."""

from typing import Any

from jaxtyping import PyTree

from fedvlm_jax.audit import canaries
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.privacy.budget import Budget
from fedvlm_jax.training.experiment import Experiment, shape_messages
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
    replay = make_replay(budget, simulator, shape_messages(experiment, [1])[1])
    many = min(count, MOST_NUMBERS // replay.entries)
    if many < 8:
        return {**found, "lower": None, "why": f"a message has {replay.entries:,} numbers, too many for canaries"}
    with working(show, f"replaying the noise of {replay.rounds} rounds with {many} canaries"):
        bound = canaries.audit_mechanism(replay, many, budget.delta, [Stream.CANARIES, run.seed])
    counts = {"correct": bound.correct, "guesses": bound.guesses, "canaries": bound.canaries}
    return {**found, "lower": bound.epsilon, **counts}


def make_replay(budget: Budget, simulator: Simulator, message: PyTree) -> canaries.Replay:
    """Make the replay of a run's mechanism: its method, with the pool around it, from the start."""
    return canaries.Replay(
        simulator.programs.method, simulator.server, message, budget.rounds, budget.chance, canaries.LOUD * budget.clip,
        budget.groups,
    )  # fmt: skip
