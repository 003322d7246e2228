"""The cohort of a round, and the arrays that the round reads: rows, indices, masks and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from fedvlm_jax.data.batches import bucket, round_rows
from fedvlm_jax.federation.round import to_waves
from fedvlm_jax.methods import Client

if TYPE_CHECKING:
    from fedvlm_jax.data.tokenization import Examples  # which loads pyarrow

WAVE = 16  # clients trained side by side on one device, unless the user says otherwise


@dataclass(frozen=True)
class Layout:
    """The fixed shapes of all rounds of a run, so that they share one program."""

    cohort: int  # clients drawn each round, or the most of them where their number is drawn too
    wave: int  # clients trained side by side, V; a multiple of the mesh's `clients`
    waves: int  # W; W·V ≥ cohort, the rest is padding
    rows: int  # M, the most rows a client touches in a round, rounded up
    steps: int  # S
    batch: int  # B

    @property
    def places(self) -> int:
        """K = W·V.

        >>> Layout(cohort=5, wave=2, waves=3, rows=8, steps=1, batch=8).places
        6
        """
        return self.wave * self.waves


def choose_layout(
    sizes: Sequence[int], *, cohort: int | None, wave: int | None, devices: int, steps: int, batch: int
) -> Layout:
    """Choose the shapes of a run's rounds for clients with so many training examples each.

    By default all clients are in a cohort, and 16 a device, the mesh's axis `clients`, are trained side by side, or
    fewer where that takes no more waves.

    >>> layout = choose_layout([8] * 20, cohort=None, wave=None, devices=1, steps=2, batch=4)
    >>> layout.wave, layout.waves
    (10, 2)
    """
    cohort = min(cohort or len(sizes), len(sizes))
    wave = min(wave or balance_wave(WAVE * devices, cohort, devices), cohort)
    wave = -(-wave // devices) * devices
    rows = bucket(max((min(size, steps * batch) for size in sizes), default=1))
    return Layout(cohort, wave, -(-cohort // wave), rows, steps, batch)


def balance_wave(wave: int, cohort: int, devices: int) -> int:
    """Find the narrowest wave that takes a cohort in as many waves: an empty place costs what a client does.

    A wave is spread over the devices, so its width is a multiple of their number.

    >>> balance_wave(16, 20, 2)
    10
    """
    waves = -(-cohort // wave)
    return -(-cohort // (waves * devices)) * devices


def make_clients(
    seed: int,
    round_: int,
    numbers: Int[np.ndarray, " cohort"],
    examples: "Examples",
    inputs: Callable[[np.ndarray], dict[str, np.ndarray]],
    layout: Layout,
    weighting: Literal["examples", "uniform"],
    steps: Int[np.ndarray, " cohort"] | None = None,
    own: Int[np.ndarray, " own"] | None = None,
    shares: Float[np.ndarray, " cohort"] | None = None,
) -> tuple[Client, Float[np.ndarray, " places"]]:
    """Make all that a round reads of its cohort, as host arrays.

    Seed and round decide which examples each step reads. Places beyond the cohort are padding, with weight 0.

    Args:
        numbers: the cohort.
        examples, inputs: of the population, and (rows [...]) -> the model's inputs of these rows, arrays [..., …].
        weighting: p_k by number of examples, or uniform; without examples or steps it is 0 either way.
        steps: how many of the layout's local steps each of them takes; all by default.
        own: the places of the cohort, padding included, that this process reads; all by default.
        shares: of the cohort in all clients' weight, see `find_shares`; by default there are no other clients.

    Returns:
        A `Client` of arrays [W, V, …], or of this process's places alone, all new as yet, and all weights [K].
    """
    at = np.arange(layout.places) if own is None else own
    rows = [examples.clients[number].train for number in numbers]
    taken = np.full(len(numbers), layout.steps) if steps is None else steps
    drawn = round_rows(seed, round_, numbers.tolist(), rows, layout.steps, layout.batch, layout.rows, taken.tolist())
    counts = np.where(taken > 0, drawn.counts if weighting == "examples" else drawn.counts > 0, 0).astype(np.float64)
    padding = np.zeros(layout.places - len(numbers))
    weights = np.concatenate([counts / max(counts.sum(), 1.0), padding]).astype(np.float32)
    who = fill_places(at, len(numbers))
    client = Client(
        examples=inputs(drawn.rows[who]),
        indices=drawn.indices[who],
        mask=drawn.mask[who] & (at < len(numbers))[:, None, None],
        weight=weights[at],
        number=numbers[who].astype(np.int32),
        new=np.ones(len(at), bool),
        share=weights[at] if shares is None else shares[who].astype(np.float32),
    )
    return to_waves(client, layout.waves), weights


def fill_places(places: Int[np.ndarray, " some"], cohort: int) -> Int[np.ndarray, " some"]:
    """Return who of the cohort is at these places: beyond it the last client, whose place is the nearest.

    >>> fill_places(np.arange(5), 3).tolist()
    [0, 1, 2, 2, 2]
    """
    return np.minimum(places, cohort - 1)
