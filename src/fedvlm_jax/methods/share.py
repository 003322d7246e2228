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

from fedvlm_jax import lora, tree
from fedvlm_jax.lora.sites import as_patterns
from fedvlm_jax.methods.parts import control, ranks
from fedvlm_jax.methods.parts.norms import norm_of, personal_drift
from fedvlm_jax.methods.parts.optimizers import make_server_optimizer
from fedvlm_jax.methods.record import Client, Context, Message, Method, Metrics, Personal, Server, Setup, is_factor

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


def mean_update(shared: PyTree, messages: Message, weights: Weights) -> PyTree:
    """Σ p_k Δ_k."""
    del shared
    return tree.weighted_sum(messages, weights)


@dataclass(frozen=True)
class Parts:
    """What a method does beside its rule.

    Attributes:
        extend: (adapter) -> the tree that is trained and shared, an adapter with more leaves say; once, at the start.
        assemble: (tree) -> the adapter.
        trained: phase -> (path) -> is the leaf trained? What is not trained does not travel either.
        phase: (round) -> phase.
        average: (shared, messages [K, …], weights [K]) -> the update of what the messages hold.
        after: (shared, round) -> shared, when the update was added.
        restart: the private part begins anew in every round.
        reads: options of its own, `hyper.ditto_lambda` say.
        refuses: which of `AVERAGING` it does not take: option -> why, as in `Method`.
        moot: as in `Method`.
    """

    extend: Callable[[lora.Adapter], PyTree] = lambda adapter: adapter
    assemble: Callable[[PyTree], lora.Adapter] = lambda factors: factors
    trained: tuple[Callable[[str], bool], ...] = (is_factor,)
    phase: Callable[[int], int] | None = None
    average: Callable[[PyTree, Message, Weights], PyTree] = mean_update
    after: Callable[[PyTree, Int[Array, ""]], PyTree] | None = None
    restart: bool = False
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
    private part, and the state of its optimiser for every phase.
    """
    rule = dataclasses.replace(rule, exclude=(*as_patterns(rule.exclude), r"(^|/)scale(/|$)"))  # data, not learned
    optimizer = make_server_optimizer(setup.server)
    local = setup.local

    def init(adapter: lora.Adapter) -> Server:
        shared, own = lora.partition(parts.extend(adapter), rule, setup.sites)
        server = {"shared": shared, "start": own, "optimizer": optimizer.init(shared)}
        return server | ({"control": control.start(shared)} if local.scaffold else {})

    def init_client(key: PRNGKeyArray, server: Server, number: Int[Array, ""]) -> Personal:
        own = server["start"]
        if not setup.common_start:
            _, own = lora.partition(parts.extend(setup.draw(key)), rule, setup.sites)
        if setup.ranks:
            own = ranks.cut(own, ranks.of(setup, number))
        personal = {"own": own, "optimizer": _start_optimizers(lora.combine(server["shared"], own))}
        personal |= {"control": control.start(server["shared"])} if local.scaffold else {}
        return personal | ({"rank": ranks.of(setup, number)} if setup.ranks else {})

    def _start_optimizers(factors: PyTree) -> tuple[PyTree, ...]:
        return tuple(setup.start_optimizer(factors, trained) for trained in parts.trained)

    def client_update(
        ctx: Context, server: Server, personal: Personal, client: Client, key: PRNGKeyArray
    ) -> tuple[Personal, Message, Metrics]:
        del key  # nothing here is random
        trained = parts.trained[ctx.phase]
        factors = _factors(server, personal)
        optimizers = list(personal["optimizer"] if setup.keep_optimizer else _start_optimizers(factors))
        received = lora.partition(factors, rule, setup.sites)[0]
        nudges = [control.make_proximal(local.proximal, received)] if local.proximal else []
        nudges += [control.make_correction(server["control"], personal["control"])] if local.scaffold else []
        nudges = nudges if _sent(received, trained) else []  # they hold back what is shared: here that is frozen
        factors, optimizers[ctx.phase], metrics = ctx.train(
            factors,
            optimizers[ctx.phase],
            client,
            trained=trained,
            assemble=parts.assemble,
            nudge=control.make_nudge(nudges, rule, setup.sites) if nudges else None,
        )
        shared, own = lora.partition(factors, rule, setup.sites)
        update = _sent(jax.tree.map(jnp.subtract, shared, received), trained)
        message: Message = update
        metrics |= {"update_norm": norm_of(update), "personal_drift": personal_drift(own, server["start"])}
        state = {**personal, "own": personal["own"] if parts.restart else own, "optimizer": tuple(optimizers)}
        if local.scaffold:
            state["control"], moved = control.renew(server["control"], personal["control"], update, client, ctx.rates)
            message = {"update": update, "control": moved}
        if setup.ranks:
            message = {"update": update, "rank": personal["rank"]}
        return state, message, metrics

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> tuple[Server, Metrics]:
        shared = server["shared"]
        updates = messages["update"] if local.scaffold or setup.ranks else messages
        if setup.ranks:
            updates = ranks.pad_updates(shared, updates, messages["rank"])
        update = parts.average(shared, updates, weights)
        step, state = optimizer.step(update, server["optimizer"], weights)
        new = tree.combine(*_add(shared, step))
        if parts.after is not None:
            counts = weights.sum() > 0
            new = jax.tree.map(lambda after, now: jnp.where(counts, after, now), parts.after(new, ctx.round), new)
        server = {**server, "shared": new, "optimizer": state}
        if local.scaffold:
            server["control"] = control.average(server["control"], messages["control"], weights, setup.population)
        return server, {"shared_norm": norm_of(new), "shared_update_norm": norm_of(update)}

    def _factors(server: Server, personal: Personal) -> PyTree:
        shared = server["shared"]
        if setup.ranks:
            shared = ranks.cut(shared, personal["rank"])
        return lora.combine(shared, personal["own"])

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        return parts.assemble(_factors(server, personal))

    def trained_adapter(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        update = message["update"] if local.scaffold or setup.ranks else message
        factors = _factors(server, personal)
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
