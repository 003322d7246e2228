"""The methods that cluster clients, round by round as their papers write them; in the terms of `paper_world`."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product

import numpy as np
from paper_personal import Turns, differences, who_is_there
from paper_rounds import best_factors, mean_product
from paper_world import LAYERS, Problem, Round, Theta, Weights, descend, effective, lora_gradients, mean, minus, only

Clusters = list[list[int]]


def cosine_distance(one: Theta, other: Theta) -> float:
    """1 − cos of the layers' B, as long vectors; the mean over layers."""
    apart = []
    for layer in LAYERS:
        x, y = one[layer, "B"].ravel(), other[layer, "B"].ravel()
        apart.append(1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return float(np.mean(apart))


def distance_between(pairs: dict[int, Theta], i: int, j: int) -> float:
    return cosine_distance(pairs[i], pairs[j])


def average_linkage(who: Sequence[int], distance: Callable[[int, int], float]) -> dict[int, Clusters]:
    """The partition into every number of clusters: the two of the smallest mean distance are joined."""
    clusters = [[k] for k in who]
    found = {len(clusters): [list(c) for c in clusters]}
    while len(clusters) > 1:
        i, j = min(
            combinations(range(len(clusters)), 2),
            key=lambda pair: np.mean([distance(x, y) for x in clusters[pair[0]] for y in clusters[pair[1]]]),
        )
        clusters[i] += clusters.pop(j)
        found[len(clusters)] = sorted(sorted(c) for c in clusters)
    return found


def silhouette(clusters: Clusters, distance: Callable[[int, int], float]) -> float:
    """The mean of (b − a) / max(a, b); 0 for who is alone."""
    values = []
    for mine in clusters:
        for x in mine:
            if len(mine) == 1:
                values.append(0.0)
                continue
            a = np.mean([distance(x, y) for y in mine if y != x])
            b = min(np.mean([distance(x, y) for y in other]) for other in clusters if other is not mine)
            values.append((b - a) / max(a, b))
    return float(np.mean(values))


def best_clusters(who: Sequence[int], distance: Callable[[int, int], float], most: int) -> Clusters:
    partitions = average_linkage(who, distance)
    possible = [partitions[c] for c in range(2, most + 1) if c < len(who)]
    return max(possible, key=lambda clusters: silhouette(clusters, distance)) if possible else partitions[1]


def choose_outputs(scores: np.ndarray, keep: int) -> np.ndarray:
    """Row by row the `keep` largest scores, of equal ones the first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def expert_output(
    base: Weights, experts: Sequence[Theta], router: Theta, own: int, scale: float, x: np.ndarray,
    chosen: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
    """y = W_0 x + s Σ_p ω_p B_e(p) A_e(p) x over the E best of 2E − 1 outputs, ω their softmax; and which they are.

    The first E outputs are the experts, the last E − 1 all `own`. `chosen` settles which are the best, for a gradient
    that does not see the choice.
    """
    taken = []
    leads = [*range(len(experts)), *[own] * (len(experts) - 1)]
    for number, layer in enumerate(LAYERS):
        scores = x @ router[layer, "G"][: len(leads)].T
        best = choose_outputs(scores, len(experts)) if chosen is None else chosen[number]
        taken.append(best)
        omega = np.where(best, np.exp(scores), 0)
        omega /= omega.sum(axis=1, keepdims=True)
        delta = sum(
            omega[:, [p]] * (x @ experts[e][layer, "A"].T @ experts[e][layer, "B"].T) for p, e in enumerate(leads)
        )
        x = x @ base[layer].T + scale * delta
    return x, taken


Outputs = list[tuple[list[np.ndarray], list[np.ndarray | None]]]


def fedlease(
    problem: Problem, probe: np.ndarray, warmup: int, most: int, turns: Turns | None = None
) -> tuple[Outputs, list[dict[int, int]]]:
    """arXiv 2509.15087: warm-up alone; clusters by average linkage of 1 − cos(B), their number by silhouette; experts.

    Equation 3: an expert begins as the plain mean of its cluster's A and B. Then each client trains its cluster's
    expert and router, which become plain means over the cluster's clients who were there. Ours: routers begin at zero;
    who has no cluster trains alone once and joins that of the nearest expert; who never trained uses all alike.
    -> [round] -> outputs on `probe` of every client after it, and of those who were there when they sent; the clusters.
    """
    s = problem.scale
    width = {layer: problem.base[layer].shape[1] for layer in LAYERS}
    zero = {(layer, "G"): np.zeros((2 * most - 1, width[layer])) for layer in LAYERS}
    own: dict[int, Theta] = {}
    experts: list[Theta] = []
    routers: list[Theta] = []
    of: dict[int, int] = {}
    rounds, told = [], []

    def output(k: int, pairs: Sequence[Theta], gates: Sequence[Theta], x: np.ndarray) -> np.ndarray:
        if k in of:
            return expert_output(problem.base, pairs, gates[of[k]], of[k], s, x)[0]
        if k in own or not experts:
            return expert_output(problem.base, [own.get(k, problem.start)], zero, 0, s, x)[0]
        return expert_output(problem.base, pairs, zero, 0, s, x)[0]  # of equal scores the first: every expert once

    for number, (batches, there) in enumerate(zip(problem.batches, who_is_there(problem, turns), strict=True), start=1):
        sent: dict[int, Theta] = {}
        trained: list[np.ndarray | None] = [None for _ in problem.clients]
        for k in there:
            begin = experts[of[k]] | routers[of[k]] if k in of else own.get(k, problem.start) | zero
            place = of.get(k, 0)
            beside = [dict(e) for e in experts] if k in of else [{}]

            def put(theta: Theta, place: int = place, beside: list[Theta] = beside) -> list[Theta]:
                return [only(theta, "AB") if e == place else pair for e, pair in enumerate(beside)]

            def gradients(theta: Theta, x: np.ndarray, t: np.ndarray, place: int = place, put: Callable = put) -> Theta:
                chosen = expert_output(problem.base, put(theta), theta, place, s, x)[1]

                def loss(at: Theta) -> float:
                    y, _ = expert_output(problem.base, put(at), at, place, s, x, chosen)
                    return 0.5 * float(np.sum((y - t) ** 2)) / len(x)

                return differences(loss, theta)

            sent[k] = descend(begin, batches[k], problem.rates, gradients, "ABG")
            trained[k] = expert_output(problem.base, put(sent[k]), sent[k], place, s, probe)[0]
        alone = [k for k in there if k not in of]
        own |= {k: only(sent[k], "AB") for k in alone}
        if experts:
            old = list(experts)
            for e in range(len(experts)):
                members = [k for k in there if of.get(k) == e]
                if members:
                    both = mean([sent[k] for k in members], [1 / len(members)] * len(members))
                    experts[e], routers[e] = only(both, "AB"), only(both, "G")
            for k in alone:
                apart = [cosine_distance(minus(own[k], problem.start), minus(e, problem.start)) for e in old]
                of[k] = int(np.argmin(apart))
        elif number >= warmup:
            apart_of = partial(distance_between, dict(own))
            clusters = best_clusters(sorted(own), apart_of, most)
            of |= {k: e for e, members in enumerate(clusters) for k in members}
            experts = [mean([own[k] for k in members], [1 / len(members)] * len(members)) for members in clusters]
            routers = [zero for _ in clusters]
        rounds.append(([output(k, experts, routers, probe) for k in problem.clients], trained))
        told.append(dict(of))
    return rounds, told


# Subspaces


def subspace_distance(one: Theta, other: Theta) -> float:
    """1 − ‖UᵀV‖² / r of the layers' B, U and V their left singular vectors; the mean over layers."""
    apart = []
    for layer in LAYERS:
        u, v = (np.linalg.svd(pair[layer, "B"], full_matrices=False)[0] for pair in (one, other))
        apart.append(1 - np.linalg.norm(u.T @ v) ** 2 / u.shape[1])
    return float(np.mean(apart))


def spectral_clusters(who: Sequence[int], distance: Callable[[int, int], float], most: int) -> Clusters:
    """exp(−d² / 2σ²), σ the median of d; the number of clusters before the largest gap; the best k-means of all."""
    apart = np.asarray([[distance(i, j) for j in who] for i in who])
    sigma = np.median(apart[~np.eye(len(who), dtype=bool)])
    affinity = np.exp(-(apart**2) / (2 * sigma**2))
    degrees = affinity.sum(axis=1)
    values, vectors = np.linalg.eigh(np.eye(len(who)) - affinity / np.sqrt(np.outer(degrees, degrees)))
    many = max(range(2, min(most, len(who) - 1) + 1), key=lambda k: values[k] - values[k - 1])
    rows = vectors[:, :many] / np.linalg.norm(vectors[:, :many], axis=1, keepdims=True)

    def inertia(labels: tuple[int, ...]) -> float:
        groups = [rows[[x == c for x in labels]] for c in range(many)]
        return sum(float(np.sum((g - g.mean(axis=0)) ** 2)) if len(g) else np.inf for g in groups)

    labels = min(product(range(many), repeat=len(who)), key=inertia)
    members = [[k for k, x in zip(who, labels, strict=True) if x == c] for c in range(many)]
    return sorted(sorted(c) for c in members)


def best_pair(thetas: Sequence[Theta], shares: Sequence[float], rank: int) -> Theta:
    """Σ p_k B_k A_k = U Σ Vᵀ, B := U, A := Σ Vᵀ, of the first `rank` components.

    The largest entry of every column of U is positive: the running mean of B over rounds depends on signs.
    """
    pair = {}
    for layer, matrix in mean_product(thetas, shares).items():
        u, vt = best_factors(matrix, rank, even=False)  # U Σ and Vᵀ
        largest = u[np.abs(u).argmax(axis=0), np.arange(rank)]
        sizes = np.linalg.norm(u, axis=0) * np.sign(largest)
        pair |= {(layer, "B"): u / sizes, (layer, "A"): sizes[:, None] * vt}
    return pair


def hilora(
    problem: Problem, stages: tuple[int, int], most: int, gamma: float, decay: float, turns: Turns | None = None
) -> tuple[list[Round], list[dict[int, int]]]:
    """arXiv 2603.02785: root, cluster and leaf in turn, of as many rounds as `stages` says, the rest for the leaves.

    Root and clusters are averaged as products; penalties γ ‖B_rᵀB_c‖² and γ (‖B_rᵀB_l‖² + ‖B_cᵀB_l‖²). Equation 8's
    distance, of running means of B / ‖B‖; who was not in the root's stage joins the cluster whose B is nearest.
    """
    s, rank = problem.scale, len(problem.start["encoder", "A"])
    start = problem.start
    root, tiers = start, [start for _ in range(most)]
    leaves = [start for _ in problem.clients]
    means: dict[int, Theta] = {}
    of: dict[int, int] = {}
    rounds, told = [], []

    def pull(theta: Theta, others: Sequence[Theta]) -> Theta:
        return {
            (layer, "B"): sum(2 * gamma * o[layer, "B"] @ (o[layer, "B"].T @ theta[layer, "B"]) for o in others)
            for layer in LAYERS if others
        }  # fmt: skip

    def use(k: int, root: Theta, tier: Theta, leaf: Theta) -> Weights:
        return effective(problem.base, (s, root), (s, tier), (s, leaf))

    for number, (batches, there) in enumerate(zip(problem.batches, who_is_there(problem, turns), strict=True), start=1):
        shares = problem.shares if turns is None else turns[number - 1]
        stage = (number > stages[0]) + (number > sum(stages))
        sent: dict[int, Theta] = {}
        trained: list[Weights | None] = [None for _ in problem.clients]
        for k in there:
            tier = tiers[of[k]] if k in of else start
            frozen, begun = [([], root), ([root], tier), ([root, tier], leaves[k])][stage]
            rest = [tier, leaves[k]][stage:]
            beside = effective(problem.base, *[(s, pair) for pair in [*frozen, *rest]])
            sent[k] = descend(
                begun, batches[k], problem.rates, lora_gradients(beside, s), "AB", partial(pull, others=frozen)
            )
            trained[k] = effective(beside, (s, sent[k]))
        if stage == 0:
            root = best_pair([sent[k] for k in there], [shares[k] for k in there], rank)
            for k in there:
                unit = {key: m / np.linalg.norm(m) for key, m in only(sent[k], "B").items()}
                means[k] = mean([means[k], unit], [decay, 1 - decay]) if k in means else unit
        elif stage == 1:
            if not of:
                apart = partial(lambda pairs, i, j: subspace_distance(pairs[i], pairs[j]), dict(means))
                found = spectral_clusters(sorted(means), apart, most)
                of |= {k: c for c, members in enumerate(found) for k in members}
            for c in set(of.values()):
                members = [k for k in there if of.get(k) == c]
                if members:
                    total = sum(shares[k] for k in members)
                    tiers[c] = best_pair([sent[k] for k in members], [shares[k] / total for k in members], rank)
            late = [k for k in there if k not in of]
            of |= {k: min(set(of.values()), key=lambda c: subspace_distance(sent[k], tiers[c])) for k in late}
        else:
            leaves = [sent.get(k, leaf) for k, leaf in enumerate(leaves)]
        mine = [tiers[of[k]] if k in of else start for k in problem.clients]
        after = [use(k, root, mine[k], leaves[k]) for k in problem.clients]
        rounds.append(Round(after, trained=trained))
        told.append(dict(of))
    return rounds, told


# Layer by layer


def euclidean(one: Theta, other: Theta, layer: str) -> float:
    return float(np.linalg.norm(one[layer, "B"] - other[layer, "B"]))


def cut_tree(pairs: dict[int, Theta], most: int, window: int, threshold: float) -> list[Clusters]:
    """One tree by the mean over layers; a layer has from c to c + window − 1 clusters, c that of the layer before."""
    who = sorted(pairs)

    def whole(i: int, j: int) -> float:
        return float(np.mean([euclidean(pairs[i], pairs[j], layer) for layer in LAYERS]))

    partitions, before, cuts = average_linkage(who, whole), 1, []
    for layer in LAYERS:

        def apart(i: int, j: int, layer: str = layer) -> float:
            return euclidean(pairs[i], pairs[j], layer)

        def score(c: int, apart: Callable = apart) -> float:
            return threshold if c == 1 else silhouette(partitions[c], apart)

        before = max(range(before, min(before + window, most + 1, len(who))), key=score)
        cuts.append(sorted(sorted(c) for c in partitions[before]))
    return cuts


def fedtreelora(
    problem: Problem, warmup: int, most: int, window: int, threshold: float, turns: Turns | None = None
) -> tuple[list[Round], list[dict[int, list[int]]]]:
    """arXiv 2603.13282: W_0 + s [λ B_c A_c + (1 − λ) B_e A_e] per layer, c the layer's cluster, e the others' mean.

    λ and the cluster's pair are trained; pairs become plain means over the clients who were there. Ours: λ starts at ½
    and is cut to [0, 1] after a round; e weighs clusters by their clients; who has no clusters trains alone once and
    goes where the nearest client of the warm-up went; who never trained uses the mean of all.
    -> the rounds; after each, the clusters of every client's layers.
    """
    s = problem.scale
    own: dict[int, Theta] = {}
    mixes = [{(layer, "M"): np.asarray(0.5) for layer in LAYERS} for _ in problem.clients]
    tiers: list[list[Theta]] = []  # [layer][cluster], of that layer alone
    of: dict[int, list[int]] = {}
    rounds, told, seen = [], [], {}

    def members(layer: int, cluster: int) -> list[int]:
        return [k for k, mine in of.items() if mine[layer] == cluster]

    def mean_of_others(k: int, layer: int) -> Theta | None:
        clusters = [c for c in range(len(tiers[layer])) if k not in of or c != of[k][layer]]
        sizes = [len(members(layer, c)) for c in clusters]
        return mean([tiers[layer][c] for c in clusters], [n / sum(sizes) for n in sizes]) if clusters else None

    def pair_of(k: int) -> Theta:
        parts = [tiers[n][of[k][n]] if k in of else mean_of_others(k, n) for n in range(len(LAYERS))]
        return {key: m for part in parts for key, m in part.items()}

    def rest_of(k: int) -> dict[str, Theta | None]:
        return {layer: mean_of_others(k, n) if k in of else None for n, layer in enumerate(LAYERS)}

    def use(pair: Theta, mix: Theta, rest: dict[str, Theta | None]) -> Weights:
        found = {}
        for layer in LAYERS:
            delta = pair[layer, "B"] @ pair[layer, "A"]
            if (other := rest[layer]) is not None:
                x = mix[layer, "M"]
                delta = x * delta + (1 - x) * other[layer, "B"] @ other[layer, "A"]
            found[layer] = problem.base[layer] + s * delta
        return found

    for number, (batches, there) in enumerate(zip(problem.batches, who_is_there(problem, turns), strict=True), start=1):
        sent: dict[int, Theta] = {}
        trained: list[Weights | None] = [None for _ in problem.clients]
        for k in there:
            begin = pair_of(k) if k in of else own.get(k, problem.start)
            rest = rest_of(k)

            def gradients(theta: Theta, x: np.ndarray, t: np.ndarray, rest: dict = rest) -> Theta:
                def loss(at: Theta) -> float:
                    weights = use(at, at, rest)
                    y = x @ weights["encoder"].T @ weights["decoder"].T
                    return 0.5 * float(np.sum((y - t) ** 2)) / len(x)

                return differences(loss, theta)

            ended = descend(begin | mixes[k], batches[k], problem.rates, gradients, "ABM")
            sent[k] = only(ended, "AB")
            mixes[k] = {key: np.clip(m, 0, 1) for key, m in only(ended, "M").items()}
            trained[k] = use(sent[k], mixes[k], rest)
        alone = [k for k in there if k not in of]
        own |= {k: sent[k] for k in alone}
        if tiers:
            for n, tier in enumerate(tiers):
                for c in range(len(tier)):
                    mine = [sent[k] for k in there if k in of and of[k][n] == c]
                    if mine:
                        both = mean(mine, [1 / len(mine)] * len(mine))
                        tier[c] = {key: m for key, m in both.items() if key[0] == LAYERS[n]}
            for k in alone:
                apart = {j: np.mean([euclidean(own[k], pair, layer) for layer in LAYERS]) for j, pair in seen.items()}
                of[k] = of[min(apart, key=apart.__getitem__)]
        elif number >= warmup:
            seen = dict(own)
            cuts = cut_tree(seen, most, window, threshold)
            of |= {k: [next(c for c, g in enumerate(cut) if k in g) for cut in cuts] for k in seen}
            tiers = [
                [
                    {key: m for key, m in mean([own[k] for k in g], [1 / len(g)] * len(g)).items() if key[0] == layer}
                    for g in cut
                ]
                for layer, cut in zip(LAYERS, cuts, strict=True)
            ]
        after = []
        for k in problem.clients:
            if k in of or (tiers and k not in own):
                after.append(use(pair_of(k), mixes[k], rest_of(k)))
            else:
                after.append(use(own.get(k, problem.start), mixes[k], dict.fromkeys(LAYERS)))
        rounds.append(Round(after, trained=trained))
        told.append(dict(of))
    return rounds, told
