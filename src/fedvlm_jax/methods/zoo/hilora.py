"""HiLoRA (arXiv 2603.02785): three adapters in turn, of all clients, of a cluster of them, and of one client.

    y = x W_0 + s x (A_r B_r + A_c B_c + A_l B_l)              root, cluster, leaf

In the first stage of the rounds all clients train the root, in the second each its cluster's pair beside the root, in
the third each a leaf of its own beside both; what was trained before is frozen. Root and clusters are averaged as
products: Σ p_k A_k B_k is decomposed, its best rank-r part becomes the new pair, and B is orthonormal (U of the paper's
B A = U Σ Vᵀ). Who trains is pushed to be orthogonal to the stages before: γ ‖B_r B_cᵀ‖² and so on, in our layout.

Clusters come from the root's stage: for every client the server keeps a running mean of its B, each divided by its
norm; d_ij = 1 − ‖U_iᵀ U_j‖² / r (equation 8), U a basis of the mean, averaged over layers; the affinity is
exp(−d² / 2σ²), σ the median of d; spectral clustering, in which the largest gap between eigenvalues tells how many.

The abstract and others' accounts of the equations were read, the paper itself was not, and no code is published. Ours
are: the stages' shares of the rounds, where the paper ends one when it moves no more; one γ for all penalties, and its
size; how fast the running mean forgets; the signs of an SVD, on which that mean depends: the largest entry of each
column of U is positive; k-means that begins with points far apart; at least two clusters, and less than clients; that
the optimiser starts anew in every round, as the pair gets another basis. The server clusters the last 64 clients that
were there in the root's stage, or a whole cohort; who was not trains a pair alone in its next round of the second
stage, and joins the cluster whose B spans nearly the same.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import Aggregated, Client, Context, Key, Method, Number, Setup, Updated, Weights
from fedvlm_jax.methods.components.client_regularizers import Nudge
from fedvlm_jax.methods.components.clusters import (
    SEEN,
    Clusters,
    find_part,
    read_cluster,
    replace_table,
    write_clusters,
)
from fedvlm_jax.methods.components.factors import map_sites, matmul, norm_of, only, side_by_side, split_scales
from fedvlm_jax.methods.components.personalized_download import NOBODY, renew, start_pool
from fedvlm_jax.methods.components.spectral_clusters import cluster_spectrally, measure_subspace_distances
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Chance, NonNegative, Share

ROOT, CLUSTER, LEAF = range(3)  # the stages, and so the phases of rounds


@dataclass(frozen=True)
class Options(base.MethodOptions):
    """Numbers of hilora"""

    root: Share = 0.4
    """Share of the rounds, the first ones, that train the adapter of all clients; one at least."""
    cluster: Share = 0.3
    """Share of the rounds after these that train the clusters' adapters; one at least. The rest train the leaves."""
    clusters: Clusters = 4
    """Clusters at most."""
    orthogonal: NonNegative = 0.01
    """Weight of the squared overlap of an adapter's B with those of the stages before."""
    memory: Chance = 0.5
    """Weight of the former rounds in the running mean of a client's B."""

    def __post_init__(self) -> None:
        if self.root + self.cluster > 1 + 1e-9:
            raise UserError(
                f"--method.root {self.root:g} and --method.cluster {self.cluster:g} are shares of the rounds, and more "
                "than all of them together: lower one"
            )


def make(setup: Setup) -> Method:
    """Make hilora: three stages, which are phases; the server holds root and clusters, a client its leaf."""
    options = setup.own(Options)
    most, none, nobody = options.clusters, options.clusters, setup.population
    of_root = max(1, round(options.root * setup.rounds))
    of_cluster = max(1, round(options.cluster * setup.rounds))

    def phase(round_: int) -> int:
        return (round_ > of_root) + (round_ > of_root + of_cluster)

    def init(adapter: lora.Adapter) -> PyTree:
        root, scales = split_scales(adapter)
        start = map_sites(lambda site: {"a": site["a"], "b": jnp.zeros_like(site["b"])}, root)
        return {
            "root": root,
            "start": start,
            "scales": scales,
            "tiers": jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (most, *leaf.shape)), start),
            "many": jnp.int32(0),
            "clusters": jnp.full(setup.population, none, jnp.int32),
            "pool": start_pool(select_b(start), setup, SEEN),
        }

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        own = server["start"] if setup.common_start else split_scales(setup.draw(key))[0]
        return {"own": own, "number": jnp.int32(nobody), "stage": jnp.int32(ROOT)}

    def find_tier(server: PyTree, number: Number) -> PyTree:
        """Return the pair of a client's cluster; what all began with where it has none."""
        if "tier" in server:
            return tree.choose(number == nobody, server["start"], server["tier"])
        return find_part(server["tiers"], read_cluster(server["clusters"], number, none), none, server["start"])

    def add_up(server: PyTree, *pairs: PyTree) -> lora.Adapter:
        return lora.concatenate(*[tree.combine(pair, server["scales"]) for pair in pairs])

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        root, tier, own = server["root"], find_tier(server, client.number), personal["own"]
        frozen, begun = [((), root), ((root,), tier), ((root, tier), own)][ctx.phase]
        factors, _, metrics = ctx.train(
            begun, setup.start_optimizer(begun), client,
            assemble=lambda factors: add_up(server, *frozen, factors, *[tier, own][ctx.phase :]),
            nudge=push_apart(options.orthogonal, *frozen) if frozen and options.orthogonal else None,
        )  # fmt: skip
        moved = jax.tree.map(jnp.subtract, factors, begun)
        state = {"own": factors if ctx.phase == LEAF else own, "number": client.number, "stage": jnp.int32(ctx.phase)}
        return (
            tree.choose(client.mask.any(), state, personal),
            {} if ctx.phase == LEAF else moved,
            metrics | {"update_norm": norm_of(moved)},
        )

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        if ctx.phase == ROOT:
            server = improve_root(ctx, server, messages, weights)
        if ctx.phase == CLUSTER:
            found = (server["many"] == 0) & (weights.sum() > 0)
            server = {**server, **jax.lax.cond(found, find_clusters, keep_clusters, server)}
            server = improve_tiers(ctx, server, messages, weights)
        return server, {"clusters": jnp.asarray(server["many"], jnp.float32)}

    def improve_root(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> PyTree:
        assert ctx.numbers is not None
        trained = jax.tree.map(jnp.add, server["root"], messages)
        root = average_products(trained, weights, server["root"])
        mine = (server["pool"]["number"] == ctx.numbers[:, None]).astype(jnp.float32)  # [K, P]

        def remember(now: Array, pool: Array) -> Array:
            unit = now / jnp.maximum(jnp.linalg.norm(now, axis=(-2, -1), keepdims=True), 1e-12)
            before = jnp.einsum("kp,p...->k...", mine, pool, precision="highest")
            known = mine.any(axis=1).reshape(-1, *[1] * (now.ndim - 1))
            return jnp.where(known, options.memory * before + (1 - options.memory) * unit, unit)

        means = jax.tree.map(remember, select_b(trained), server["pool"]["moved"])
        return {**server, "root": root, "pool": renew(server["pool"], means, ctx.numbers, weights, ctx.round)}

    def find_clusters(server: PyTree) -> PyTree:
        pool = server["pool"]
        there = pool["number"] != NOBODY
        distances = measure_subspace_distances(pool["moved"], pool["moved"])
        labels, many = cluster_spectrally(distances, there, most)
        clusters = write_clusters(server["clusters"], pool["number"], labels, there)
        return {"many": many, "clusters": clusters}

    def keep_clusters(server: PyTree) -> PyTree:
        return {name: jnp.asarray(server[name]) for name in ("many", "clusters")}

    def improve_tiers(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> PyTree:
        assert ctx.numbers is not None
        clusters = read_cluster(server["clusters"], ctx.numbers, none)
        begun = jax.vmap(lambda number: find_tier(server, number))(jnp.asarray(ctx.numbers))
        trained = jax.tree.map(jnp.add, begun, messages)

        def average(at: tuple[Number, PyTree]) -> PyTree:
            mine = jnp.where(clusters == at[0], weights, 0)
            return average_products(trained, mine / jnp.maximum(mine.sum(), 1e-12), at[1])

        tiers = jax.lax.map(average, (jnp.arange(most), server["tiers"]))
        distances = measure_subspace_distances(select_b(trained), select_b(tiers))
        nearest = jnp.argmin(jnp.where(jnp.arange(most) < server["many"], distances, jnp.inf), axis=1)
        joins = (weights > 0) & (clusters == none)
        table = write_clusters(server["clusters"], ctx.numbers, nearest.astype(jnp.int32), joins)
        return {**server, "tiers": tiers, "clusters": table}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        return add_up(server, server["root"], find_tier(server, personal["number"]), personal["own"])

    def trained_adapter(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        if not message:
            return personalise(server, personal)
        root, tier = (
            jax.tree.map(
                lambda x, moved, stage=stage: jnp.where(personal["stage"] == stage, x + moved, x), pair, message
            )
            for stage, pair in ((ROOT, server["root"]), (CLUSTER, find_tier(server, personal["number"])))
        )
        return add_up(server, root, tier, personal["own"])

    def broadcast(server: PyTree, number: Number, last: PyTree | None) -> PyTree:
        del last
        return {"root": server["root"], "tier": find_tier(server, number)}

    def travels(server: PyTree, messages: PyTree) -> base.Travelling:
        del server
        return base.shape_of_one(messages), base.shape_of_one(messages)

    untrained = ("no cluster's adapter and no leaf", "no leaf", "")[phase(setup.rounds)]
    rounds, first = (format_count(count, "round") for count in (setup.rounds, of_root))
    why = f"the root's stage has {first} (--method.root), the clusters' {of_cluster} (--method.cluster)"
    new_basis = "every round's SVD gives the factors another basis, in which the last round's state means nothing"
    return Method(
        name="hilora",
        source="arXiv 2603.02785: W_0 + s(B_r A_r + B_c A_c + B_l A_l), root, cluster and leaf trained in turn; "
        "products averaged, B := U, A := ΣVᵀ; clusters by subspaces of B; stages are shares of the rounds",
        init=init, init_client=init_client, client_update=client_update, aggregate=aggregate, personalise=personalise,
        trained=trained_adapter, download=lambda server: server["root"], phase=phase, broadcast=broadcast,
        view=replace_table, travels=travels, pairs=3,
        refuses={
            **dict.fromkeys(("server", "local.proximal", "local.scaffold"), new_basis),
            "lora.ranks": "the three adapters have one rank for all",
        },
        unreached=f"in {rounds} hilora trains {untrained}: {why}" if untrained else "",
    )  # fmt: skip


def select_b(factors: PyTree) -> PyTree:
    """Select the factors B."""
    return tree.partition(factors, only("b"))[0]


def push_apart(strength: float, *others: PyTree) -> Nudge:
    """Make the gradient of strength · Σ ‖b_otherᵀ b‖² in the papers' layout, for every site's b.

    >>> b = {"fc": {"b": jnp.asarray([[2.0, 0.0]])}}
    >>> push_apart(0.5, b)({"fc": {"a": jnp.ones((1, 1)), "b": jnp.asarray([[1.0, 1.0]])}})["fc"]["b"].tolist()
    [[4.0, 0.0]]
    """

    def push(site: dict[str, Array], *beside: dict[str, Array]) -> dict[str, Array]:
        b = site["b"]
        parts = [matmul(matmul(b, other["b"].mT), other["b"]) for other in beside]
        overlap = sum(parts, start=jnp.zeros(b.shape, jnp.float32))
        return {"a": jnp.zeros_like(site["a"]), "b": (2 * strength * overlap).astype(b.dtype)}

    return lambda moving: map_sites(push, moving, *others)


def average_products(trained: PyTree, weights: Weights, now: PyTree) -> PyTree:
    """Decompose Σ p_k a_k b_k of pairs [K, …] into the best pair of their rank with an orthonormal b; else `now`."""

    def decompose(site: dict[str, Array], before: dict[str, Array]) -> dict[str, Array]:
        left, right = side_by_side(site["a"], site["b"], weights)
        turned = {"site": {"a": right.mT, "b": left.mT, "scale": jnp.ones(left.shape[:-2])}}
        best = lora.truncate(turned, before["a"].shape[-1], even=False)["site"]
        counts: Float[Array, ""] = weights.sum()
        return {
            "a": jnp.where(counts > 0, best["b"].mT.astype(before["a"].dtype), before["a"]),
            "b": jnp.where(counts > 0, best["a"].mT.astype(before["b"].dtype), before["b"]),
        }

    return map_sites(decompose, trained, now)
