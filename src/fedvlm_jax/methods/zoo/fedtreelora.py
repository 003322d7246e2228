"""FedTreeLoRA (arXiv 2603.13282): clients are clustered layer by layer, along one tree, ever more finely with depth.

After a warm-up, in which every client trains a pair A, B alone, the server measures how far the clients' B are apart in
every layer, builds one tree by agglomerative clustering of the mean over layers, and cuts it for each layer, from the
shallowest to the deepest: into c_l clusters, c_(l−1) ≤ c_l < min(N, c_(l−1) + K), of which the best silhouette under
the layer's own distances is taken; one cluster has the score τ. So clients that part in a layer stay apart below it.

    y = x W_0 + s [λ x A_c B_c + (1 − λ) x A_e B_e]            per layer

The cluster's pair c, trained by its clients with their own λ, becomes the plain mean over them; e, the mean of the
other clusters' clients, is frozen. Where a layer has one cluster there is no e, and λ is 1.

The abstract and an account of the equations by others were read, the paper itself was not, and no code was found. Ours
are: Euclidean distances of the factors and average linkage; K, τ and at most `--method.clusters` clusters; λ begins at
½, is kept from 0 to 1 at the end of a round and has the rate of B; e is the mean of the clusters' pairs, weighed by how
many clients they have; which layers are deeper: vision tower, connector, encoder and decoder follow each other, and in
each the numbers in a path. The server clusters the last 64 clients that sent something in the warm-up, or a whole
cohort. Who was not among them trains a pair alone in its next round, and goes where the nearest of those went; who
never trained uses the mean of all.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import Aggregated, Client, Context, Key, Method, Number, Setup, Updated, Weights, is_factor
from fedvlm_jax.methods.components.clusters import SEEN, Clusters, describe_unreached, replace_table
from fedvlm_jax.methods.components.factors import by_site, map_sites, norm_of, only, split_scales
from fedvlm_jax.methods.components.layer_clusters import cut_tree, mean_by_layer, measure_layer_distances, number_layers
from fedvlm_jax.methods.components.personalized_download import NOBODY, renew, start_pool
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Count, Share


@dataclass(frozen=True)
class Options(base.MethodOptions):
    """Numbers of fedtreelora"""

    warmup: Count = 2
    """Rounds in which clients train alone; after the last of them they are clustered."""
    clusters: Clusters = 4
    """Clusters of a layer at most."""
    window: Count = 2
    """Numbers of clusters that a layer may choose among, from that of the layer before on (the paper's K)."""
    threshold: Share = 0.1
    """Silhouette that more than one cluster must exceed (the paper's tau)."""


def make(setup: Setup) -> Method:
    """Make fedtreelora: the server holds each layer's clusters and their pairs, a client its λ and its first pair."""
    options = setup.own(Options)
    most, none, nobody = options.clusters, options.clusters, setup.population
    trained_leaves = only("a", "b", "mix")

    def init(adapter: lora.Adapter) -> PyTree:
        start, scales = split_scales(adapter)
        layers = number_layers(start, setup)[1]
        return {
            "start": start,
            "scales": scales,
            "tiers": jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (most, *leaf.shape)), start),
            "made": jnp.zeros((), bool),
            "clusters": jnp.full((setup.population, layers), none, jnp.int32),
            "pool": start_pool(start, setup, SEEN),
        }

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        pair = server["start"] if setup.common_start else split_scales(setup.draw(key))[0]
        own = map_sites(lambda site: {**site, "mix": jnp.full(site["a"].shape[:-2], 0.5, jnp.float32)}, pair)
        state = {"own": own, "number": jnp.int32(nobody), "alone": jnp.ones((), bool)}
        return state | setup.kept(setup.start_optimizer(own, trained_leaves))

    def find_parts(server: PyTree, number: Number) -> PyTree:
        """Return what a client receives: its clusters' pair, the others' mean, where others are, if it is in none."""
        if "parts" in server:
            parts = server["parts"]
            return {**parts, "alone": parts["alone"] | (number == nobody)}
        table, (depths, _) = jnp.asarray(server["clusters"]), number_layers(server["start"], setup)
        mine = jnp.take(table, number, axis=0, mode="fill", fill_value=none)  # [layers]
        sizes = jnp.sum(table[..., None] == jnp.arange(most), axis=0)  # [layers, most]
        others = sizes * (mine[:, None] != jnp.arange(most))
        shares = others / jnp.maximum(others.sum(axis=1, keepdims=True), 1)
        pair, rest, outside = {}, {}, {}
        for path, site in by_site(server["tiers"]).items():
            cluster, share = mine[depths[path]], shares[depths[path]]  # [*stack], [*stack, most]
            at = jnp.minimum(cluster, most - 1)[None, ..., None, None]
            for name, leaf in site.items():
                pair[f"{path}/{name}"] = jnp.take_along_axis(leaf, at, axis=0)[0]
                rest[f"{path}/{name}"] = jnp.sum(jnp.moveaxis(share, -1, 0)[..., None, None] * leaf, axis=0)
            outside[f"{path}/outside"] = (cluster != none) & (share.sum(axis=-1) > 0)
        parts = {"pair": pair, "rest": rest, "outside": outside}
        return {name: tree.unflatten(part) for name, part in parts.items()} | {"alone": mine[0] == none}

    def assemble(own: PyTree, parts: PyTree, scales: PyTree) -> lora.Adapter:
        def join(mine: dict[str, Array], rest: dict[str, Array], *more: dict[str, Array]) -> dict[str, Array]:
            outside, scale = more
            weight = jnp.where(outside["outside"], mine["mix"], 1.0)[..., None, None]
            return {
                "a": jnp.concatenate([mine["a"], rest["a"]], axis=-1),
                "b": jnp.concatenate([weight * mine["b"], (1 - weight) * rest["b"]], axis=-2),
                **scale,
            }

        return map_sites(join, own, parts["rest"], parts["outside"], scales)

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        parts, own = find_parts(server, client.number), personal["own"]
        alone = parts["alone"]
        received = tree.choose(alone, server["start"], parts["pair"])
        first, mixes = split_mix(own)
        begun = tree.combine(tree.choose(alone, first, parts["pair"]), mixes)
        optimizer = setup.start_optimizer(begun, trained_leaves)
        if setup.keep_optimizer:
            optimizer = tree.choose(alone == personal["alone"], personal["optimizer"], optimizer)
        ended, optimizer, metrics = ctx.train(
            begun, optimizer, client, trained=trained_leaves,
            assemble=lambda own: assemble(own, parts, server["scales"]),
        )  # fmt: skip
        pair, mixes = split_mix(ended)
        mixes = jax.tree.map(lambda mix: jnp.clip(mix, 0, 1), mixes)
        message = jax.tree.map(jnp.subtract, pair, received)
        kept = tree.combine(tree.choose(alone, pair, first), mixes)
        state = {"own": kept, "number": client.number, "alone": alone, **setup.kept(optimizer)}
        return tree.choose(client.mask.any(), state, personal), message, metrics | {"update_norm": norm_of(message)}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        numbers, counts, made = ctx.numbers, weights > 0, jnp.asarray(server["made"])
        assert numbers is not None
        # Once there are clusters, messages are updates of their pairs, and the pool has nothing more to remember.
        server = {**server, "pool": renew(server["pool"], messages, numbers, weights * ~made, ctx.round)}
        now = ~made & (ctx.round >= options.warmup) & counts.any()
        changed = jax.lax.cond(now, allocate, lambda server: improve(server, messages, numbers, counts), server)
        many = jnp.max(jnp.where(changed["clusters"] == none, -1, changed["clusters"])) + 1
        return {**server, **changed}, {"clusters": many.astype(jnp.float32)}

    def allocate(server: PyTree) -> PyTree:
        """Cluster the clients of the pool layer by layer, and make the clusters' pairs."""
        pool, layers = server["pool"], number_layers(server["start"], setup)
        there, b = pool["number"] != NOBODY, tree.partition(pool["moved"], only("b"))[0]
        distances = measure_layer_distances(b, b, *layers)
        clusters = cut_tree(distances, there, most, options.window, options.threshold)  # [layers, P]
        steps = mean_by_layer(pool["moved"], clusters.T, there, most, layers[0])
        tiers = jax.tree.map(jnp.add, server["start"], steps)
        table = jnp.asarray(server["clusters"])
        table = table.at[jnp.where(there, pool["number"], nobody)].set(clusters.T, mode="drop")
        return {"tiers": tiers, "clusters": table, "made": jnp.ones((), bool)}

    def improve(server: PyTree, messages: PyTree, numbers: Array, counts: Bool[Array, " K"]) -> PyTree:
        """Add each cluster's pair its mean update; who is in none goes where the nearest of the pool went."""
        pool, table, layers = server["pool"], jnp.asarray(server["clusters"]), number_layers(server["start"], setup)
        clusters = jnp.take(table, numbers, axis=0)
        steps = mean_by_layer(messages, clusters, counts, most, layers[0])
        mine, theirs = (tree.partition(part, only("b"))[0] for part in (messages, pool["moved"]))
        apart = measure_layer_distances(mine, theirs, *layers).mean(axis=0)
        nearest = jnp.argmin(jnp.where(pool["number"] != NOBODY, apart, jnp.inf), axis=1)
        joins = counts & (clusters[:, 0] == none) & server["made"]
        rows = jnp.take(table, jnp.take(pool["number"], nearest), axis=0)
        table = table.at[jnp.where(joins, numbers, nobody)].set(rows, mode="drop")
        tiers = jax.tree.map(jnp.add, server["tiers"], steps)
        return {"tiers": tiers, "clusters": table, "made": jnp.asarray(server["made"])}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        parts, (pair, mixes) = find_parts(server, personal["number"]), split_mix(personal["own"])
        untrained = (personal["number"] == nobody) & server["made"]
        pair = tree.choose(parts["alone"], tree.choose(untrained, parts["rest"], pair), parts["pair"])
        return assemble(tree.combine(pair, mixes), parts, server["scales"])

    def trained(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        parts = find_parts(server, personal["number"])
        received = tree.choose(parts["alone"], server["start"], parts["pair"])
        pair = jax.tree.map(jnp.add, received, message)
        return assemble(tree.combine(pair, split_mix(personal["own"])[1]), parts, server["scales"])

    def broadcast(server: PyTree, number: Number, last: PyTree | None) -> PyTree:
        del last
        return {"parts": find_parts(server, number), "made": server["made"]}

    def travels(server: PyTree, messages: PyTree) -> base.Travelling:
        del server
        one = base.shape_of_one(messages)
        return one, {"pair": one, "rest": one}

    average = "every cluster of a layer has a pair of its own: there is no one average to step or to stay near"
    return Method(
        name="fedtreelora",
        source="arXiv 2603.13282: a tree of clients by their B after a warm-up, cut more finely with depth; "
        "W_0 + λ B_c A_c + (1−λ) B_e A_e, means of the layer's cluster and of the others; equations at second hand",
        init=init, init_client=init_client, client_update=client_update, aggregate=aggregate, personalise=personalise,
        trained=trained, download=lambda server: {}, broadcast=broadcast, view=replace_table,
        travels=travels, mixes=True, pairs=2,
        refuses={
            **dict.fromkeys(("server", "local.proximal", "local.scaffold"), average),
            "lora.ranks": "clients receive the others' factors, which must have the form of their own",
            "train.weighting": "a cluster's pair is the plain mean over its clients",
        },
        moot=frozenset({"train.weighting"}),
        unreached=describe_unreached("fedtreelora", "pair", options.warmup, setup.rounds),
    )  # fmt: skip


def split_mix(own: PyTree) -> tuple[PyTree, PyTree]:
    """Split what a client trains into its pair and its λ."""
    return tree.partition(own, is_factor)
