"""Partitions: which of C clients gets which unit (a picture with all rows about it).

Units come in an order that was drawn before, and every client takes a run of them (of each label, where labels count).
Every unit gets exactly one owner. Quantity skew is that of Li et al. (arXiv 2102.02079). Labels are shared out after
Yurochkin et al. (arXiv 1905.12022), so that sizes differ, too. The other form, a mix over labels drawn per client (Hsu
et al., arXiv 1909.06335), fixes the sizes instead, and either leaves rows over or lets labels run dry; here every row
is used and every share has exactly its Dirichlet's moments. Pathological shards are those of McMahan et al. (arXiv
1602.05629). Deviation: theirs are of one size and may span two labels; here a label gets shards by its size and at
least one, so that k is a bound however unequal the labels are.
"""

import heapq

import numpy as np
from jaxtyping import Int

from fedvlm_jax.errors import UserError, format_count

# Concentration from which shares are even to a millionth; far beyond it, numbers drawn for them overflow.
ALIKE = 1e12
Units = Int[np.ndarray, " units"]  # a label or an owner of each


def cut_iid(units: int, clients: int) -> Units:
    """Give every client an equal run; sizes differ by one at most.

    >>> cut_iid(5, 2).tolist()
    [0, 0, 0, 1, 1]
    """
    return np.arange(units) * clients // max(units, 1)


def cut_quantity(units: int, clients: int, alpha: float, rng: np.random.Generator) -> Units:
    """Give every client a run of its Dirichlet(alpha) share, rounded to whole units; at alpha = inf as `cut_iid`.

    >>> cut_quantity(6, 2, np.inf, np.random.default_rng(0)).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    if alpha >= ALIKE:
        shares = np.full(clients, 1 / clients)
    else:
        shares = rng.dirichlet(np.full(clients, alpha))
        if not np.isfinite(shares).all():  # alpha near 0 underflows, and then a single client takes all
            shares = np.eye(clients)[rng.integers(clients)]
    edges = np.floor(np.cumsum(shares) * units + 0.5)
    edges[-1] = units
    return np.searchsorted(edges, np.arange(units), side="right")


def cut_dirichlet(labels: Units, clients: int, alpha: float, rng: np.random.Generator) -> Units:
    """Share out the units of every label after a Dirichlet(alpha) over the clients.

    A client's share of a label has mean 1 / C and variance (1 / C)(1 - 1 / C) / (C·alpha + 1), up to rounding to whole
    units; at alpha = inf it is 1 / C, so that clients are alike.

    >>> labels = np.asarray([0, 0, 0, 0, 1, 1])
    >>> owners = cut_dirichlet(labels, 2, np.inf, np.random.default_rng(0))
    >>> [np.bincount(owners[labels == label]).tolist() for label in (0, 1)]
    [[2, 2], [1, 1]]
    """
    owners = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        units = np.flatnonzero(labels == label)
        # Rounding favours some places of the run; which clients stand there changes from label to label.
        order = rng.permutation(clients)
        owners[units] = order[cut_quantity(len(units), clients, alpha, rng)]
    return owners


def cut_pathological(labels: Units, clients: int, classes: int, rng: np.random.Generator) -> Units:
    """Cut every label into shards and give every client `classes` of them, so many labels at most.

    Raises:
        UserError: there are too few labels, or so many that some would belong to nobody, or too few units.

    >>> labels = np.asarray([0, 0, 1, 1, 2, 2])
    >>> owners = cut_pathological(labels, 3, 1, np.random.default_rng(0))
    >>> [len(set(labels[owners == client])) for client in range(3)]
    [1, 1, 1]
    """
    values, counts = np.unique(labels, return_counts=True)
    shards = clients * classes
    if classes > len(values):
        raise UserError(
            f"--data.classes-per-client is {classes}, and the key has only "
            f"{format_count(len(values), 'value')}; choose fewer."
        )
    if len(values) > shards:
        raise UserError(
            f"--data.partition pathological: {format_count(clients, 'client')} of "
            f"{format_count(classes, 'value')} each hold {format_count(shards, 'value')}, and the "
            f"key has {len(values)}, so some rows would belong to nobody; choose --data.clients "
            f"{-(-len(values) // classes)} or more, or --data.classes-per-client {-(-len(values) // clients)} or more."
        )
    if shards > len(labels):
        raise UserError(
            f"--data.partition pathological: {format_count(clients, 'client')} of "
            f"{format_count(classes, 'shard')} each need {format_count(shards, 'image')}, and "
            f"there are {len(labels)}; choose fewer --data.clients."
        )
    takers = rng.permutation(shards) // classes
    owners, given = np.zeros(len(labels), np.int64), 0
    for value, count in zip(values, _allot_shards(counts, shards), strict=True):
        units = np.flatnonzero(labels == value)
        owners[units] = takers[given + cut_iid(len(units), count)]
        given += count
    return owners


def _allot_shards(counts: Int[np.ndarray, " labels"], shards: int) -> list[int]:
    """Allot a shard to every label, and each further one to the label whose shards are the largest, [L]."""
    allotted = [1] * len(counts)
    largest = [(-float(count), label) for label, count in enumerate(counts)]
    heapq.heapify(largest)
    for _ in range(shards - len(counts)):
        _, label = heapq.heappop(largest)
        allotted[label] += 1
        heapq.heappush(largest, (-float(counts[label] / allotted[label]), label))
    return allotted
