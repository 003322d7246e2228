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
    """What the clients have: batches[round][client] is the list of local steps, each (X [n, d_in], T [n, d_out])."""

    base: Weights
    start: Theta
    scale: float
    rates: dict[str, float]
    shares: Sequence[float]
    batches: Sequence[Sequence[Sequence[Batch]]]
    ranks: Sequence[int] = ()
    population: int = 3

    @property
    def clients(self) -> range:
        return range(len(self.shares))

    def start_of(self, k: int) -> Theta:
        """What client k begins with: the first rows of A and columns of B, as many as its rank."""
        return cut(self.start, self.ranks[k]) if self.ranks else self.start


@dataclass(frozen=True)
class Round:
    weights: list[Weights]
    shared: Theta = field(default_factory=dict)


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


def share(
    problem: Problem,
    belongs: Callable[[tuple[str, str]], bool],
    *,
    trained: Callable[[int], str] = lambda round_: "AB",
    restart: bool = False,
    mu: float = 0.0,
    scaffold: bool = False,
    server_step: ServerStep = fedavg_server,
    combine: Callable[[list[Theta]], Theta] | None = None,
    hand_out: Callable[[Theta, int], Theta] = cut,
) -> list[Round]:
    """θ_shared ← θ_shared + server(Σ p_k Δ_k); what `belongs` does not name stays with its client.

    mu: FedProx, arXiv 1812.06127. scaffold: arXiv 1910.06378, option II. combine: the clients' shared factors, padded
    -> the server's, in place of the mean. hand_out: what a client of a rank makes of the server's factors.
    """
    shared = {key: m for key, m in problem.start.items() if belongs(key)}
    own = [{key: m for key, m in problem.start_of(k).items() if not belongs(key)} for k in problem.clients]
    c = {key: np.zeros_like(m) for key, m in shared.items()}
    c_k = [dict(c) for _ in problem.clients]
    rounds = []
    for number, batches in enumerate(problem.batches, start=1):
        sent, moved, kept = [], [], []
        for k in problem.clients:
            received = hand_out(shared, problem.ranks[k]) if problem.ranks else shared

            correction = minus(c, c_k[k]) if scaffold else {}

            def pull(theta: Theta, received: Theta = received, correction: Theta = correction) -> Theta:
                return {key: mu * (theta[key] - m) + correction.get(key, 0) for key, m in received.items()}

            theta = descend(
                received | own[k], batches[k], problem.rates, lora_gradients(problem.base, problem.scale),
                trained(number), pull,
            )  # fmt: skip
            mine = {key: theta[key] for key in shared}
            kept.append(own[k] if restart else {key: theta[key] for key in own[k]})
            if scaffold:
                steps = len(batches[k])
                new = {
                    key: c_k[k][key] - c[key] + (received[key] - mine[key]) / (steps * problem.rates[key[1]])
                    for key in c
                }
                moved.append(minus(new, c_k[k]))
            sent.append(pad(mine, shared))
        if combine is not None:
            shared = combine(sent)
        elif shared:
            shared = plus(shared, server_step(minus(mean(sent, problem.shares), shared)))
        if scaffold:
            c_k = [plus(old, change) for old, change in zip(c_k, moved, strict=True)]
            c = plus(c, mean(moved, [1 / problem.population] * len(moved)))
        own = kept
        theirs = [hand_out(shared, problem.ranks[k]) if problem.ranks else shared for k in problem.clients]
        weights = [effective(problem.base, (problem.scale, theirs[k] | own[k])) for k in problem.clients]
        rounds.append(Round(weights, shared))
    return rounds


def local(problem: Problem) -> list[Round]:
    return share(problem, lambda key: False)


def fedavg_lora(problem: Problem, **choices: object) -> list[Round]:
    """arXiv 2305.05644: Ā = Σ p_k A_k, B̄ = Σ p_k B_k."""
    return share(problem, lambda key: True, **choices)  # type: ignore[arg-type]


def plora(problem: Problem, **choices: object) -> list[Round]:
    """arXiv 2507.17088: B̄ = Σ p_k B_k, A_k private."""
    return share(problem, lambda key: key[1] == "B", **choices)  # type: ignore[arg-type]


def plora_reset_a(problem: Problem) -> list[Round]:
    """arXiv 2509.25414 as its code has it: A_k = A_0 at the start of every round."""
    return share(problem, lambda key: key[1] == "B", restart=True)


def fedsa_lora(problem: Problem) -> list[Round]:
    """arXiv 2410.01463: Ā = Σ p_k A_k, B_k private."""
    return share(problem, lambda key: key[1] == "A")


def ffa_lora(problem: Problem) -> list[Round]:
    """arXiv 2403.12313: A ≡ A_0, B̄ = Σ p_k B_k."""
    return share(problem, lambda key: key[1] == "B", trained=lambda round_: "B")


def rolora(problem: Problem) -> list[Round]:
    """arXiv 2409.02346: B in odd rounds, A in even ones, the other one frozen."""
    return share(problem, lambda key: True, trained=lambda round_: "B" if round_ % 2 else "A")


def iat(problem: Problem) -> list[Round]:
    """arXiv 2606.08687: encoders share B and keep A, the decoder shares A and keeps B."""
    return share(problem, lambda key: key in {("encoder", "B"), ("decoder", "A")})


def iat_inverted(problem: Problem) -> list[Round]:
    return share(problem, lambda key: key in {("encoder", "A"), ("decoder", "B")})


# The mean of products


def mean_product(thetas: Sequence[Theta], shares: Sequence[float]) -> Weights:
    """Σ p_k B_k A_k, formed."""
    return {layer: sum(p * products(theta)[layer] for p, theta in zip(shares, thetas, strict=True)) for layer in LAYERS}


def best_factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A of the truncated SVD, with √Σ in each."""
    u, s, vt = np.linalg.svd(matrix)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def flexlora(problem: Problem) -> list[Round]:
    """arXiv 2402.11505: Σ p_k B_k A_k = U Σ Vᵀ, of which a client of rank r gets the first r components."""
    rank = problem.start["encoder", "A"].shape[0]

    def combine(sent: list[Theta]) -> Theta:
        shared = {}
        for layer, matrix in mean_product(sent, problem.shares).items():
            shared[layer, "B"], shared[layer, "A"] = best_factors(matrix, rank)
        return shared

    return share(problem, lambda key: True, combine=combine)


def hetlora(problem: Problem) -> list[Round]:
    """arXiv 2401.06432: zero-padded, weights ∝ ‖B_k A_k‖_F, truncated by every client to its own rank."""

    def combine(sent: list[Theta]) -> Theta:
        shared = {}
        for layer in LAYERS:
            norms = np.asarray([np.linalg.norm(products(theta)[layer]) for theta in sent])
            both = [{key: m for key, m in theta.items() if key[0] == layer} for theta in sent]
            shared |= mean(both, norms / norms.sum())
        return shared

    return share(problem, lambda key: True, combine=combine)


def lora_fair(problem: Problem, ridge: float) -> list[Round]:
    """arXiv 2411.14961, Frobenius form: min over ΔB of ‖ΔW − (B̄ + ΔB) Ā‖² + λ‖ΔB‖², as a least-squares problem."""

    def combine(sent: list[Theta]) -> Theta:
        shared = mean(sent, problem.shares)
        for layer, wanted in mean_product(sent, problem.shares).items():
            a, b = shared[layer, "A"], shared[layer, "B"]
            left = np.hstack([a, np.sqrt(ridge) * np.eye(len(a))])  # ΔB left = right
            right = np.hstack([wanted - b @ a, np.zeros((len(b), len(a)))])
            shared[layer, "B"] = b + np.linalg.lstsq(left.T, right.T, rcond=None)[0].T
        return shared

    return share(problem, lambda key: True, combine=combine)


def fedsvd(problem: Problem, every: int) -> list[Round]:
    """arXiv 2505.12805: ffa-lora; every few rounds B̄ A = U Σ Vᵀ, A ← V_rᵀ, B ← U_r Σ_r."""
    number = 0
    rank = problem.start["encoder", "A"].shape[0]

    def combine(sent: list[Theta]) -> Theta:
        nonlocal number
        number += 1
        shared = mean(sent, problem.shares)
        if number % every == 0:
            for layer, matrix in products(shared).items():
                u, s, vt = np.linalg.svd(matrix)
                shared[layer, "B"], shared[layer, "A"] = u[:, :rank] * s[:rank], vt[:rank]
        return shared

    return share(problem, lambda key: True, trained=lambda round_: "B", combine=combine)


def fedex_lora(problem: Problem) -> list[Round]:
    """arXiv 2410.09432: Ā and B̄, and W_0 ← W_0 + s (Σ p_k B_k A_k − B̄ Ā)."""
    base, shared, rounds = problem.base, problem.start, []
    for batches in problem.batches:
        grads = lora_gradients(base, problem.scale)
        sent = [descend(shared, batches[k], problem.rates, grads) for k in problem.clients]
        shared = mean(sent, problem.shares)
        exact, inexact = mean_product(sent, problem.shares), products(shared)
        base = {layer: base[layer] + problem.scale * (exact[layer] - inexact[layer]) for layer in LAYERS}
        rounds.append(Round([effective(base, (problem.scale, shared))] * len(sent), shared))
    return rounds


def flora(problem: Problem, drawn: Sequence[Sequence[Theta]]) -> list[Round]:
    """arXiv 2409.05976: B = [B_1 … B_K], A = [p_1 A_1; …; p_K A_K], W_0 ← W_0 + s B A.

    drawn: [round][client], what each begins a round with.
    """
    base, rounds = problem.base, []
    for batches, begun in zip(problem.batches, drawn, strict=True):
        grads = lora_gradients(base, problem.scale)
        begun = [cut(theta, problem.ranks[k]) if problem.ranks else theta for k, theta in enumerate(begun)]
        sent = [descend(begun[k], batches[k], problem.rates, grads) for k in problem.clients]
        new = {}
        for layer in LAYERS:
            b = np.hstack([theta[layer, "B"] for theta in sent])
            a = np.vstack([p * theta[layer, "A"] for p, theta in zip(problem.shares, sent, strict=True)])
            new[layer] = base[layer] + problem.scale * b @ a
        base = new
        rounds.append(Round([base] * len(sent)))
    return rounds


def fed_sb(problem: Problem) -> list[Round]:
    """arXiv 2502.15436: ΔW = B R A, only R is trained; R̄ = Σ p_k R_k. R is the C of these functions."""
    shared, rounds = problem.start, []
    for batches in problem.batches:
        grads = lora_gradients(problem.base, problem.scale)
        shared = mean([descend(shared, batches[k], problem.rates, grads, "C") for k in problem.clients], problem.shares)
        rounds.append(Round([effective(problem.base, (problem.scale, shared))] * len(problem.clients), shared))
    return rounds


def low_rank_and_sparse(matrix: np.ndarray, steps: int = 4_000) -> tuple[np.ndarray, np.ndarray]:
    """min ‖L‖_* + λ‖S‖_1, L + S = M, λ = 1/√max(d, K) (arXiv 0912.3599), by Douglas–Rachford on (L, S).

    The sum of the two norms is one function, the plane L + S = M the other; the projection onto the plane halves what
    is missing.
    """
    rate = 1 / np.sqrt(max(matrix.shape))
    step = np.abs(matrix).mean() * 2
    low, sparse = matrix / 2, matrix / 2
    for _ in range(steps):
        missing = (matrix - low - sparse) / 2
        in_plane = low + missing, sparse + missing
        u, s, vt = np.linalg.svd(2 * in_plane[0] - low, full_matrices=False)
        new_low = (u * np.maximum(s - step, 0)) @ vt
        other = 2 * in_plane[1] - sparse
        new_sparse = np.sign(other) * np.maximum(np.abs(other) - step * rate, 0)
        low, sparse = low + new_low - in_plane[0], sparse + new_sparse - in_plane[1]
    missing = (matrix - low - sparse) / 2
    return low + missing, sparse + missing


def fedrpca(problem: Problem, beta: float) -> list[Round]:
    """arXiv 2506.01194: the columns vec(Δ_k) of a factor are L + S; the update is mean(L) + β mean(S)."""
    before = dict(problem.start)

    def combine(sent: list[Theta]) -> Theta:
        nonlocal before
        new = {}
        for key, m in before.items():
            low, sparse = low_rank_and_sparse(np.stack([(theta[key] - m).ravel() for theta in sent], axis=1))
            new[key] = m + ((low + beta * sparse) @ np.asarray(problem.shares)).reshape(m.shape)
        before = new
        return new

    return share(problem, lambda key: True, combine=combine)


# Two models per client


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
        rounds.append(Round([effective(problem.base, (problem.scale, one)) for one in v], w))
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
        rounds.append(Round([effective(problem.base, (problem.scale, one)) for one in mixed], w))
    return rounds


def mix(one: Theta, other: Theta, weight: float) -> Theta:
    """weight · one + (1 − weight) · other."""
    return mean([one, other], [weight, 1 - weight])


def pfedme(problem: Problem, strength: float, inner: int, rate: float, beta: float) -> list[Round]:
    """arXiv 2006.08848, algorithm 1: per local round θ ≈ argmin F(θ; one batch) + λ/2 ‖θ − w_k‖² by a few steps.

    Then w_k ← w_k − η λ (w_k − θ), and w ← (1 − β) w + β Σ p_k w_k. θ goes on from where it was, and is the client's.
    """
    w, theta, rounds = problem.start, [problem.start for _ in problem.clients], []
    grads = lora_gradients(problem.base, problem.scale)
    for batches in problem.batches:
        sent = []
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
        rounds.append(Round([effective(problem.base, (problem.scale, one)) for one in theta], w))
    return rounds


# Two adapters per client


def feddpa(problem: Problem, alpha: float, local_steps: Callable[[int, int], int]) -> list[Round]:
    """arXiv 2403.19211: W_0 + (1−α) s B_g A_g + α s B_l A_l.

    The local pair is trained first, beside the global pair as it was received and frozen; then the global pair, alone
    (the order of the authors' code). local_steps: (round, steps that a client takes) -> how many of them, the first
    ones, are the local pair's; the others are the global pair's. Who has not trained a local pair yet uses the global
    one as it is.
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
            sent.append(descend(shared, batches[k][first:], problem.rates, alone))
        shared = mean(sent, problem.shares)
        weights = []
        for k in problem.clients:
            a = alpha if begun[k] else 0.0
            weights.append(effective(problem.base, ((1 - a) * problem.scale, shared), (a * problem.scale, own[k])))
        rounds.append(Round(weights, shared))
    return rounds


def cosine_softmax(moved: Sequence[Theta], temperature: float, *, own: bool) -> np.ndarray:
    """Row k: softmax over j of cos(Δ_k, Δ_j) / τ; j = k only if `own`."""
    vectors = [np.concatenate([m.ravel() for _, m in sorted(one.items())]) for one in moved]
    shares = np.zeros((len(moved), len(moved)))
    for k, x in enumerate(vectors):
        for j, y in enumerate(vectors):
            if own or j != k:
                shares[k, j] = np.exp(x @ y / np.linalg.norm(x) / np.linalg.norm(y) / temperature)
    return shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)


def fedmosaic(problem: Problem, weight: float, temperature: float) -> list[Round]:
    """arXiv 2506.11024 without Co-LoRA: (1−w) own pair + w Σ_{j≠k} w_kj (A_j, B_j), the latter frozen.

    The similarity is that of how far the pairs went, and the weight is fixed: both are ours, and said to be.
    """
    nothing = {key: np.zeros_like(m) for key, m in problem.start.items()}
    own, mixed, rounds = [problem.start for _ in problem.clients], [nothing for _ in problem.clients], []
    for batches in problem.batches:
        for k in problem.clients:
            beside = effective(problem.base, (weight * problem.scale, mixed[k]))
            grads = lora_gradients(beside, (1 - weight) * problem.scale)
            own[k] = descend(own[k], batches[k], problem.rates, grads)
        if len(own) > 1:
            shares = cosine_softmax([minus(one, problem.start) for one in own], temperature, own=False)
            mixed = [mean(own, row.tolist()) for row in shares]
        s = problem.scale
        weights = [effective(problem.base, ((1 - weight) * s, own[k]), (weight * s, mixed[k])) for k in problem.clients]
        rounds.append(Round(weights))
    return rounds


def ce_lora(problem: Problem, temperature: float) -> list[Round]:
    """arXiv 2503.23869: ΔW = B C A, all trained, C_k ← Σ_j w_kj C_j; C starts as 1. The similarity is ours."""
    identity = {(layer, "C"): np.eye(problem.start[layer, "A"].shape[0]) for layer in LAYERS}
    own, rounds = [problem.start | identity for _ in problem.clients], []
    grads = lora_gradients(problem.base, problem.scale)
    for batches in problem.batches:
        own = [descend(own[k], batches[k], problem.rates, grads, "ABC") for k in problem.clients]
        middles = [only(theta, "C") for theta in own]
        shares = cosine_softmax([minus(c, identity) for c in middles], temperature, own=True)
        own = [own[k] | mean(middles, shares[k].tolist()) for k in problem.clients]
        rounds.append(Round([effective(problem.base, (problem.scale, theta)) for theta in own]))
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


def fedalt(problem: Problem, probe: np.ndarray) -> list[list[np.ndarray]]:
    """arXiv 2503.11880: own pair and router are trained, the pair B^R A^R, plain means of the others', is frozen.

    A matrix does not say what such a client computes, so this gives its outputs on `probe`, [round][client].
    """
    routers = {(layer, "G"): np.zeros((2, problem.base[layer].shape[1])) for layer in LAYERS}
    nothing = {key: np.zeros_like(m) for key, m in problem.start.items()}
    own, rest = [problem.start | routers for _ in problem.clients], [nothing for _ in problem.clients]
    rounds = []
    for batches in problem.batches:
        for k in problem.clients:

            def gradients(theta: Theta, x: np.ndarray, t: np.ndarray, k: int = k) -> Theta:
                def loss(at: Theta) -> float:
                    y = routed_output(problem.base, at, rest[k], problem.scale, x)
                    return 0.5 * float(np.sum((y - t) ** 2)) / len(x)

                return differences(loss, theta)

            own[k] = descend(own[k], batches[k], problem.rates, gradients, "ABG")
        pairs = [only(theta, "AB") for theta in own]
        for k in problem.clients:
            others = [pairs[j] for j in problem.clients if j != k]
            rest[k] = mean(others, [1 / len(others)] * len(others)) if others else rest[k]
        rounds.append([routed_output(problem.base, own[k], rest[k], problem.scale, probe) for k in problem.clients])
    return rounds
