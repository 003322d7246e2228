"""Every client's personal model, as it was at a moment of the federation.

Clients that never trained, held out or not drawn yet, have the server's global part, and their private part has to come
from somewhere:

    initial   what every client started from
    mean      the mean of the private states of all clients that took part
    nearest   the private state of the client whose images are most alike: cosine of mean frozen features, centred over
              clients. Of a held-out client only validation images are looked at, and no answers.

Where ranks differ, a direction's mean is over those who have it, a client has those of its own rank, and what its
source lacks is that of its own start. None of it is given by the FedVLM paper (arXiv 2507.17088).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from fedvlm_jax.data.batches import pad_rows
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.evaluation.evaluator import Adapters
from fedvlm_jax.federation.client_states import NOBODY, Slots
from fedvlm_jax.federation.simulator import Moment, Simulator
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.training.experiment import Experiment


def give_models(experiment: Experiment, simulator: Simulator, at: Moment) -> Adapters:
    """Give every client's adapter at a moment of the run's federation; who never trained starts as the run asks for.

    Raises:
        UserError: "nearest" where image features are not frozen and kept.
    """
    at = at._replace(server=replicate(experiment.model.mesh, at.server))
    kind = experiment.run.evaluation.cold_start
    known = at.slots != NOBODY
    cold, trained = np.flatnonzero(~known), np.flatnonzero(known)
    if kind == "initial" or not len(cold) or not len(trained):
        return partial(simulator.adapters, at=at)
    source = np.arange(len(at.slots))  # whose private state a client has
    mean: PyTree = None
    ranks = np.asarray(simulator.ranks, np.int64)
    if kind == "mean":
        mean = _average(simulator, trained, at.slots, experiment.layout.wave)
    else:
        means = experiment.data.client_means(inputs=experiment.inputs)
        source[cold] = find_nearest(means, cold, trained)

    def adapters(numbers: np.ndarray) -> PyTree:
        states = simulator.client_states.gather(source[numbers], at.slots)
        if mean is None and not len(ranks):
            return simulator.personalise(states, np.ones(len(numbers), bool), numbers, at)
        new, shared = ~known[numbers], None
        if len(ranks):
            most = ranks[source[numbers]] if mean is None else ranks[trained].max()
            shared = np.arange(ranks.max()) < np.minimum(ranks[numbers], most)[..., None]  # [V, R], directions

        def replace(path: tuple[Any, ...], leaf: np.ndarray, given: np.ndarray, start: np.ndarray) -> np.ndarray:
            # Whole numbers name or count: a rank or a client's number stays, and has no mean.
            taken = (not np.issubdtype(leaf.dtype, np.integer)) & _align(path, shared, leaf.ndim, True)
            is_new = new.reshape(-1, *[1] * (leaf.ndim - 1))
            return np.where(is_new, np.where(taken, given, start), leaf)

        start = simulator.start_states(numbers, at)
        states = jax.tree_util.tree_map_with_path(replace, states, states if mean is None else mean, start)
        return simulator.personalise(states, np.ones(len(numbers), bool), numbers, at)

    return adapters


def each_model(models: Adapters, clients: int, wave: int) -> Iterator[tuple[Int[np.ndarray, " some"], PyTree]]:
    """Yield everybody's models in turn: so many client numbers at a time, with their adapters [V, …] on the devices.

    The last wave is shorter; its adapters are filled up to V, so that all have one shape.

    >>> [numbers.tolist() for numbers, _ in each_model(lambda numbers: None, clients=5, wave=2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, clients, wave):
        numbers = np.arange(start, min(start + wave, clients))
        yield numbers, models(pad_rows(numbers, wave))


def find_nearest(
    means: Float[np.ndarray, "clients width"], who: Int[np.ndarray, " some"], among: Int[np.ndarray, " others"]
) -> Int[np.ndarray, " some"]:
    """Find for each of `who` the client of `among` with the most similar row: cosine, centred by `among`'s mean.

    >>> means = np.array([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0]])
    >>> find_nearest(means, who=np.array([2]), among=np.array([0, 1]))
    array([0])
    """
    centred = means - means[among].mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(lengths > 0, lengths, 1.0)
    return among[(unit[who] @ unit[among].T).argmax(axis=1)]


def _average(simulator: Simulator, numbers: np.ndarray, slots: Slots, wave: int) -> PyTree:
    """Average these clients' private states, read so many at a time; each direction over those who have it."""
    total: PyTree = None
    for start in range(0, len(numbers), wave):
        states = simulator.client_states.gather(numbers[start : start + wave], slots)
        # In float64, so that how many are read at a time shows in no digit of the mean.
        part = jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=np.float64), states)
        total = part if total is None else jax.tree.map(np.add, total, part)
    shapes = simulator.client_states.gather(numbers[:1], slots)
    ranks = np.asarray(simulator.ranks, np.int64)
    having = (ranks[numbers, None] > np.arange(ranks.max())).sum(axis=0) if len(ranks) else None

    def divide(path: tuple[Any, ...], leaf: np.ndarray, like: np.ndarray) -> np.ndarray:
        # What a client lacks is zero in its state, so that the sum is that of those who have it.
        return (leaf / np.maximum(_align(path, having, leaf.ndim, len(numbers)), 1)).astype(like.dtype)

    return jax.tree_util.tree_map_with_path(divide, total, shapes)


def _align(path: tuple[Any, ...], numbers: np.ndarray | None, axes: int, otherwise: Any) -> Any:
    """Align numbers [..., R] with the columns of an A or the rows of a B; give `otherwise` for other leaves."""
    name = leaf_name(jax.tree_util.keystr(path, simple=True, separator="/"))
    if numbers is None or name not in ("a", "b"):
        return otherwise
    *front, rank = numbers.shape
    back = (rank,) if name == "a" else (rank, 1)
    return numbers.reshape(*front, *[1] * (axes - len(front) - len(back)), *back)
