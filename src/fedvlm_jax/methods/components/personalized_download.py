"""Personalised downloads: every client receives another mixture of the others' adapters, which it does not train.

The server keeps a pool: what clients sent last, of as many as a round has at most, and of `POOL` where there are so
many; who sent longest ago leaves it first. What a client receives is mixed from the pool whenever its model is asked
for, when its rounds begin and when it is evaluated. So a client that comes back after a while trains beside what is in
the pool by then, one that is alone in its round has others all the same, and one that never took part has a mixture
too. In ce-lora what is mixed stands between private factors, of which B begins at zero: there it has the bare base
nonetheless.

A message is how far the client's adapter went from the start that all share, so that the values can be told from it.
With `--lora.private-a per-client` adapters begin elsewhere, and that distance is in it: methods that weigh clients by
how alike their messages are then see mostly the draws.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import Aggregated, Client, Context, Key, Method, Number, Setup, Updated, Weights, is_factor
from fedvlm_jax.methods.components.factors import norm_of, only_a, personal_drift, split_scales
from fedvlm_jax.utils import tree

_NO_AVERAGE = "every client receives a mixture of its own: there is no one average to step or to stay near"
REFUSES: dict[str, str] = {
    **dict.fromkeys(("server", "local.proximal", "local.scaffold"), _NO_AVERAGE),
    "lora.ranks": "clients receive each other's factors, which must have the form of their own",
    "train.weighting": "what a client receives is weighed by similarity, or all others count alike",
}

_HALVED = {"start": "a client uses its own adapter as a part of a mixture, and would begin with that part alone"}

POOL = 16  # places in the pool at least, where there are so many clients: a round may have one alone
NOBODY = -1  # the number at a free place of the pool

Assemble = Callable[[PyTree, PyTree, PyTree], lora.Adapter]
Weigh = Callable[[PyTree, PyTree, Bool[Array, " P"], Bool[Array, ""]], Float[Array, " P"]]


def count_places(setup: Setup, least: int = POOL) -> int:
    """Count the places of the pool, P: the cohort, and `least` where there are so many clients.

    >>> count_places(Setup(sites={}, spec=lora.LoRA(), start_optimizer=lambda *_: {}, population=40, cohort=2))
    16
    """
    return max(setup.cohort, min(least, setup.population))


def start_pool(sent: PyTree, setup: Setup, least: int = POOL) -> PyTree:
    """Make an empty pool for what has the form of `sent`: P places, the newest first, of one round by number.

    Returns:
        `moved` [P, …], what was sent, zero at free places, which come last; `number` [P], whose it is; `round` [P],
        when it came, 0 at free places.
    """
    size = count_places(setup, least)
    moved = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), sent)
    return {"moved": moved, "number": jnp.full(size, NOBODY, jnp.int32), "round": jnp.zeros(size, jnp.int32)}


def renew(
    pool: PyTree, moved: PyTree, numbers: Int[Array, " K"], weights: Float[Array, " K"], round_: Number
) -> PyTree:
    """Put what came from those who count, [K, …], into the pool, in place of what they had sent before."""
    counts = weights > 0
    again = jnp.any((pool["number"][:, None] == numbers) & counts, axis=1)
    number = jnp.concatenate([jnp.where(again, NOBODY, pool["number"]), jnp.where(counts, numbers, NOBODY)])
    came = jnp.concatenate([pool["round"], jnp.full(len(counts), round_, jnp.int32)]) * (number != NOBODY)
    order = jnp.lexsort((number, -came))[: len(pool["number"])]
    number, came = number[order], came[order]

    def keep(old: Array, new: Array) -> Array:
        both = jnp.concatenate([old, new.astype(old.dtype)])[order]
        return jnp.where((number != NOBODY).reshape(-1, *[1] * (old.ndim - 1)), both, 0)

    return {"moved": jax.tree.map(keep, pool["moved"], moved), "number": number, "round": came}


def make_delivering_method(
    name: str,
    source: str,
    setup: Setup,
    *,
    extend: Callable[[PyTree], PyTree] = lambda factors: factors,
    trained: Callable[[str], bool] = is_factor,
    sent: Callable[[str], bool] = is_factor,
    assemble: Assemble,
    weigh: Weigh,
    keep_own: bool = True,
    pairs: int = 1,
) -> Method:
    """Make a method whose clients each receive a mixture of what others sent.

    Args:
        name, source, setup, pairs: as in `Method` and `make_share_method`.
        extend: (factors) -> the tree that a client trains, with a gate say.
        trained, sent: (path) -> is the leaf trained, is it in the message?
        assemble: (own tree, delivered, scales) -> the adapter; delivered is zero where nobody else sent anything.
        weigh: (how far the client's own went, the pool's [P, …], who in the pool is somebody else [P], did the client
            ever send?) -> how much each of the pool is in what the client receives [P]; Σ ≤ 1.
        keep_own: what is delivered stands beside the own adapter; else the mixture takes the place of what was sent,
            and what is missing to Σ = 1 in it is the client's own.
    """

    def select_sent(factors: PyTree) -> PyTree:
        return tree.partition(factors, sent)[0]

    places = count_places(setup)

    def init(adapter: lora.Adapter) -> PyTree:
        factors, scales = split_scales(adapter)
        start = extend(factors)
        return {"start": start, "scales": scales, "pool": start_pool(select_sent(start), setup)}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        own = server["start"] if setup.common_start else extend(split_scales(setup.draw(key))[0])
        shares = jnp.zeros(places, jnp.float32)
        state = {"own": own, "number": jnp.asarray(number, jnp.int32), "sent": jnp.zeros((), bool), "shares": shares}
        state |= {} if setup.common_start else {"first": only_a(own)}
        return state | setup.kept(setup.start_optimizer(own, trained))

    def find_shares(server: PyTree, personal: PyTree) -> Float[Array, " P"]:
        """Weigh the pool for a client, as it is now; a client that never sent anything has not moved."""
        if "mixed" in server:
            return server["shares"]
        now, start = select_sent(personal["own"]), select_sent(server["start"])
        moved = jax.tree.map(lambda x, first: jnp.where(personal["sent"], x - first, 0), now, start)
        return weigh_pool(server["pool"], personal["number"], moved, personal["sent"])

    def weigh_pool(pool: PyTree, number: Number, moved: PyTree, sent: Bool[Array, ""]) -> Float[Array, " P"]:
        return weigh(moved, pool["moved"], (pool["number"] != NOBODY) & (pool["number"] != number), sent)

    def broadcast(server: PyTree, number: Number, last: PyTree | None) -> PyTree:
        """Mix what a client receives at the server, so that it sees nobody's message."""
        moved = jax.tree.map(jnp.zeros_like, select_sent(server["start"])) if last is None else last
        shares = weigh_pool(server["pool"], number, moved, jnp.asarray(last is not None))
        return {"mixed": mix(server, shares), "shares": shares}

    def view(start: PyTree, received: PyTree) -> PyTree:
        return {"start": start["start"], "scales": start["scales"], **received}

    def mix(server: PyTree, shares: Float[Array, " P"]) -> PyTree:
        """Return Σ_j shares_j (start + moved_j); a client that sees no pool received it."""
        if "mixed" in server:
            return server["mixed"]
        return jax.tree.map(
            lambda first, moved: shares.sum() * first + jnp.einsum("p,p...->...", shares, moved, precision="highest"),
            select_sent(server["start"]),
            server["pool"]["moved"],
        )

    def receive(server: PyTree, own: PyTree, shares: Float[Array, " P"]) -> tuple[PyTree, PyTree]:
        """Return what a client trains, and what stands beside it."""
        mixed = mix(server, shares)
        if keep_own:
            return own, mixed
        mine, rest = tree.partition(own, sent)
        return tree.combine(jax.tree.map(lambda x, m: (1 - shares.sum()) * x + m, mine, mixed), rest), {}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        shares = find_shares(server, personal)
        own, beside = receive(server, personal["own"], shares)
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(own, trained)
        own, optimizer, metrics = ctx.train(
            own,
            optimizer,
            client,
            trained=trained,
            assemble=lambda factors: assemble(factors, beside, server["scales"]),
        )
        moved = jax.tree.map(jnp.subtract, select_sent(own), select_sent(server["start"]))
        drift = personal_drift(own, personal.get("first", server["start"]))
        metrics |= {"update_norm": norm_of(moved), "personal_drift": drift}
        state = {**personal, "own": own, "sent": jnp.ones((), bool), "shares": shares, **setup.kept(optimizer)}
        took = client.mask.any()
        state = jax.tree.map(lambda new, old: jnp.where(took, new, old), state, personal)
        return state, moved, metrics

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        assert ctx.numbers is not None
        pool = renew(server["pool"], messages, ctx.numbers, weights, ctx.round)
        return {**server, "pool": pool}, {"shared_update_norm": norm_of(tree.weighted_sum(messages, weights))}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        own, beside = receive(server, personal["own"], find_shares(server, personal))
        return assemble(own, beside, server["scales"])

    def trained_adapter(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        mine = jax.tree.map(jnp.add, select_sent(server["start"]), message)
        own = tree.combine(mine, tree.partition(personal["own"], sent)[1])
        return assemble(own, mix(server, personal["shares"]) if keep_own else {}, server["scales"])

    def travels(server: PyTree, messages: PyTree) -> base.Travelling:
        del server
        moved = base.shape_of_one(messages)
        return moved, moved

    return Method(
        name=name, source=source, init=init, init_client=init_client, client_update=client_update, aggregate=aggregate,
        personalise=personalise, trained=trained_adapter, download=lambda server: {}, broadcast=broadcast, view=view,
        travels=travels, mixes=True,
        pairs=pairs, refuses=REFUSES | (_HALVED if keep_own else {}), moot=frozenset({"train.weighting"}),
    )  # fmt: skip
