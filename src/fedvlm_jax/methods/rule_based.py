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
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.sites import as_patterns
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import Aggregated, Client, Context, Held, Key, Method, Number, Setup, Updated, Weights
from fedvlm_jax.methods.components import client_regularizers, heterogeneous_ranks, server_optimizers
from fedvlm_jax.methods.components.factors import norm_of, only_a, personal_drift
from fedvlm_jax.methods.config import SHARE, MethodOptions
from fedvlm_jax.utils import tree

_ANOTHER_BASIS = {
    "top-k": "the server gives what is trained another basis, in which what was left out is another update"
}
NOTHING = lora.Rule(())
FACTORS = lora.Rule(r"(^|/)(a|b)$")
FACTOR_A = lora.Rule(r"(^|/)a$")
FACTOR_B = lora.Rule(r"(^|/)b$")


def mean_update(shared: PyTree, messages: PyTree, weights: Weights, held: Held | None) -> PyTree:
    """Average the updates, Σ p_k Δ_k; where ranks differ each direction over those who have it.

    >>> mean_update({}, {"b": jnp.asarray([[1.0], [3.0]])}, jnp.asarray([0.25, 0.75]), None)["b"].tolist()
    [2.5]
    """
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
        linear: as in `Method`, for the average; None: it is the plain one, which is.
        refuses, moot: as in `Method`, but nothing is refused unless it is said here.
        prompt, parallel, patches, unreached: as in `Method`.
    """

    extend: Callable[[lora.Adapter], PyTree] = lambda adapter: adapter
    assemble: Callable[[PyTree], lora.Adapter] = lambda factors: factors
    trained: tuple[Callable[[str], bool], ...] = (base.is_factor,)
    phase: Callable[[int], int] = lambda round_: 0
    average: Callable[[PyTree, PyTree, Weights, Held | None], PyTree] = mean_update
    after: Callable[[PyTree, Number], PyTree] | None = None
    restart: bool = False
    fresh: bool = False
    basis: Callable[[Number], Number] | None = None
    linear: bool | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    moot: frozenset[str] = frozenset()
    prompt: Literal["refused", "taken", "needed"] = "refused"
    parallel: bool = False
    patches: bool = False
    unreached: str = ""


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
    return make_share_method(SHARE, source, lora.Rule(rule), setup, Parts(prompt="taken"))


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
        if setup.rounds < 2:
            idle = "in 1 round --local.scaffold corrects nothing: control variates begin at zero"
            method = dataclasses.replace(method, unreached="; ".join(filter(None, (method.unreached, idle))))
    # Outermost, so that the anchors and control variates of the other two are truncated as well.
    return heterogeneous_ranks.with_ranks(method, setup.ranks)


def _make_plain(name: str, source: str, rule: lora.Rule, setup: Setup, parts: Parts) -> Method:
    rule = dataclasses.replace(rule, exclude=(*as_patterns(rule.exclude), r"(^|/)scale(/|$)"))  # data, not learned
    keeps = setup.keep_optimizer and not (parts.fresh or parts.restart)

    def split(factors: PyTree) -> tuple[PyTree, PyTree]:
        return lora.partition(factors, rule, setup.sites)

    def start_optimizers(factors: PyTree) -> tuple[PyTree, ...]:
        return tuple(setup.start_optimizer(factors, trained) for trained in parts.trained)

    def init(adapter: lora.Adapter) -> PyTree:
        shared, private = split(parts.extend(adapter))
        return {"shared": shared, "start": private, "optimizer": server_optimizers.start(setup.server, shared)}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        del number
        private = server["start"] if setup.common_start else split(parts.extend(setup.draw(key)))[1]
        personal = {"own": private}
        first = private if parts.restart else only_a(private)
        if first and not setup.common_start:
            personal["first"] = first
        if keeps:
            personal["optimizer"] = start_optimizers(lora.combine(server["shared"], private))
            # No round has the basis -1: in its first a client meets another one.
            personal |= {"basis": jnp.int32(-1)} if parts.basis is not None else {}
        return personal

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key  # nothing here is random
        first = server["start"] if setup.common_start else personal.get("first", {})
        factors = lora.combine(server["shared"], first if parts.restart else personal["own"])
        optimizers = personal["optimizer"] if keeps else start_optimizers(factors)
        if keeps and parts.basis is not None:
            same = personal["basis"] == parts.basis(ctx.round)
            fresh = start_optimizers(factors)
            optimizers = jax.tree.map(lambda kept, new: jnp.where(same, kept, new), optimizers, fresh)
        optimizers = list(optimizers)
        received, _ = split(factors)
        trained = parts.trained[ctx.phase]
        factors, optimizers[ctx.phase], metrics = ctx.train(
            factors, optimizers[ctx.phase], client, trained=trained, assemble=parts.assemble
        )
        shared, private = split(factors)
        # A layer that the rule split off, `…/b/3`, was trained if its factor was.
        update, _ = tree.partition(
            jax.tree.map(jnp.subtract, shared, received), lambda path: trained(re.sub(r"/\d+(\.\d+)*$", "", path))
        )
        metrics |= {"update_norm": norm_of(update), "personal_drift": personal_drift(private, first)}
        state = {**personal, "own": private}
        if keeps:
            state["optimizer"] = tuple(optimizers)
            state |= {"basis": jnp.int32(parts.basis(ctx.round))} if parts.basis is not None else {}
        if parts.restart or parts.basis is not None:  # what began anew is not kept of a client that took no step
            took = client.mask.any()
            state = jax.tree.map(lambda new, old: jnp.where(took, new, old), state, personal)
        return state, update, metrics

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        update = parts.average(server["shared"], messages, weights, ctx.held)
        step, state = server_optimizers.step(setup.server, update, server["optimizer"], weights, ctx.held)
        new = _add(server["shared"], step)
        if parts.after is not None:
            counts = weights.sum() > 0
            new = jax.tree.map(lambda after, now: jnp.where(counts, after, now), parts.after(new, ctx.round), new)
        health = {"shared_norm": norm_of(new), "shared_update_norm": norm_of(update)}
        return {**server, "shared": new, "optimizer": state}, health

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        return parts.assemble(lora.combine(server["shared"], personal["own"]))

    def trained_adapter(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        shared, private = split(lora.combine(server["shared"], personal["own"]))
        return parts.assemble(lora.combine(_add(shared, message), private))

    def travels(server: PyTree, messages: PyTree) -> base.Travelling:
        # The server may change more than the clients do, and then sends all that it holds.
        up = base.shape_of_one(messages)
        return up, up if parts.after is None else server["shared"]

    return Method(
        name=name, source=source, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate,
        personalise=personalise, trained=trained_adapter, download=lambda server: server["shared"], phase=parts.phase,
        broadcast=base.broadcast_parts("shared"), travels=travels, split=split,
        linear=parts.average is mean_update if parts.linear is None else parts.linear,
        refuses={**_ANOTHER_BASIS, **parts.refuses} if parts.fresh or parts.basis is not None else parts.refuses,
        moot=parts.moot, prompt=parts.prompt, classes=parts.prompt == "needed" or parts.parallel,
        parallel=parts.parallel, patches=parts.patches, unreached=parts.unreached,
    )  # fmt: skip


def _add(shared: PyTree, update: PyTree) -> PyTree:
    """Add an update of some leaves; the others stay.

    >>> _add({"a": 1, "b": 2}, {"b": 3})
    {'a': 1, 'b': 5}
    """
    flat = tree.flatten(update)
    return tree.unflatten({path: x + flat[path] if path in flat else x for path, x in tree.flatten(shared).items()})
