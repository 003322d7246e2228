"""Methods that are a share rule: what the rule names is averaged, everything else stays with its client.

θ_shared ← θ_shared + η(Σ_k p_k Δ_k), Δ_k = θ_k − θ_shared. With Σ p_k = 1 and η the identity this is the weighted mean
of the clients' values, and it leaves the server as it is when nobody counts. What else a method does is a field of
`Parts`: which factors are trained in which phase, what lies between A and B, another average, something done to the
average. The server's optimisers (arXiv 2003.00295) are part of it; FedProx (arXiv 1812.06127), SCAFFOLD (arXiv
1910.06378) and ranks that differ between clients are wrappers around it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.sites import as_patterns
from fedvlm_jax.methods.base import (
    Aggregated,
    Client,
    Context,
    Key,
    Message,
    Method,
    Number,
    Personal,
    Server,
    Setup,
    Updated,
    Weights,
    both_ways,
    is_factor,
    one_phase,
    shape_of_one,
)
from fedvlm_jax.methods.components import client_regularizers, heterogeneous_ranks
from fedvlm_jax.methods.components.heterogeneous_ranks import Held
from fedvlm_jax.methods.components.norms import norm_of, only_a, personal_drift
from fedvlm_jax.methods.components.server_optimizers import make_server_optimizer
from fedvlm_jax.methods.config import SHARE, MethodOptions
from fedvlm_jax.utils import tree

NOTHING = lora.Rule(())
FACTORS = lora.Rule(r"(^|/)(a|b)$")
FACTOR_A = lora.Rule(r"(^|/)a$")
FACTOR_B = lora.Rule(r"(^|/)b$")


def mean_update(shared: PyTree, messages: Message, weights: Weights, held: Held | None) -> PyTree:
    """Average the updates, Σ p_k Δ_k; where ranks differ each direction over those who have it."""
    del shared
    return tree.weighted_sum(messages, weights) if held is None else heterogeneous_ranks.mean(messages, weights, held)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A method beside its rule: each field is one thing that it does otherwise than averaging.

    Attributes:
        extend: (adapter) -> the tree that is trained and shared, an adapter with more leaves say; once, at the start.
        assemble: (tree) -> the adapter.
        trained: phase -> (path) -> whether the leaf is trained. What is not trained does not travel either.
        phase: (round) -> phase.
        average: (shared, messages [K, …], weights [K], held [K, R]) -> the update of what the messages hold. `held` is
            `Context.held`; what a client lacks is zero in its message.
        after: (shared, round) -> shared, when the update was added.
        restart: the private part begins every round where it began its first; until the next the client uses what it
            became. The optimiser starts anew with it.
        fresh: the optimiser starts anew in every round: the server gives what is trained another basis each time.
        basis: (round) -> which basis what is trained has in it, for a server that changes it now and then. A client
            that meets another one than in its last round starts its optimiser anew.
        refuses: which of `AVERAGING` it does not take: option -> why, as in `Method`.
        moot: as in `Method`.
    """

    extend: Callable[[lora.Adapter], PyTree] = lambda adapter: adapter
    assemble: Callable[[PyTree], lora.Adapter] = lambda factors: factors
    trained: tuple[Callable[[str], bool], ...] = (is_factor,)
    phase: Callable[[int], int] = one_phase
    average: Callable[[PyTree, Message, Weights, Held | None], PyTree] = mean_update
    after: Callable[[PyTree, Number], PyTree] | None = None
    restart: bool = False
    fresh: bool = False
    basis: Callable[[Number], Number] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    moot: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Options(MethodOptions):
    """The method that a rule alone makes"""

    rule: Annotated[str, tyro.conf.arg(metavar="REGEX", aliases=("--share",))] = ""
    """Factors in whose path (as `fedvlm explain` prints it) this is found are averaged, all others stay with their
    client. For example 'decoder/.*/b$'."""


def make(setup: Setup) -> Method:
    """Make the method of the rule that `--share` gives."""
    rule = setup.own(Options).rule
    source = f"ours: factors whose path holds {rule or 'what --share says'} are averaged, the others are private"
    return make_share_method(SHARE, source, lora.Rule(rule), setup)


def make_share_method(name: str, source: str, rule: lora.Rule, setup: Setup, parts: Parts = Parts()) -> Method:
    """Make a method of a rule, with FedProx, SCAFFOLD and ranks per client around it where the setup has them.

    State: the server holds `shared`, and `start`, the private part that newcomers begin with; a client holds `own`, its
    private part, and, if it keeps it, the state of its optimiser for every phase.
    """
    method = _make_plain(name, source, rule, setup, parts)
    if setup.local.proximal:
        method = client_regularizers.with_proximal(method, setup.local.proximal)
    if setup.local.scaffold:
        method = client_regularizers.with_scaffold(method)
    return heterogeneous_ranks.with_ranks(method, setup.ranks)


def _make_plain(name: str, source: str, rule: lora.Rule, setup: Setup, parts: Parts) -> Method:
    rule = dataclasses.replace(rule, exclude=(*as_patterns(rule.exclude), r"(^|/)scale(/|$)"))  # data, not learned
    optimizer = make_server_optimizer(setup.server)
    keeps = setup.keep_optimizer and not (parts.fresh or parts.restart)

    def split(factors: PyTree) -> tuple[PyTree, PyTree]:
        return lora.partition(factors, rule, setup.sites)

    def init(adapter: lora.Adapter) -> Server:
        shared, own = split(parts.extend(adapter))
        return {"shared": shared, "start": own, "optimizer": optimizer.init(shared)}

    def init_client(key: Key, server: Server, number: Number) -> Personal:
        del number
        own = server["start"] if setup.common_start else split(parts.extend(setup.draw(key)))[1]
        personal = {"own": own}
        first = own if parts.restart else only_a(own)
        if first and not setup.common_start:
            personal["first"] = first
        if keeps:
            personal["optimizer"] = start_optimizers(lora.combine(server["shared"], own))
            personal |= {"basis": jnp.int32(-1)} if parts.basis is not None else {}
        return personal

    def start_optimizers(factors: PyTree) -> tuple[PyTree, ...]:
        return tuple(setup.start_optimizer(factors, trained) for trained in parts.trained)

    def find_optimizers(ctx: Context, personal: Personal, factors: PyTree) -> list[PyTree]:
        """Return those that the client kept, where they mean something for these factors, else fresh ones."""
        if not keeps:
            return list(start_optimizers(factors))
        if parts.basis is None:
            return list(personal["optimizer"])
        same = personal["basis"] == parts.basis(ctx.round)
        fresh = start_optimizers(factors)
        return list(jax.tree.map(lambda kept, new: jnp.where(same, kept, new), personal["optimizer"], fresh))

    def client_update(ctx: Context, server: Server, personal: Personal, client: Client, key: Key) -> Updated:
        del key  # nothing here is random
        first = server["start"] if setup.common_start else personal.get("first", {})
        factors = lora.combine(server["shared"], first if parts.restart else personal["own"])
        optimizers = find_optimizers(ctx, personal, factors)
        received, _ = split(factors)
        trained = parts.trained[ctx.phase]
        factors, optimizers[ctx.phase], metrics = ctx.train(
            factors, optimizers[ctx.phase], client, trained=trained, assemble=parts.assemble
        )
        shared, own = split(factors)
        update = _select_trained(jax.tree.map(jnp.subtract, shared, received), trained)
        metrics |= {"update_norm": norm_of(update), "personal_drift": personal_drift(own, first)}
        state = {**personal, "own": own}
        if keeps:
            state["optimizer"] = tuple(optimizers)
            state |= {"basis": jnp.int32(parts.basis(ctx.round))} if parts.basis is not None else {}
        if parts.restart or parts.basis is not None:  # what began anew is not kept of a client that took no step
            took = client.mask.any()
            state = jax.tree.map(lambda new, old: jnp.where(took, new, old), state, personal)
        return state, update, metrics

    def aggregate(ctx: Context, server: Server, messages: Message, weights: Weights) -> Aggregated:
        shared = server["shared"]
        update = parts.average(shared, messages, weights, ctx.held)
        step, state = optimizer.step(update, server["optimizer"], weights, ctx.held)
        new = _add(shared, step)
        if parts.after is not None:
            counts = weights.sum() > 0
            new = jax.tree.map(lambda after, now: jnp.where(counts, after, now), parts.after(new, ctx.round), new)
        health = {"shared_norm": norm_of(new), "shared_update_norm": norm_of(update)}
        return {**server, "shared": new, "optimizer": state}, health

    def personalise(server: Server, personal: Personal) -> lora.Adapter:
        return parts.assemble(lora.combine(server["shared"], personal["own"]))

    def trained_adapter(server: Server, personal: Personal, message: Message) -> lora.Adapter:
        shared, own = split(lora.combine(server["shared"], personal["own"]))
        return parts.assemble(lora.combine(_add(shared, message), own))

    # The server may change more than the clients do, and then sends all that it holds.
    travels = both_ways if parts.after is None else lambda server, messages: (shape_of_one(messages), server["shared"])
    return Method(
        name=name, source=source, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate,
        personalise=personalise, trained=trained_adapter, download=lambda server: server["shared"], phase=parts.phase,
        travels=travels, split=split, refuses=parts.refuses, moot=parts.moot,
    )  # fmt: skip


def _select_trained(update: PyTree, trained: Callable[[str], bool]) -> PyTree:
    """Select what was trained; a layer that a rule split off, `…/b/3`, was if its factor was."""
    return tree.partition(update, lambda path: trained(re.sub(r"/\d+(\.\d+)*$", "", path)))[0]


def _add(shared: PyTree, update: PyTree) -> PyTree:
    """Add an update of some leaves; the others stay."""
    flat = tree.flatten(update)
    return tree.unflatten({path: x + flat[path] if path in flat else x for path, x in tree.flatten(shared).items()})
