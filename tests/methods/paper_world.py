"""Federated rounds as the papers write them, in NumPy and float64, for a model of two linear layers.

    y = W_dec W_enc x,    W = W_0 + s B A,    B: d_out × r,  A: r × d_in,    F = 1/(2n) Σ ‖y − t‖²

Nothing is padded, stacked layers do not exist, a matrix is formed wherever the paper writes one, and gradients are
worked out by hand: with the residuals R [n, d_out] over n, G_dec = Rᵀ H and G_enc = (R W_dec)ᵀ X are the gradients of
the weights, and ∂B = s G Aᵀ, ∂A = s Bᵀ G; with a matrix C between them ∂C = s Bᵀ G Aᵀ. Only a router's gradient is
taken as central differences. No line of this knows fedvlm_jax.

A `Theta` is what somebody holds: (layer, factor) -> matrix. Every method is a function of a `Problem` and gives, for
every round, the weights that each client computes with when the round is over, and the factors that the server holds
where a paper says what they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

LAYERS = ("encoder", "decoder")

Theta = dict[tuple[str, str], np.ndarray]
Weights = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]
Gradients = Callable[[Theta, np.ndarray, np.ndarray], Theta]


@dataclass(frozen=True)
class Problem:
    """What the clients have: batches[round][client] is the list of local steps, each (X [n, d_in], T [n, d_out]).

    `part` is what these clients have of all clients' weight.
    """

    base: Weights
    start: Theta
    scale: float
    rates: dict[str, float]
    shares: Sequence[float]
    batches: Sequence[Sequence[Sequence[Batch]]]
    ranks: Sequence[int] = ()
    part: float = 1.0

    @property
    def clients(self) -> range:
        return range(len(self.shares))

    def start_of(self, k: int) -> Theta:
        """What client k begins with: the first rows of A and columns of B, as many as its rank."""
        return cut(self.start, self.ranks[k]) if self.ranks else self.start


@dataclass(frozen=True)
class Round:
    """What clients compute with after a round, what the server holds, what each had when it sent (None: it did not)."""

    weights: list[Weights]
    shared: Theta = field(default_factory=dict)
    trained: list[Weights | None] = field(default_factory=list)


# Arithmetic


def cut(theta: Theta, rank: int) -> Theta:
    return {key: m[:rank] if key[1] == "A" else m[:, :rank] for key, m in theta.items()}


def pad(theta: Theta, like: Theta) -> Theta:
    """Zeros where a client of lower rank has nothing."""
    return {
        key: np.pad(m, [(0, n - o) for n, o in zip(like[key].shape, m.shape, strict=True)]) for key, m in theta.items()
    }


def only(theta: Theta, names: str) -> Theta:
    return {key: m for key, m in theta.items() if key[1] in names}


def mean(thetas: Sequence[Theta], shares: Sequence[float]) -> Theta:
    return {key: sum(p * theta[key] for p, theta in zip(shares, thetas, strict=True)) for key in thetas[0]}


def minus(one: Theta, other: Theta) -> Theta:
    return {key: one[key] - other[key] for key in one}


def plus(one: Theta, other: Theta, times: float = 1.0) -> Theta:
    return {key: one[key] + times * other[key] for key in one}


def products(theta: Theta) -> Weights:
    """B A, or B C A where there is something in between."""

    def middle(layer: str) -> np.ndarray:
        return theta.get((layer, "C"), np.eye(theta[layer, "A"].shape[0]))

    return {layer: theta[layer, "B"] @ middle(layer) @ theta[layer, "A"] for layer in LAYERS}


def effective(base: Weights, *terms: tuple[float, Theta]) -> Weights:
    """W_0 + Σ s B A."""
    return {layer: base[layer] + sum(s * products(theta)[layer] for s, theta in terms) for layer in LAYERS}


# Local training


def weight_gradients(weights: Weights, x: np.ndarray, t: np.ndarray) -> Weights:
    hidden = x @ weights["encoder"].T
    residuals = (hidden @ weights["decoder"].T - t) / len(x)
    return {"decoder": residuals.T @ hidden, "encoder": (residuals @ weights["decoder"]).T @ x}


def lora_gradients(base: Weights, scale: float) -> Gradients:
    """∂B = s G (C A)ᵀ, ∂C = s Bᵀ G Aᵀ, ∂A = s (B C)ᵀ G."""

    def gradients(theta: Theta, x: np.ndarray, t: np.ndarray) -> Theta:
        found = {}
        for layer, g in weight_gradients(effective(base, (scale, theta)), x, t).items():
            a, b = theta[layer, "A"], theta[layer, "B"]
            c = theta.get((layer, "C"), np.eye(len(a)))
            found |= {(layer, "B"): scale * g @ (c @ a).T, (layer, "A"): scale * (b @ c).T @ g}
            found |= {(layer, "C"): scale * b.T @ g @ a.T}
        return found

    return gradients


def descend(
    theta: Theta, steps: Sequence[Batch], rates: dict[str, float], gradients: Gradients, trained: str = "AB",
    pull: Callable[[Theta], Theta] | None = None,
) -> Theta:  # fmt: skip
    """θ ← θ − η (∇F(θ) + what pulls at it), once per batch."""
    for x, t in steps:
        g = gradients(theta, x, t)
        if pull is not None:
            g |= {key: g[key] + force for key, force in pull(theta).items()}
        theta = {key: m - rates[key[1]] * g[key] if key[1] in trained else m for key, m in theta.items()}
    return theta


# Share rules with what can be chosen beside them

ServerStep = Callable[[Theta], Theta]


def fedavg_server(update: Theta) -> Theta:
    return update


def make_fedopt(kind: str, rate: float, beta1: float, beta2: float, tau: float) -> ServerStep:
    """arXiv 2003.00295, algorithm 2, in which v has the squared pseudo-gradient; momentum: arXiv 1909.06335."""
    m: Theta = {}
    v: Theta = {}

    def step(update: Theta) -> Theta:
        moved = {}
        for key, delta in update.items():
            if kind == "momentum":
                m[key] = beta1 * m.get(key, 0) + delta
                moved[key] = rate * m[key]
                continue
            m[key] = beta1 * m.get(key, 0) + (1 - beta1) * delta
            before = v.get(key, np.full_like(delta, tau**2))
            v[key] = {
                "adagrad": before + delta**2,
                "yogi": before - (1 - beta2) * delta**2 * np.sign(before - delta**2),
                "adam": beta2 * before + (1 - beta2) * delta**2,
            }[kind]
            moved[key] = rate * m[key] / (np.sqrt(v[key]) + tau)
        return moved

    return step
