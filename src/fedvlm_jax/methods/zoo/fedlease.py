"""FedLEASE (arXiv 2509.15087): clients are clustered after a warm-up; a cluster trains an expert, a router mixes all.

Warm-up: every client trains a pair A, B alone. Then the server clusters: the distance of two clients is the mean over
layers of 1 − cos(vec B_i, vec B_j) (equation 2), linkage is average, and the number of clusters E, from 2 to
`--method.clusters`, is that of the best silhouette. The cluster's expert begins as the plain mean of its clients' A and
B (equation 3). From then on a client trains its cluster's expert and a router with 2E − 1 outputs a layer, the other
experts frozen: the first E outputs are an expert each, the last E − 1 are all the client's own one, and each token
keeps its E best outputs, weighed by the softmax over these. So a token has from 1 to E experts, and its own always.
Expert and router become the plain mean over the cluster.

The abstract, the authors' code (github.com/lei-wang-link/FedLEASE) and others' accounts of the equations were read, the
paper itself was not. The code renames parameters by `replace('0', group)`, which renames layers too, so that the
clusters' means are never loaded and clients go on from their own warm-up; here they begin with the means, as in the
paper. Otherwise than in the code: routers start at zero, with which all E experts weigh alike; the optimiser starts
anew where a client's cluster changes, not in every round; and clients may come and go. The server clusters the last 64
clients that sent something in the warm-up, or a whole cohort. Who was not among them trains a pair alone in its next
round, and joins the cluster whose expert's B is nearest; who never trained uses all experts alike.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import (
    Aggregated,
    Client,
    Context,
    Key,
    Method,
    MethodOptions,
    Number,
    Setup,
    Updated,
    Weights,
    is_factor,
)
from fedvlm_jax.methods.components.clusters import (
    SEEN,
    Clusters,
    choose_clusters,
    describe_unreached,
    find_part,
    mean_by_cluster,
    measure_distances,
    read_cluster,
    replace_table,
    write_clusters,
)
from fedvlm_jax.methods.components.factors import map_sites, norm_of, only, split_scales
from fedvlm_jax.methods.components.personalized_download import NOBODY, renew, start_pool
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Count


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of fedlease"""

    warmup: Count = 2
    """Rounds in which clients train alone; after the last of them they are clustered."""
    clusters: Clusters = 4
    """Clusters, and so experts, at most."""


def make(setup: Setup) -> Method:
    """Make fedlease: the server holds all experts and each client's cluster, a client its pair of the warm-up."""
    options = setup.own(Options)
    most, none, nobody = options.clusters, options.clusters, setup.population
    trained_leaves = only("a", "b", "gate")

    def init(adapter: lora.Adapter) -> PyTree:
        factors, scales = split_scales(adapter)
        start = map_sites(add_router, factors)
        return {
            "start": start,
            "scales": scales,
            "experts": jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (most, *leaf.shape)), start),
            "many": jnp.int32(0),
            "clusters": jnp.full(setup.population, none, jnp.int32),
            "pool": start_pool(factors, setup, SEEN),
        }

    def add_router(site: dict[str, Array]) -> dict[str, Array]:
        return {**site, "gate": jnp.zeros((*site["a"].shape[:-1], 2 * most - 1), site["a"].dtype)}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        own = server["start"] if setup.common_start else map_sites(add_router, split_scales(setup.draw(key))[0])
        state = {"own": own, "number": jnp.int32(nobody), "cluster": jnp.int32(none)}
        return state | setup.kept(setup.start_optimizer(own, trained_leaves))

    def find_cluster(server: PyTree, number: Number) -> Number:
        if "clusters" in server:
            return read_cluster(server["clusters"], number, none)
        return jnp.where(number == nobody, none, server["cluster"])

    def find_expert(server: PyTree, cluster: Number, otherwise: PyTree) -> PyTree:
        """Return the expert of a cluster, and what else there is for a client that has none."""
        return find_part(server["experts"], cluster, none, otherwise)

    def assemble(own: PyTree, cluster: Number, server: PyTree, beside: Bool[Array, ""] | bool) -> lora.Adapter:
        """Put all experts side by side, `own` in its cluster's place; without a cluster it is alone, or not there."""
        place = jnp.where(cluster == none, jnp.where(beside, none, 0), cluster)
        slots = route(cluster, server["many"], jnp.logical_or(cluster != none, beside))

        def join(mine: dict[str, Array], all_: dict[str, Array], scale: dict[str, Array]) -> dict[str, Array]:
            a, b = (
                jnp.where((jnp.arange(most) == place).reshape(-1, *[1] * mine[name].ndim), mine[name], all_[name])
                for name in ("a", "b")
            )
            a, b = jnp.moveaxis(a, 0, -2), jnp.moveaxis(b, 0, -3)  # experts beside their ranks
            return {
                "a": a.reshape(*a.shape[:-2], -1),
                "b": b.reshape(*b.shape[:-3], -1, b.shape[-1]),
                "gate": mine["gate"],
                "slots": jnp.broadcast_to(slots, (*mine["gate"].shape[:-2], *slots.shape)),
                **scale,
            }

        return map_sites(join, own, server["experts"], server["scales"])

    def route(cluster: Number, many: Number, mixed: Bool[Array, ""]) -> Float[Array, "outputs experts"]:
        """Say to which expert each of the router's outputs leads: row by row, 1 in its place."""
        places, again = jnp.arange(most), jnp.arange(most - 1)
        each = jnp.eye(most) * jnp.where(mixed, places < many, places == 0)
        own = (places == cluster) & (again[:, None] < many - 1)
        return jnp.concatenate([each, own.astype(jnp.float32)])

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        cluster = find_cluster(server, client.number)
        received = find_expert(server, cluster, server["start"])
        factors = find_expert(server, cluster, personal["own"])
        optimizer = setup.start_optimizer(factors, trained_leaves)
        if setup.keep_optimizer:
            optimizer = tree.choose(personal["cluster"] == cluster, personal["optimizer"], optimizer)
        factors, optimizer, metrics = ctx.train(
            factors,
            optimizer,
            client,
            trained=trained_leaves,
            assemble=lambda own: assemble(own, cluster, server, False),
        )
        message = jax.tree.map(jnp.subtract, factors, received)
        own = tree.choose(cluster == none, factors, personal["own"])
        state = {"own": own, "number": client.number, "cluster": cluster, **setup.kept(optimizer)}
        return tree.choose(client.mask.any(), state, personal), message, metrics | {"update_norm": norm_of(message)}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        numbers, counts, made = ctx.numbers, weights > 0, server["many"] > 0
        assert numbers is not None
        # Once there are experts, messages are updates of those, and the pool has nothing more to remember.
        pool = renew(server["pool"], select_pair(messages), numbers, weights * ~made, ctx.round)
        server = {**server, "pool": pool}
        now = ~made & (ctx.round >= options.warmup) & counts.any()
        changed = jax.lax.cond(now, allocate, lambda server: improve(server, messages, numbers, counts), server)
        return {**server, **changed}, {"clusters": changed["many"].astype(jnp.float32)}

    def allocate(server: PyTree) -> PyTree:
        """Cluster the clients of the pool, and make the experts."""
        pool = server["pool"]
        there = pool["number"] != NOBODY
        distances = measure_distances(*[tree.partition(pool["moved"], only("b"))[0]] * 2)
        labels, many = choose_clusters(distances, there, most)
        moved = mean_by_cluster(pool["moved"], labels, there.astype(jnp.float32), most)
        pairs, routers = tree.partition(server["start"], is_factor)
        experts = tree.combine(
            jax.tree.map(jnp.add, pairs, moved),
            jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (most, *leaf.shape)), routers),
        )
        clusters = write_clusters(server["clusters"], pool["number"], labels, there)
        return {"experts": experts, "many": many, "clusters": clusters}

    def improve(server: PyTree, messages: PyTree, numbers: Array, counts: Bool[Array, " K"]) -> PyTree:
        """Add each expert its mean update, and give clients that have no cluster the nearest; in the warm-up none."""
        clusters = read_cluster(server["clusters"], numbers, none)
        step = mean_by_cluster(messages, clusters, counts.astype(jnp.float32), most)
        experts = jax.tree.map(jnp.add, server["experts"], step)
        start = tree.partition(server["start"], only("b"))[0]
        gone = jax.tree.map(jnp.subtract, tree.partition(server["experts"], only("b"))[0], start)
        distances = measure_distances(tree.partition(messages, only("b"))[0], gone)
        nearest = jnp.argmin(jnp.where(jnp.arange(most) < server["many"], distances, jnp.inf), axis=1)
        joins = counts & (clusters == none) & (server["many"] > 0)
        table = write_clusters(server["clusters"], numbers, nearest.astype(jnp.int32), joins)
        return {"experts": experts, "many": server["many"], "clusters": table}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        cluster = find_cluster(server, personal["number"])
        untrained = (personal["number"] == nobody) & (server["many"] > 0)
        return assemble(find_expert(server, cluster, personal["own"]), cluster, server, untrained)

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        cluster = find_cluster(server, personal["number"])
        received = find_expert(server, cluster, server["start"])
        return assemble(jax.tree.map(jnp.add, received, message), cluster, server, False)

    def broadcast(server: PyTree, number: Number, last: PyTree | None) -> PyTree:
        del last
        return {"experts": server["experts"], "many": server["many"], "cluster": find_cluster(server, number)}

    def travels(server: PyTree, messages: PyTree) -> base.Travelling:
        return base.shape_of_one(messages), server["experts"]

    alike = "a cluster's expert is the plain mean over its clients, as in the paper"
    average = "every cluster has an expert of its own: there is no one average to step or to stay near"
    return Method(
        name="fedlease",
        source="arXiv 2509.15087: clusters by cosine of B after a warm-up, an expert each, the mean over its clients; "
        "router with 2E−1 outputs, the best E kept; routers start at zero, who comes later joins the nearest cluster",
        init=init, init_client=init_client, client_update=client_update, aggregate=aggregate, personalise=personalise,
        trained=trained, download=lambda server: server["experts"], broadcast=broadcast, view=replace_table,
        travels=travels, pairs=most,
        refuses={
            **dict.fromkeys(("server", "local.proximal", "local.scaffold"), average),
            "lora.ranks": "experts stand side by side with one rank for all",
            "train.weighting": alike,
        },
        moot=frozenset({"train.weighting"}),
        unreached=describe_unreached("fedlease", "expert", options.warmup, setup.rounds),
    )  # fmt: skip


def select_pair(factors: PyTree) -> PyTree:
    """Select A and B of what also has routers."""
    return tree.partition(factors, is_factor)[0]
