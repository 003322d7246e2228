"""The methods with one model per client, round by round as their papers write them; in the terms of `paper_world`."""

from collections.abc import Callable, Sequence

import numpy as np
from paper_world import (
    LAYERS,
    Problem,
    Round,
    ServerStep,
    Theta,
    Weights,
    cut,
    descend,
    effective,
    fedavg_server,
    lora_gradients,
    mean,
    minus,
    pad,
    plus,
    products,
)


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

    mu: FedProx, arXiv 1812.06127. scaffold: arXiv 1910.06378, option II, with clients' weights for c too. combine: the
    clients' shared factors, padded -> the server's, in place of the mean.
    hand_out: what a client of a rank makes of the server's factors.
    """
    shared = {key: m for key, m in problem.start.items() if belongs(key)}
    own = [{key: m for key, m in problem.start_of(k).items() if not belongs(key)} for k in problem.clients]
    start_of = own
    c = {key: np.zeros_like(m) for key, m in shared.items()}
    c_k = [dict(c) for _ in problem.clients]
    rounds = []
    for number, batches in enumerate(problem.batches, start=1):
        sent, moved, kept, trained_models = [], [], [], []
        for k in problem.clients:
            received = hand_out(shared, problem.ranks[k]) if problem.ranks else shared

            correction = minus(c, c_k[k]) if scaffold else {}

            def pull(theta: Theta, received: Theta = received, correction: Theta = correction) -> Theta:
                return {key: mu * (theta[key] - m) + correction.get(key, 0) for key, m in received.items()}

            begun = start_of[k] if restart else own[k]
            theta = descend(
                received | begun, batches[k], problem.rates, lora_gradients(problem.base, problem.scale),
                trained(number), pull,
            )  # fmt: skip
            mine = {key: theta[key] for key in shared}
            kept.append({key: theta[key] for key in own[k]})
            trained_models.append(effective(problem.base, (problem.scale, theta)))
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
            average = mean_of_directions(sent, problem.shares, problem.ranks) if problem.ranks else None
            shared = plus(shared, server_step(minus(average or mean(sent, problem.shares), shared)))
        if scaffold:
            c_k = [plus(old, change) for old, change in zip(c_k, moved, strict=True)]
            c = plus(c, mean(moved, [problem.part * p for p in problem.shares]))
        own = kept
        theirs = [hand_out(shared, problem.ranks[k]) if problem.ranks else shared for k in problem.clients]
        weights = [effective(problem.base, (problem.scale, theirs[k] | own[k])) for k in problem.clients]
        rounds.append(Round(weights, shared, trained_models))
    return rounds


def mean_of_directions(sent: Sequence[Theta], shares: Sequence[float], ranks: Sequence[int]) -> Theta:
    """Row by row of A and column by column of B, the mean over the clients that have it."""
    found = {}
    for key in sent[0]:
        rows = []
        for direction in range(max(ranks)):
            who = [k for k in range(len(sent)) if ranks[k] > direction]
            total = sum(shares[k] for k in who)
            several = [sent[k][key] if key[1] == "A" else sent[k][key].T for k in who]
            rows.append(sum(shares[k] / total * m[direction] for k, m in zip(who, several, strict=True)))
        found[key] = np.stack(rows) if key[1] == "A" else np.stack(rows).T
    return found


def local(problem: Problem) -> list[Round]:
    return share(problem, lambda key: False)


def fedavg_lora(problem: Problem, **choices: object) -> list[Round]:
    """arXiv 2305.05644: Ā = Σ p_k A_k, B̄ = Σ p_k B_k."""
    return share(problem, lambda key: True, **choices)  # type: ignore[arg-type]


def plora(problem: Problem, **choices: object) -> list[Round]:
    """arXiv 2507.17088: B̄ = Σ p_k B_k, A_k private."""
    return share(problem, lambda key: key[1] == "B", **choices)  # type: ignore[arg-type]


def plora_reset_a(problem: Problem) -> list[Round]:
    """arXiv 2509.25414 as its code has it: A_k = A_0 at the start of every round, and what it became is used."""
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


def best_factors(matrix: np.ndarray, rank: int, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """B and A of the truncated SVD: U Σ and Vᵀ, or √Σ in each."""
    u, s, vt = np.linalg.svd(matrix)
    if not even:
        return u[:, :rank] * s[:rank], vt[:rank]
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def flexlora(problem: Problem, even: bool = False, turns: Sequence[Sequence[float]] | None = None) -> list[Round]:
    """arXiv 2402.11505: Σ p_k B_k A_k = U Σ Vᵀ, of which a client of rank r gets the first r components.

    What lies beyond the largest rank of those who are there is added to the mean: they neither had nor sent it.
    """
    rank = problem.start["encoder", "A"].shape[0]
    before, waiting = problem.start, list(turns or [])

    def combine(sent: list[Theta]) -> Theta:
        nonlocal before
        shares = waiting.pop(0) if waiting else problem.shares
        there = (
            max((r for r, p in zip(problem.ranks, shares, strict=True) if p), default=rank) if problem.ranks else rank
        )
        shared = {}
        for layer, matrix in mean_product(sent, shares).items():
            beyond = before[layer, "B"][:, there:] @ before[layer, "A"][there:]
            shared[layer, "B"], shared[layer, "A"] = best_factors(matrix + beyond, rank, even)
        before = shared
        return shared

    return share(problem, lambda key: True, combine=combine)


def hetlora(problem: Problem) -> list[Round]:
    """arXiv 2401.06432: weights ∝ ‖B_k A_k‖_F, truncated by every client to its own rank.

    The paper pads with zeros; here, and so in what this is held against, each direction is averaged over who has it.
    """

    def combine(sent: list[Theta]) -> Theta:
        shared = {}
        for layer in LAYERS:
            norms = np.asarray([np.linalg.norm(products(theta)[layer]) for theta in sent])
            both = [{key: m for key, m in theta.items() if key[0] == layer} for theta in sent]
            weights = (norms / norms.sum()).tolist()
            shared |= mean_of_directions(both, weights, problem.ranks or [len(problem.start[layer, "A"])] * len(both))
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
        trained = [effective(base, (problem.scale, theta)) for theta in sent]
        shared = mean(sent, problem.shares)
        exact, inexact = mean_product(sent, problem.shares), products(shared)
        base = {layer: base[layer] + problem.scale * (exact[layer] - inexact[layer]) for layer in LAYERS}
        rounds.append(Round([effective(base, (problem.scale, shared))] * len(sent), shared, trained))
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
        trained = [effective(base, (problem.scale, theta)) for theta in sent]
        new = {}
        for layer in LAYERS:
            b = np.hstack([theta[layer, "B"] for theta in sent])
            a = np.vstack([p * theta[layer, "A"] for p, theta in zip(problem.shares, sent, strict=True)])
            new[layer] = base[layer] + problem.scale * b @ a
        base = new
        rounds.append(Round([base] * len(sent), trained=trained))
    return rounds


def fed_sb(problem: Problem) -> list[Round]:
    """arXiv 2502.15436: ΔW = B R A, only R is trained; R̄ = Σ p_k R_k. R is the C of these functions."""
    shared, rounds = problem.start, []
    for batches in problem.batches:
        grads = lora_gradients(problem.base, problem.scale)
        sent = [descend(shared, batches[k], problem.rates, grads, "C") for k in problem.clients]
        trained = [effective(problem.base, (problem.scale, theta)) for theta in sent]
        shared = mean(sent, problem.shares)
        rounds.append(Round([effective(problem.base, (problem.scale, shared))] * len(sent), shared, trained))
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
