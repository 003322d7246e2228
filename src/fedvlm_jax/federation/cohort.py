"""Who takes part in a round, and the arrays that the round reads: rows, indices, masks and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax.data.batches import bucket, round_rows
from fedvlm_jax.data.encode import Examples
from fedvlm_jax.federation.round import to_waves
from fedvlm_jax.methods import Client

__all__ = ["Layout", "choose_layout", "draw_cohort", "make_clients"]

COHORT_STREAM = 101
"""First integer of the random stream, which keeps it apart from every other use of the run's seed."""

WAVE = 16
"""Clients trained side by side on one device, unless the user says otherwise."""


@dataclass(frozen=True)
class Layout:
    """The fixed shapes of all rounds of a run, so that they share one program.

    Attributes:
        cohort: clients drawn each round.
        wave: clients trained side by side, V; a multiple of the mesh's `clients`.
        waves: W; W·V ≥ cohort, the rest is padding.
        rows: M, the most rows a client touches in a round, rounded up.
        steps, batch: S and B.
    """

    cohort: int
    wave: int
    waves: int
    rows: int
    steps: int
    batch: int

    @property
    def places(self) -> int:
        """K = W·V."""
        return self.wave * self.waves


def choose_layout(
    sizes: Sequence[int], *, cohort: int | None, wave: int | None, devices: int, steps: int, batch: int
) -> Layout:
    """Choose the shapes of a run's rounds.

    Args:
        sizes: training examples of every client in the population.
        cohort: clients a round; all by default.
        wave: clients side by side; by default 16 a device, or the whole cohort where that is less.
        devices: length of the mesh's axis `clients`.
        steps, batch: local steps and batch size.
    """
    cohort = min(cohort or len(sizes), len(sizes))
    wave = min(wave or WAVE * devices, cohort)
    wave = -(-wave // devices) * devices
    waves = -(-cohort // wave)
    rows = bucket(max((min(size, steps * batch) for size in sizes), default=1))
    return Layout(cohort, wave, waves, rows, steps, batch)


def draw_cohort(seed: int, round_: int, population: int, cohort: int) -> Int[np.ndarray, " cohort"]:
    """The clients of a round, without replacement and in ascending order; everybody where the cohort is everybody.

    The choice depends on the seed and the round, and on nothing else.
    """
    if cohort >= population:
        return np.arange(population)
    rng = np.random.default_rng([COHORT_STREAM, seed, round_])
    return np.sort(rng.choice(population, cohort, replace=False))


def make_clients(
    seed: int,
    round_: int,
    numbers: Int[np.ndarray, " cohort"],
    examples: Examples,
    inputs: Callable[[np.ndarray], dict[str, np.ndarray]],
    layout: Layout,
    weighting: Literal["examples", "uniform"],
    steps: int | None = None,
) -> tuple[Client, Float[np.ndarray, " places"]]:
    """Everything a round reads of its cohort, as host arrays.

    Args:
        seed, round_: decide which examples each step reads.
        numbers: the cohort.
        examples: of the population.
        inputs: (rows [...]) -> the model's inputs of these rows, arrays [..., …].
        layout: shapes; places beyond the cohort are padding, with weight 0.
        steps: only so many of the layout's local steps; all by default.
        weighting: p_k by number of examples, or uniform; a client without examples has weight 0 either way.

    Returns:
        A `Client` of arrays [W, V, …], all of them new as yet, and the weights [K] in the cohort's order.
    """
    own = [examples.clients[number].train for number in numbers]
    drawn = round_rows(seed, round_, numbers.tolist(), own, layout.steps, layout.batch, [layout.rows])
    padding = layout.places - len(numbers)

    def pad(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.repeat(array[:1], padding, axis=0)])

    counts = drawn.counts.astype(np.float64) if weighting == "examples" else (drawn.counts > 0).astype(np.float64)
    weights = np.concatenate([counts / max(counts.sum(), 1.0), np.zeros(padding)]).astype(np.float32)
    drawn.mask[:, steps:] &= steps is None
    mask = np.concatenate([drawn.mask, np.zeros((padding, *drawn.mask.shape[1:]), bool)])
    client = Client(
        examples=inputs(pad(drawn.rows)),
        indices=pad(drawn.indices),
        mask=mask,
        weight=weights,
        number=pad(numbers).astype(np.int32),
        new=np.ones(layout.places, bool),
    )
    return to_waves(client, layout.waves), weights
