"""Numbers about answers and about clients: exact match, spread over clients, paired differences over seeds."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedvlm_jax.errors import UserError

__all__ = ["Difference", "Summary", "exact_match", "normalise", "paired_difference", "summarise"]


def normalise(text: str) -> str:
    """One form for answers that differ only in writing, in any script.

    NFKC (full-width letters become plain, й composed), case folded (ß becomes ss), white space collapsed to single
    spaces, and punctuation, spaces and invisible format characters stripped from both ends: every Unicode category
    P*, Z* and Cf, so also 。, 「」, « » and ¿. Inside a text punctuation stays. Symbols ($, +) are no punctuation and
    stay; a text of punctuation alone keeps it, so that "?" and "!" remain different answers.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.split())
    start, end = 0, len(spaced)
    while start < end and _is_margin(spaced[start]):
        start += 1
    while end > start and _is_margin(spaced[end - 1]):
        end -= 1
    return spaced[start:end] or spaced


def _is_margin(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PZ" or category in ("Cf", "Cc")


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " examples"]:
    """1.0 where prediction and gold answer are equal after `normalise`, else 0.0; one float64 per example.

    Raises:
        ValueError: there are not as many predictions as answers.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers; expected one for each")
    pairs = zip(predictions, answers, strict=True)
    return np.asarray([normalise(prediction) == normalise(answer) for prediction, answer in pairs], np.float64)


@dataclass(frozen=True)
class Summary:
    """One metric over clients.

    Attributes:
        mean: over clients, weighted if weights were given.
        std: population standard deviation over clients (divided by their number), with the same weights.
        worst_decile: unweighted mean of the lowest ceil(10 %) of the clients: of 16 clients the lowest 2, of 10 the
            lowest one, of 5 the lowest one.
        min, max: the extreme clients.
        clients: how many there are.
    """

    mean: float
    std: float
    worst_decile: float
    min: float
    max: float
    clients: int


def summarise(values: Mapping[str, float], weights: Mapping[str, float] | None = None) -> Summary:
    """Mean and spread of one metric over clients.

    Args:
        values: client -> value. A client without a value (no test examples) does not belong here.
        weights: client -> non-negative weight in mean and std; without them every client counts the same.

    Raises:
        UserError: no clients, a value that is not finite, or weights that are missing, negative or all zero.
    """
    if not values:
        raise UserError("there is no client to summarise; expected a value for at least one.")
    odd = [client for client, value in values.items() if not math.isfinite(value)]
    if odd:
        raise UserError(
            f"the values of {len(odd)} of {len(values)} clients are not finite ({', '.join(odd[:5])}); leave clients "
            "without examples out, and look at the losses of the others."
        )
    numbers = np.asarray(list(values.values()), np.float64)
    shares = _read_shares(values, weights)
    mean = float(shares @ numbers)
    lowest = math.ceil(len(numbers) / 10)
    return Summary(
        mean=mean,
        std=float(np.sqrt(shares @ (numbers - mean) ** 2)),
        worst_decile=float(np.sort(numbers)[:lowest].mean()),
        min=float(numbers.min()),
        max=float(numbers.max()),
        clients=len(numbers),
    )


def _read_shares(values: Mapping[str, float], weights: Mapping[str, float] | None) -> np.ndarray:
    if weights is None:
        return np.full(len(values), 1 / len(values))
    missing = [client for client in values if client not in weights]
    if missing:
        raise UserError(f"no weight for {', '.join(missing[:5])}; expected one for each of {len(values)} clients.")
    given = np.asarray([weights[client] for client in values], np.float64)
    if not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise UserError("client weights must be finite and non-negative, and at least one of them above zero.")
    return given / given.sum()


@dataclass(frozen=True)
class Difference:
    """How much better one method is than another, on the same clients and seeds.

    Attributes:
        mean: a minus b, averaged over clients within a seed, then over seeds.
        standard_error: of that mean, from the spread between seeds; NaN with a single value.
        low, high: 95 % confidence interval, Student's t; NaN with a single value.
        wins: share of (seed, client) pairs in which a is better, ties counting half.
        seeds: how many seeds.
        clients: how many clients each of them has.
        over: what the interval generalises over: "seeds", or "clients" where there is one seed only.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    wins: float
    seeds: int
    clients: int
    over: str


def paired_difference(
    a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]], level: float = 0.95
) -> Difference:
    """Paired comparison of two methods over seeds and clients.

    The unit is the seed: clients of one seed share a training run, so their differences are averaged first, and
    Student's t over the seed means (n - 1 degrees of freedom) gives the interval. It speaks of new seeds for such a
    population of clients. With one seed the unit is the client; such an interval says nothing about other seeds, and
    is too narrow where clients share parameters. A t interval, no bootstrap: five seeds are too few to resample.

    Args:
        a, b: seed -> client -> value.
        level: the interval's coverage.

    Raises:
        UserError: no seeds, or seeds or clients that are not the same in both.
    """
    if not a or a.keys() != b.keys():
        raise UserError(f"a comparison needs the same seeds on both sides; got {sorted(a)} and {sorted(b)}.")
    clients = sorted(next(iter(a.values())))
    for seed in a:
        if not clients or sorted(a[seed]) != clients or sorted(b[seed]) != clients:
            raise UserError(
                f"a comparison needs the same clients on both sides and in every seed; seed {seed} differs."
            )
    pairs = np.asarray([[a[seed][client] - b[seed][client] for client in clients] for seed in sorted(a)], np.float64)
    units = pairs.mean(axis=1) if len(pairs) > 1 else pairs[0]
    mean = float(pairs.mean())
    error, reach = math.nan, math.nan
    if len(units) > 1:
        from scipy.stats import t  # late: it takes a second to import

        error = float(units.std(ddof=1) / np.sqrt(len(units)))
        reach = error * float(t.ppf((1 + level) / 2, len(units) - 1))
    return Difference(
        mean=mean,
        standard_error=error,
        low=mean - reach,
        high=mean + reach,
        wins=float(((pairs > 0) + 0.5 * (pairs == 0)).mean()),
        seeds=len(pairs),
        clients=len(clients),
        over="seeds" if len(pairs) > 1 else "clients",
    )
