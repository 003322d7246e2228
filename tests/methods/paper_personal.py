"""The methods with two models per client, or with a download of its own for each; in the terms of `paper_world`."""

from collections.abc import Callable, Sequence

import numpy as np
from paper_world import LAYERS, Problem, Round, Theta, Weights, descend, effective, lora_gradients, mean, minus, only


def ditto(problem: Problem, strength: float) -> list[Round]:
    """arXiv 2012.04221: v_k ← v_k − η (∇F_k(v_k) + λ (v_k − w)), with the w that the client received."""
    w, v, rounds = problem.start, [problem.start for _ in problem.clients], []
    grads = lora_gradients(problem.base, problem.scale)
    for batches in problem.batches:
        received = w

        def pull(theta: Theta, received: Theta = received) -> Theta:
            return {key: strength * (theta[key] - m) for key, m in received.items()}

        v = [descend(v[k], batches[k], problem.rates, grads, "AB", pull) for k in problem.clients]
        w = mean([descend(received, batches[k], problem.rates, grads) for k in problem.clients], problem.shares)
        own = [effective(problem.base, (problem.scale, one)) for one in v]
        rounds.append(Round(own, w, own))
    return rounds


def apfl(problem: Problem, alpha: float, adaptive: bool = False) -> list[Round]:
    """arXiv 2003.13461, algorithm 1: w and v step side by side, v̄ = α v + (1 − α) w.

        w ← w − η ∇F(w),    v ← v − η ∇_v F(v̄),    adaptive (equation 10): α ← α − η ⟨∇F(v̄), v − w⟩

    and the client uses v̄ with the w that it received last. α is kept between 0 and 1 at the end of a round.
    """
    w, v, rounds = problem.start, [problem.start for _ in problem.clients], []
    alphas = [alpha for _ in problem.clients]
    grads = lora_gradients(problem.base, problem.scale)
    for batches in problem.batches:
        sent = []
        for k in problem.clients:
            mine = w
            for x, t in batches[k]:
                at_mixture = grads(mix(v[k], mine, alphas[k]), x, t)
                slope = sum(np.sum(at_mixture[key] * (v[k][key] - mine[key])) for key in mine)
                at_w = grads(mine, x, t)
                new_v = {key: m - problem.rates[key[1]] * alphas[k] * at_mixture[key] for key, m in v[k].items()}
                mine = {key: m - problem.rates[key[1]] * at_w[key] for key, m in mine.items()}
                v[k] = new_v
                alphas[k] -= problem.rates["B"] * slope if adaptive else 0.0
            alphas[k] = min(max(alphas[k], 0.0), 1.0)
            sent.append(mine)
        w = mean(sent, problem.shares)
        mixed = [mix(v[k], w, alphas[k]) for k in problem.clients]
        before = [mix(v[k], sent[k], alphas[k]) for k in problem.clients]
        after, trained = ([effective(problem.base, (problem.scale, one)) for one in part] for part in (mixed, before))
        rounds.append(Round(after, w, trained))
    return rounds


def mix(one: Theta, other: Theta, weight: float) -> Theta:
    """weight · one + (1 − weight) · other."""
    return mean([one, other], [weight, 1 - weight])


def pfedme(
    problem: Problem, strength: float, inner: int, rate: float, beta: float, restart: bool = False
) -> list[Round]:
    """arXiv 2006.08848, algorithm 1: per local round θ ≈ argmin F(θ; one batch) + λ/2 ‖θ − w_k‖² by a few steps.

    Then w_k ← w_k − η λ (w_k − θ), and w ← (1 − β) w + β Σ p_k w_k. θ goes on from where it was, or from w where a
    round restarts it (the authors' code), and is the client's.
    """
    w, theta, rounds = problem.start, [problem.start for _ in problem.clients], []
    grads = lora_gradients(problem.base, problem.scale)
    for batches in problem.batches:
        sent = []
        theta = [w for _ in problem.clients] if restart else theta
        for k in problem.clients:
            mine = w
            for first in range(0, len(batches[k]), inner):
                centre = mine

                def pull(now: Theta, centre: Theta = centre) -> Theta:
                    return {key: strength * (now[key] - m) for key, m in centre.items()}

                theta[k] = descend(theta[k], batches[k][first : first + inner], problem.rates, grads, "AB", pull)
                mine = {key: m - rate * strength * (m - theta[k][key]) for key, m in mine.items()}
            sent.append(mine)
        w = mix(mean(sent, problem.shares), w, beta)
        own = [effective(problem.base, (problem.scale, one)) for one in theta]
        rounds.append(Round(own, w, own))
    return rounds


# Two adapters per client


def feddpa(problem: Problem, alpha: float, local_steps: Callable[[int, int], int], whole: bool = False) -> list[Round]:
    """arXiv 2403.19211: W_0 + (1−α) s B_g A_g + α s B_l A_l.

    The local pair is trained first, beside the global pair as it was received and frozen; then the global pair, alone
    (the order of the authors' code). local_steps: (round, steps that a client takes) -> how many of them, the first
    ones, are the local pair's; the others are the global pair's, which takes all of them if whole. Who has not trained
    a local pair yet uses the global one as it is.
    """
    shared, own, rounds = problem.start, [problem.start for _ in problem.clients], []
    begun = [False for _ in problem.clients]
    for number, batches in enumerate(problem.batches, start=1):
        sent = []
        for k in problem.clients:
            first = local_steps(number, len(batches[k]))
            beside = effective(problem.base, ((1 - alpha) * problem.scale, shared))
            own[k] = descend(own[k], batches[k][:first], problem.rates, lora_gradients(beside, alpha * problem.scale))
            begun[k] |= first > 0
            alone = lora_gradients(problem.base, problem.scale)
            sent.append(descend(shared, batches[k][0 if whole else first :], problem.rates, alone))
        shared = mean(sent, problem.shares)

        def use(k: int, pair: Theta) -> Weights:
            a = alpha if begun[k] else 0.0
            return effective(problem.base, ((1 - a) * problem.scale, pair), (a * problem.scale, own[k]))

        after = [use(k, shared) for k in problem.clients]
        rounds.append(Round(after, shared, [use(k, sent[k]) for k in problem.clients]))
    return rounds


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(z / T), row by row."""
    raised = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return raised / raised.sum(axis=1, keepdims=True)


def feddat(problem: Problem, weight: float, temperature: float) -> list[Round]:
    """arXiv 2308.12305 as its authors' code has it: t = ½ l + ½ r, r a frozen copy of the g that was received.

        g: (1−w) F(g) + w T² KL(σ(z_t/T) ‖ σ(z_g/T)),    then l: (1−w) F(t) + w T² KL(σ(z_g/T) ‖ σ(z_t/T))

    on every batch, with z_g of before the step of g. The gradient of T² KL by a student's logits is T (σ_student −
    σ_teacher), over the rows; that of F is (z − t), over the rows. Here the outputs are the logits of one token.
    """
    s, shared, own, rounds = problem.scale, problem.start, [problem.start for _ in problem.clients], []

    def outputs(weights: Weights, x: np.ndarray) -> np.ndarray:
        return x @ weights["encoder"].T @ weights["decoder"].T

    def step(theta: Theta, base: Weights, scale: float, x: np.ndarray, t: np.ndarray, taught: np.ndarray) -> Theta:
        z = outputs(effective(base, (scale, theta)), x)
        apart = temperature * (softened(z, temperature) - softened(taught, temperature))
        wanted = z - ((1 - weight) * (z - t) + weight * apart)  # whose squared error has the gradient of the sum
        return descend(theta, [(x, wanted)], problem.rates, lora_gradients(base, scale))

    for batches in problem.batches:
        sent = []
        for k in problem.clients:
            beside, g = effective(problem.base, (s / 2, shared)), shared
            for x, t in batches[k]:
                of_teacher = outputs(effective(beside, (s / 2, own[k])), x)
                of_global = outputs(effective(problem.base, (s, g)), x)
                g = step(g, problem.base, s, x, t, of_teacher)
                own[k] = step(own[k], beside, s / 2, x, t, of_global)
            sent.append(g)
        shared = mean(sent, problem.shares)
        after, trained = (
            [
                effective(problem.base, (s / 2, own[k]), (s / 2, pair))
                for k, pair in zip(problem.clients, part, strict=True)
            ]
            for part in ([shared] * len(sent), sent)
        )
        rounds.append(Round(after, shared, trained))
    return rounds


def cosine_softmax(moved: Sequence[Theta], temperature: float, *, own: bool) -> np.ndarray:
    """Row k: softmax over j of cos(Δ_k, Δ_j) / τ; j = k only if `own`."""
    vectors = [np.concatenate([m.ravel() for _, m in sorted(one.items())]) for one in moved]
    shares = np.zeros((len(moved), len(moved)))
    for k, x in enumerate(vectors):
        for j, y in enumerate(vectors):
            if own or j != k:
                lengths = np.linalg.norm(x) * np.linalg.norm(y)  # who never moved is like nobody
                shares[k, j] = np.exp(x @ y / max(lengths, 1e-300) / temperature)
    return shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)


Turns = Sequence[Sequence[float]]


def who_is_there(problem: Problem, turns: Turns | None) -> list[list[int]]:
    """The clients of every round: those that have a weight in it."""
    everybody = [[1.0 for _ in problem.clients] for _ in problem.batches]
    return [[k for k in problem.clients if row[k] > 0] for row in turns or everybody]


def fedmosaic(problem: Problem, weight: float, temperature: float, turns: Turns | None = None) -> list[Round]:
    """arXiv 2506.11024 without Co-LoRA: (1−w) own pair + w Σ_{j≠k} w_kj (A_j, B_j), the latter frozen.

    The server has the newest pair of everybody who ever was there. The similarity is that of how far the pairs went,
    and the weight is fixed: both are ours, and said to be.
    """
    nothing = {key: np.zeros_like(m) for key, m in problem.start.items()}
    own, rounds = [problem.start for _ in problem.clients], []
    latest: dict[int, Theta] = {}

    def mix_for(k: int) -> Theta:
        others = [j for j in sorted(latest) if j != k]
        if not others:
            return nothing
        moved = [minus(own[k], problem.start), *(minus(latest[j], problem.start) for j in others)]
        shares = cosine_softmax(moved, temperature, own=False)[0, 1:]
        return mean([latest[j] for j in others], shares.tolist())

    s = problem.scale
    for batches, there in zip(problem.batches, who_is_there(problem, turns), strict=True):
        beside = {k: mix_for(k) for k in there}
        for k in there:
            frozen = effective(problem.base, (weight * s, beside[k]))
            own[k] = descend(own[k], batches[k], problem.rates, lora_gradients(frozen, (1 - weight) * s))
        latest |= {k: own[k] for k in there}
        mixed = {k: mix_for(k) for k in problem.clients}
        after, trained = (
            [effective(problem.base, ((1 - weight) * s, own[k]), (weight * s, part[k])) if k in part else None
             for k in problem.clients]
            for part in (mixed, beside)
        )  # fmt: skip
        rounds.append(Round(after, trained=trained))
    return rounds


def ce_lora(problem: Problem, temperature: float, turns: Turns | None = None) -> list[Round]:
    """arXiv 2503.23869: ΔW = B C A, all trained, C_k ← Σ_j w_kj C_j; C starts as 1. The similarity is ours.

    The server has the newest C of everybody who ever was there; who never was is in no mixture, its own included.
    """
    identity = {(layer, "C"): np.eye(problem.start[layer, "A"].shape[0]) for layer in LAYERS}
    own, rounds = [problem.start | identity for _ in problem.clients], []
    latest: dict[int, Theta] = {}
    grads = lora_gradients(problem.base, problem.scale)

    def mix_for(k: int) -> Theta:
        if not latest:
            return own[k]
        who = sorted(latest)
        moved = [minus(only(own[k], "C"), identity), *(minus(latest[j], identity) for j in who)]
        shares = cosine_softmax(moved, temperature, own=False)[0, 1:]
        return own[k] | mean([latest[j] for j in who], shares.tolist())

    for batches, there in zip(problem.batches, who_is_there(problem, turns), strict=True):
        begun = {k: mix_for(k) for k in there}
        own = [
            descend(begun[k], batches[k], problem.rates, grads, "ABC") if k in there else own[k]
            for k in problem.clients
        ]
        trained = [effective(problem.base, (problem.scale, own[k])) if k in there else None for k in problem.clients]
        latest |= {k: only(own[k], "C") for k in there}
        rounds.append(
            Round([effective(problem.base, (problem.scale, mix_for(k))) for k in problem.clients], trained=trained)
        )
    return rounds


# A router


def routed_output(base: Weights, own: Theta, rest: Theta, scale: float, x: np.ndarray) -> np.ndarray:
    """Layer by layer y = W_0 x + s [α(x) B A x + (1 − α(x)) B^R A^R x], (α, 1 − α) = softmax(G x)."""
    for layer in LAYERS:
        scores = np.exp(x @ own[layer, "G"].T)
        alpha = (scores[:, 0] / scores.sum(axis=1))[:, None]
        pairs = [x @ theta[layer, "A"].T @ theta[layer, "B"].T for theta in (own, rest)]
        x = x @ base[layer].T + scale * (alpha * pairs[0] + (1 - alpha) * pairs[1])
    return x


def differences(loss: Callable[[Theta], float], theta: Theta, step: float = 1e-6) -> Theta:
    """Central differences, entry by entry."""
    gradient = {}
    for key, m in theta.items():
        gradient[key] = np.zeros_like(m)
        for at in np.ndindex(*m.shape):
            nudge = np.zeros_like(m)
            nudge[at] = step
            ahead, behind = (loss({**theta, key: m + sign * nudge}) for sign in (1, -1))
            gradient[key][at] = (ahead - behind) / (2 * step)
    return gradient


def fedalt(
    problem: Problem, probe: np.ndarray, turns: Turns | None = None
) -> list[tuple[list[np.ndarray], list[np.ndarray | None]]]:
    """arXiv 2503.11880: own pair and router are trained, the pair B^R A^R, plain means of the others', is frozen.

    The others are all who ever were there, with their newest pairs. A matrix does not say what such a client computes,
    so this gives outputs on `probe`, [round] -> of every client after the round, and of those who were there when they
    sent.
    """
    routers = {(layer, "G"): np.zeros((2, problem.base[layer].shape[1])) for layer in LAYERS}
    nothing = {key: np.zeros_like(m) for key, m in problem.start.items()}
    own, rounds = [problem.start | routers for _ in problem.clients], []
    latest: dict[int, Theta] = {}

    def mean_for(k: int) -> Theta:
        others = [pair for j, pair in latest.items() if j != k]
        return mean(others, [1 / len(others)] * len(others)) if others else nothing

    for batches, there in zip(problem.batches, who_is_there(problem, turns), strict=True):
        rest = {k: mean_for(k) for k in there}
        for k in there:

            def gradients(
                theta: Theta, x: np.ndarray, t: np.ndarray, k: int = k, rest: dict[int, Theta] = rest
            ) -> Theta:
                def loss(at: Theta) -> float:
                    y = routed_output(problem.base, at, rest[k], problem.scale, x)
                    return 0.5 * float(np.sum((y - t) ** 2)) / len(x)

                return differences(loss, theta)

            own[k] = descend(own[k], batches[k], problem.rates, gradients, "ABG")
        latest |= {k: only(own[k], "AB") for k in there}
        after, trained = (
            [routed_output(problem.base, own[k], part[k], problem.scale, probe) if k in part else None
             for k in problem.clients]
            for part in ({k: mean_for(k) for k in problem.clients}, rest)
        )  # fmt: skip
        rounds.append((after, trained))
    return rounds


# Shared bottlenecks, private LoRA


def bottleneck_output(base: Weights, theta: Theta, scale: float, x: np.ndarray) -> np.ndarray:
    """y = (W_0 + s B A) x, then y + U [gelu(D [y, 1]), 1], layer by layer; the last columns of D and U are biases."""
    for layer in LAYERS:
        y = x @ (base[layer] + scale * theta[layer, "B"] @ theta[layer, "A"]).T
        h = with_ones(y) @ theta[layer, "D"].T
        g = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = y + with_ones(g) @ theta[layer, "U"].T
    return x


def with_ones(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def pftt(problem: Problem, bottlenecks: Theta, probe: np.ndarray) -> list[tuple[Theta, list[Theta], list[np.ndarray]]]:
    """arXiv 2404.13238v1: all of D, U, A_k and B_k are trained; D̄ = Σ p_k D_k and Ū = Σ p_k U_k, A_k and B_k stay.

    -> of every round the shared part, the clients' private parts, and their outputs on `probe`.
    """
    rates = {**problem.rates, "D": problem.rates["B"], "U": problem.rates["B"]}
    shared, own, rounds = bottlenecks, [problem.start_of(k) for k in problem.clients], []

    def gradients(theta: Theta, x: np.ndarray, t: np.ndarray) -> Theta:
        def loss(at: Theta) -> float:
            return 0.5 * float(np.sum((bottleneck_output(problem.base, at, problem.scale, x) - t) ** 2)) / len(x)

        return differences(loss, theta)

    for batches in problem.batches:
        after = [descend(shared | own[k], batches[k], rates, gradients, "ABDU") for k in problem.clients]
        own = [only(theta, "AB") for theta in after]
        shared = mean([only(theta, "DU") for theta in after], problem.shares)
        outputs = [bottleneck_output(problem.base, shared | mine, problem.scale, probe) for mine in own]
        rounds.append((shared, own, outputs))
    return rounds


# Personal models around their mean


def pfit(problem: Problem, pull: float, layer: str) -> list[Round]:
    """arXiv 2404.13238v1 for any loss: θ_k ← θ_k − η (∇F_k(θ_k) + λ (θ_k − θ_g)) in one layer, θ_g ← Σ p_k θ_k.

    Every θ_k goes on from where it was; θ_g is what the clients received.
    """
    frozen = {key: m for key, m in problem.start.items() if key[0] != layer}
    shared = {key: m for key, m in problem.start.items() if key[0] == layer}
    own, rounds = [shared for _ in problem.clients], []
    whole = lora_gradients(problem.base, problem.scale)

    def gradients(theta: Theta, x: np.ndarray, t: np.ndarray) -> Theta:
        return {key: g for key, g in whole(frozen | theta, x, t).items() if key in theta}

    for batches in problem.batches:
        received = shared

        def towards(theta: Theta, received: Theta = received) -> Theta:
            return {key: pull * (theta[key] - m) for key, m in received.items()}

        own = [descend(own[k], batches[k], problem.rates, gradients, "AB", towards) for k in problem.clients]
        shared = mean(own, problem.shares)
        after = [effective(problem.base, (problem.scale, frozen | one)) for one in own]
        rounds.append(Round(after, shared, after))
    return rounds
