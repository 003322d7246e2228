"""Methods that are a share rule: what the rule names is averaged, everything else stays with its client.

θ_shared ← θ_shared + η(Σ_k p_k Δ_k), Δ_k = θ_k − θ_shared. With Σ p_k = 1 and η the identity this is the weighted mean
of the clients' values, and it leaves the server as it is when nobody counts. What else a method does is a field of
`Parts`: which factors are trained in which phase, what lies between A and B, another average, something done to the
average. FedProx (arXiv 1812.06127), SCAFFOLD (arXiv 1910.06378), the server's optimisers (arXiv 2003.00295) and ranks
that differ between clients are here once, for all of them.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.sites import as_patterns
from fedvlm_jax.methods.base import Client, Context, Message, Method, Metrics, Personal, Server, Setup, is_factor
from fedvlm_jax.methods.components import client_regularizers, heterogeneous_ranks
from fedvlm_jax.methods.components.norms import norm_of, only_a, personal_drift
from fedvlm_jax.methods.components.server_optimizers import make_server_optimizer
from fedvlm_jax.utils import tree

__all__ = [
    "AVERAGING",
    "FACTORS",
    "FACTOR_A",
    "FACTOR_B",
    "NOTHING",
    "Parts",
    "make",
    "make_share_method",
    "mean_update",
]

NOTHING = lora.Rule(())
FACTORS = lora.Rule(r"(^|/)(a|b)$")
FACTOR_A = lora.Rule(r"(^|/)a$")
FACTOR_B = lora.Rule(r"(^|/)b$")

AVERAGING = ("server", "local.proximal", "local.scaffold", "lora.ranks")
"""The options that come with an average of updates, see `Method.takes`."""

Weights = Float[Array, " cohort"]
Held = Float[Array, "cohort rank"]


def mean_update(shared: PyTree, messages: Message, weights: Weights, held: Held | None) -> PyTree:
    """Σ p_k Δ_k; where ranks differ each direction's mean over those who have it."""
    del shared
    return tree.weighted_sum(messages, weights) if held is None else heterogeneous_ranks.mean(messages, weights, held)


@dataclass(frozen=True)
class Parts:
    """What a method does beside its rule.

    Attributes:
        extend: (adapter) -> the tree that is trained and shared, an adapter with more leaves say; once, at the start.
        assemble: (tree) -> the adapter.
        trained: phase -> (path) -> is the leaf trained? What is not trained does not travel either.
        phase: (round) -> phase.
        average: (shared, messages [K, …], weights [K], held [K, R]) -> the update of what the messages hold. `held`
            says which of the directions of a factor a client has, 1 or 0, and is None where all have the same rank;
            what a client lacks is zero in its message.
        after: (shared, round) -> shared, when the update was added.
        restart: the private part begins every round where it began its first; until the next the client uses what it
            became. The optimiser starts anew with it.
        fresh: the optimiser starts anew in every round: the server gives what is trained another basis each time.
        basis: (round) -> which basis what is trained has in it, for a server that changes it now and then. A client
            that meets another one than in its last round starts its optimiser anew.
        reads: options of its own, `hyper.ditto_lambda` say.
        refuses: which of `AVERAGING` it does not take: option -> why, as in `Method`.
        moot: as in `Method`.
    """

    extend: Callable[[lora.Adapter], PyTree] = lambda adapter: adapter
    assemble: Callable[[PyTree], lora.Adapter] = lambda factors: factors
    trained: tuple[Callable[[str], bool], ...] = (is_factor,)
    phase: Callable[[int], int] | None = None
    average: Callable[[PyTree, Message, Weights, Held | None], PyTree] = mean_update
    after: Callable[[PyTree, Int[Array, ""]], PyTree] | None = None
    restart: bool = False
    fresh: bool = False
    basis: Callable[[Int[Array, ""]], Int[Array, ""]] | None = None
    reads: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    moot: frozenset[str] = frozenset()


def make(setup: Setup) -> Method:
    """The rule that `--share` gives."""
    source = f"ours: factors whose path holds {setup.share or 'what --share says'} are averaged, the others are private"
    return make_share_method("share", source, lora.Rule(setup.share), setup, Parts(reads=("share",)))


def make_share_method(name: str, source: str, rule: lora.Rule, setup: Setup, parts: Parts = Parts()) -> Method:
    """Build a method from a rule.

    State: the server holds `shared`, and `start`, the private part that newcomers begin with; a client holds `own`, its
    private part, and, if it keeps it, the state of its optimiser for every phase.
    """
    rule = dataclasses.replace(rule, exclude=(*as_patterns(rule.exclude), r"(^|/)scale(/|$)"))  # data, not learned
    optimizer = make_server_optimizer(setup.server)
    local = setup.local
    keeps = setup.keep_optimizer and not (parts.fresh or parts.restart)

    def init(adapter: lora.Adapter) -> Server:
        shared, own = lora.partition(parts.extend(adapter), rule, setup.sites)
        server = {"shared": shared, "start": own, "optimizer": optimizer.init(shared)}
        return server | ({"control": client_regularizers.start(shared)} if local.scaffold else {})

    def init_client(key: PRNGKeyArray, server: Server, number: Int[Array, ""]) -> Personal:
        own = server["start"]
        if not setup.common_start:
            _, own = lora.partition(parts.extend(setup.draw(key)), rule, setup.sites)
        if setup.ranks:
            own = heterogeneous_ranks.cut(own, heterogeneous_ranks.of(setup, number))
        personal = {"own": own}
        first = own if parts.restart else only_a(own)
        if first and not setup.common_start:
            personal["first"] = first
        if keeps:
            personal["optimizer"] = _start_optimizers(lora.combine(server["shared"], own))
            personal |= {"basis": jnp.int32(-1)} if parts.basis is not None else {}
        personal |= {"control": client_regularizers.start(server["shared"])} if local.scaffold else {}
        return personal | ({"rank": heterogeneous_ranks.of(setup, number)} if setup.ranks else {})

    def _start_optimizers(factors: PyTree) -> tuple[PyTree, ...]:
        return tuple(setup.start_optimizer(factors, trained) for trained in parts.trained)

    def _find_optimizers(ctx: Context, personal: Personal, factors: PyTree) -> list[PyTree]:
        """The client's own where it has any that mean something for these factors, else fresh ones."""
        if not keeps:
            return list(_start_optimizers(factors))
        if parts.basis is None:
            return list(personal["optimizer"])
        same = personal["basis"] == parts.basis(ctx.round)
        fresh = _start_optimizers(factors)
        return list(jax.tree.map(lambda kept, new: jnp.where(same, kept, new), personal["optimizer"], fresh))

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        del key  # nothing here is random
        trained = parts.trained[ctx.phase]
        factors = _factors(server, personal, _begin(server, personal))
        optimizers = _find_optimizers(ctx, personal, factors)
        received = lora.partition(factors, rule, setup.sites)[0]
        nudges = [client_regularizers.make_proximal(local.proximal, received)] if local.proximal else []
        nudges += (
            [client_regularizers.make_correction(server["control"], personal["control"])] if local.scaffold else []
        )
        nudges = nudges if _sent(received, trained) else []  # they hold back what is shared: here that is frozen
        factors, optimizers[ctx.phase], metrics = ctx.train(
            factors,
            optimizers[ctx.phase],
            client,
            trained=trained,
            assemble=parts.assemble,
            nudge=client_regularizers.make_nudge(nudges, rule, setup.sites) if nudges else None,
        )
        shared, own = lora.partition(factors, rule, setup.sites)
        update = _sent(jax.tree.map(jnp.subtract, shared, received), trained)
        message: Message = update
        metrics |= {"update_norm": norm_of(update), "personal_drift": personal_drift(own, _first(server, personal))}
        state = {**personal, "own": own}
        if keeps:
            state["optimizer"] = tuple(optimizers)
            state |= {"basis": jnp.int32(parts.basis(ctx.round))} if parts.basis is not None else {}
        if parts.restart or parts.basis is not None:  # what began anew is not kept of a client that took no step
            took = client.mask.any()
            state = jax.tree.map(lambda new, old: jnp.where(took, new, old), state, personal)
        if local.scaffold:
            state["control"], moved = client_regularizers.renew(
                server["control"], personal["control"], update, client, ctx.rates
            )
            message = {"update": update, "control": moved}
        if setup.ranks:
            message = {"update": update, "rank": personal["rank"]}
        return state, message, metrics

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> tuple[Server, Metrics]:
        shared = server["shared"]
        updates = messages["update"] if local.scaffold or setup.ranks else messages
        held = heterogeneous_ranks.find_held(setup, messages["rank"]) if setup.ranks else None
        update = parts.average(shared, updates, weights, held)
        step, state = optimizer.step(update, server["optimizer"], weights)
        # Momentum must not move what nobody sent. Plain averages move it only where the method says so: flexlora's step
        # is from one basis to another, and half of one is neither.
        if held is not None and setup.server.optimizer != "avg":
            sent = jnp.any((held > 0) & (weights > 0)[:, None], axis=0)
            step = heterogeneous_ranks.where_sent(sent, step, jax.tree.map(jnp.zeros_like, step))
            state = heterogeneous_ranks.where_sent(sent, state, server["optimizer"])
        new = tree.combine(*_add(shared, step))
        if parts.after is not None:
            counts = weights.sum() > 0
            new = jax.tree.map(lambda after, now: jnp.where(counts, after, now), parts.after(new, ctx.round), new)
        server = {**server, "shared": new, "optimizer": state}
        if local.scaffold:
            server["control"] = client_regularizers.average(server["control"], messages["control"], weights)
        return server, {"shared_norm": norm_of(new), "shared_update_norm": norm_of(update)}

    def _begin(server: Server, personal: Personal) -> PyTree:
        """The private part that a round's training goes on from."""
        return _first(server, personal) if parts.restart else personal["own"]

    def _first(server: Server, personal: Personal) -> PyTree:
        """The private part that the client began its first round with; its A at least, all where rounds restart."""
        first = server["start"] if setup.common_start else personal.get("first", {})
        return heterogeneous_ranks.cut(first, personal["rank"]) if setup.ranks else first

    def _factors(server: Server, personal: Personal, own: PyTree) -> PyTree:
        shared = server["shared"]
        if setup.ranks:
            shared = heterogeneous_ranks.cut(shared, personal["rank"])
        return lora.combine(shared, own)

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        return parts.assemble(_factors(server, personal, personal["own"]))

    def trained_adapter(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        update = message["update"] if local.scaffold or setup.ranks else message
        factors = _factors(server, personal, personal["own"])
        shared, own = lora.partition(factors, rule, setup.sites)
        return parts.assemble(lora.combine(tree.combine(*_add(shared, update)), own))

    def download(server: Server) -> PyTree:
        return server["shared"] | ({"control": server["control"]} if local.scaffold else {})

    def travels(server: Server, messages: Message) -> tuple[PyTree, PyTree]:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), messages)
        # What clients change is what the server sends anew; and all that it holds where it changes that itself.
        return one, one if parts.after is None else server["shared"]

    return Method(
        name, source, init, init_client, client_update, aggregate, personalise, trained_adapter, download,
        phase=parts.phase, travels=travels,
        takes=frozenset(AVERAGING).difference(parts.refuses).union(parts.reads), refuses=parts.refuses,
        moot=parts.moot,
    )  # fmt: skip


def _sent(update: PyTree, trained: Callable[[str], bool]) -> PyTree:
    """What was trained; a layer that a rule split off, `…/b/3`, was if its factor was."""
    return tree.partition(update, lambda path: trained(re.sub(r"/\d+(\.\d+)*$", "", path)))[0]


def _add(shared: PyTree, update: PyTree) -> tuple[PyTree, PyTree]:
    """`shared` plus an update of some of its leaves, and the leaves that it leaves alone."""
    paths = tree.flatten(update).keys()
    moved, kept = tree.partition(shared, lambda path: path in paths)
    return jax.tree.map(jnp.add, moved, update), kept
