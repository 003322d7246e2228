"""The rounds, clients and rows that an audit looks at: what was trained on, and what was not."""

import numpy as np
from jaxtyping import Int

from fedvlm_jax.federation.round import from_waves
from fedvlm_jax.training.experiment import Experiment, make_simulator
from fedvlm_jax.utils.random_streams import Stream

Rows = Int[np.ndarray, " rows"]
Batches = dict[int, dict[int, Rows]]
"""Round -> client -> the rows that its local steps read."""


def choose_rounds(kept: list[int], most: int) -> list[int]:
    """Choose rounds evenly spread over those that were kept, the first and the last among them.

    >>> choose_rounds([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if most == 1:
        return kept[-1:]
    places = np.linspace(0, len(kept) - 1, min(most, len(kept)))
    return [kept[round(place)] for place in places.tolist()]


def choose_clients(batches: Batches, most: int, seed: int) -> list[int]:
    """Choose clients of whom a message was kept, by the seed."""
    there = sorted({number for of_round in batches.values() for number in of_round})
    rng = np.random.default_rng([Stream.AUDITED, seed])
    return sorted(rng.choice(there, most, replace=False).tolist()) if len(there) > most else there


def read_batches(experiment: Experiment, rounds: list[int]) -> Batches:
    """Find the rows that each client's local steps read in these rounds: seed and options decide them."""
    simulator, found = make_simulator(experiment), dict[int, dict[int, np.ndarray]]()
    simulator.inputs = lambda rows: {"row": rows}
    for round_ in rounds:
        read = simulator.read_round(round_)
        clients = from_waves(read.clients)
        found[round_] = {}
        for place, number in enumerate(read.numbers.tolist()):
            if (used := clients.indices[place][clients.mask[place]]).size:
                found[round_][number] = np.unique(clients.examples["row"][place][used])
    return found


def draw_rows(rng: np.random.Generator, rows: Rows, most: int) -> Rows:
    """Draw at most so many rows, in ascending order.

    >>> draw_rows(np.random.default_rng(0), np.arange(3), 5).tolist()
    [0, 1, 2]
    """
    return np.sort(rng.choice(rows, most, replace=False)) if len(rows) > most else rows
