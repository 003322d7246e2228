"""A lower bound on ε from canaries: client-level messages of random directions, each in or out by a fair coin.

All canaries are audited in one run of the mechanism (Steinke, Nasr and Jagielski, arXiv 2305.08846); that a canary is a
client's whole message, in a direction that no other has, is Andrew et al. (arXiv 2302.03098). The mechanism is replayed
with the run's own pool and `aggregate` over as many rounds, with draws of its own, and no other client, which is one of
the worst neighbours that ε has to hold for. The server's new state minus the old is what an attacker sees; a canary's
score is its product with the sum of these. ε is sound if this bound lies below it but in 5 of 100 audits; the bound
says nothing of how far below the truth is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax.messages.pool import from_row
from fedvlm_jax.methods import Context, Method
from fedvlm_jax.utils import tree

LEVEL = 0.95
LOUD = 100.0
"""A canary's norm over the clipping norm: if it were not clipped, the bound would show it."""


class Bound(NamedTuple):
    """A lower bound on ε that holds at `level`: of so many guesses about canaries so many were right."""

    epsilon: float
    correct: int
    guesses: int
    canaries: int
    level: float


def find_p_value(epsilon: float, delta: float, correct: int, guesses: int, canaries: int) -> float:
    """Bound the chance of so many right guesses, or more, under (ε, δ): theorem 5.2 of arXiv 2305.08846.

    >>> round(find_p_value(0.0, 0.0, 8, 10, 10), 4)  # at ε = 0 a guess is a coin
    0.0547
    """
    from scipy.stats import binom  # late: it takes a second to import

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, chance))
    # P[correct > X >= correct - i], for i from 1
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    steepest = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * steepest)


def bound_epsilon(correct: int, guesses: int, canaries: int, delta: float, level: float = LEVEL) -> float:
    """Find the largest ε that so many right guesses refute.

    With δ = 0 that is the log-odds of the lower Clopper-Pearson bound on the share of right guesses.

    >>> bound_epsilon(5, 10, 10, 0.0)
    0.0
    """
    if find_p_value(0.0, delta, correct, guesses, canaries) > 1 - level:
        return 0.0
    low, high = 0.0, 1.0
    while find_p_value(high, delta, correct, guesses, canaries) <= 1 - level and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        refuted = find_p_value(middle, delta, correct, guesses, canaries) <= 1 - level
        low, high = (middle, high) if refuted else (low, middle)
    return low


def judge_canaries(
    scores: Float[np.ndarray, " canaries"], included: Bool[np.ndarray, " canaries"], delta: float, level: float = LEVEL
) -> Bound:
    """Guess "in" for the highest and "out" for the lowest scores, as many of each, and bound ε by what was right.

    How many to guess is chosen by the outcome, so each of the numbers that are tried has an equal part of 1 − `level`.

    >>> rng = np.random.default_rng(0)
    >>> included = rng.random(64) < 0.5
    >>> judge_canaries(included + 0.01 * rng.normal(size=64), included, 1e-5).epsilon > 2
    True
    """
    count = len(scores)
    order = np.argsort(scores, kind="stable")
    tried = sorted({max(2, 2 * round(share * count / 2)) for share in (1, 0.5, 0.25, 0.125)} - {0})
    best = Bound(0.0, 0, 0, count, level)
    for guesses in tried:
        half = guesses // 2
        correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        epsilon = bound_epsilon(correct, guesses, count, delta, 1 - (1 - level) / len(tried))
        if epsilon >= best.epsilon:
            best = Bound(epsilon, correct, guesses, count, level)
    return best


@dataclass(frozen=True)
class Replay:
    """A mechanism with canaries for clients.

    Attributes:
        method: the run's, with its pool around it.
        server: the state that it begins with.
        message: the shapes of a client's message.
        rounds: that are released.
        chance: of each client, to take part in a round in which it is its group's turn.
        norm: of a canary's message.
        groups: of clients that take turns, as with correlated noise.
    """

    method: Method
    server: PyTree
    message: PyTree
    rounds: int
    chance: float
    norm: float
    groups: int = 1

    @property
    def entries(self) -> int:
        """Count the numbers of a message."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.message))

    def run(self, canaries: int, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Release all rounds with so many canaries: -> their scores, and which were in."""
        rng = np.random.default_rng(seed)
        included = rng.random(canaries) < 0.5
        drawn, key = jax.random.split(jax.random.key(int(rng.integers(2**31))))
        rows = jax.random.normal(drawn, (canaries, self.entries))
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        scores, server, step = np.zeros(canaries), self.server, self._make_step()
        for round_ in range(1, self.rounds + 1):
            turn = np.arange(canaries) % self.groups == round_ % self.groups
            present = included & turn & (rng.random(canaries) < self.chance)
            server, seen = step(server, rows, jnp.asarray(present), jnp.int32(round_), jax.random.fold_in(key, round_))
            scores += np.asarray(seen, np.float64)
        return scores, included

    def _make_step(self) -> Callable[..., tuple[PyTree, Array]]:
        form = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), self.message)

        paths = tree.flatten(self.message)

        def lay_out(server: PyTree) -> Array:  # what of it messages hold, in their order
            held = tree.flatten(self.method.download(server=server))
            return jnp.concatenate(
                [leaf.reshape(-1) for leaf in jax.tree.leaves(tree.unflatten({at: held[at] for at in paths}))]
            )

        @jax.jit
        def step(server: PyTree, rows: Array, present: Array, round_: Array, key: Array) -> tuple[PyTree, Array]:
            messages = jax.vmap(lambda row: from_row(self.norm * row, form))(rows)
            ctx = Context({}, round_, 0, {}, None, key)  # type: ignore[arg-type]  # nothing is trained
            weights = present / jnp.maximum(present.sum(), 1)
            new, _ = self.method.aggregate(ctx, server=server, messages=messages, weights=weights)
            return new, rows @ (lay_out(new) - lay_out(server))

        return step


def audit_mechanism(replay: Replay, canaries: int, delta: float, seed: Sequence[int]) -> Bound:
    """Replay a mechanism with canaries and bound its ε from below."""
    return judge_canaries(*replay.run(canaries, seed), delta)
