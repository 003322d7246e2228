"""Rules that make one message of a round's and that a few hostile clients cannot move far.

    median       of every entry, arXiv 1803.01498
    trimmed      the mean of every entry without its f lowest and f highest values, arXiv 1803.01498
    krum         the message whose n - f - 2 nearest others are nearest to it, arXiv 1703.02757
    multi-krum   the mean of the n - f messages with the best of these scores
    geometric    the point with the smallest sum of distances to the messages, each times its client's weight, by
                 Weiszfeld's steps (RFA, arXiv 1912.13445)
    bound        the weighted mean of messages whose norm is cut down to a bound, arXiv 1911.07963

n clients count in the round, f of them may be hostile. The first four count clients alike, whatever their weights, for
a hostile client may say that it has many examples; the last two weigh them. None of them is random, none looks at the
message of a client of weight 0, and where Krum's scores are equal the client of the lower number comes first.

Krum needs n >= 2 f + 3 and the trimmed mean n > 2 f. Where drop-outs leave fewer clients the rule withstands as many
hostile ones as it can then: f is lowered until this holds, to 0 at the least, and the round says so as
`pool_withstands`. Below three clients Krum has no neighbours to choose by, and takes the first.

Every rule says of each client how much of its message went in, its `selection`, from 0 to 1: whether it was chosen
(Krum); the share of its entries that were (median, trimmed mean); its pull at the end relative to that of the nearest
client (geometric median); the share of its length that was left (bound).

Over devices the messages [K, D] are dealt out anew, so that each has all clients' values of some of the entries: one
all-to-all, one all-gather of the result, and for distances one all-reduce of K² numbers. `bound` is one all-reduce. The
clients' weights and numbers travel beside the entries, which saves gathering them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.distributed.sharding import constrain
from fedvlm_jax.messages.config import WITHSTANDS, MessageOptions
from fedvlm_jax.messages.pool import Pool, Pooled, count_entries, from_row, to_rows
from fedvlm_jax.methods.base import Context, Metrics, Weights

STEPS = 100
"""Weiszfeld's steps; each takes K² products."""
NEAR = 1e-4
"""Distances below this share of a typical one count as that: the point would never leave a message that it meets."""

Row = Float[Array, " entries"]
Selection = Float[Array, " cohort"]
Rule = Callable[["Dealt"], "Ruled"]


class Ruled(NamedTuple):
    """The results of a rule: the row, each client's selection, how many counted, and what is told beside it."""

    row: Row
    selection: Selection
    counted: Float[Array, ""]
    told: Metrics


class Dealt(NamedTuple):
    """A round's messages, each device's share of the entries beside the others'; what is missing is filled with zeros.

    Attributes:
        values: of every entry; of a client of weight 0 they may be anything.
        weights, numbers: of the clients, once for each device.
        entries: of a message.
    """

    values: Float[Array, "cohort devices share"]
    weights: Float[Array, "cohort devices"]
    numbers: Float[Array, "cohort devices"]
    entries: int

    @property
    def counted(self) -> Bool[Array, "cohort devices"]:
        """Whether a client counts."""
        return self.weights > 0

    def fill(self, value: float) -> Float[Array, "cohort devices share"]:
        """Return the values, with others in place of those of clients that do not count."""
        return jnp.where(self.counted[..., None], self.values, value)


def make_pool(options: MessageOptions) -> Pool | None:
    """Make the rule that the options name; None for the plain mean.

    >>> make_pool(MessageOptions(pool="krum")).name
    'krum'
    """
    if options.pool == "mean":
        return None
    if options.pool == "bound":
        return Pool("bound", partial(_bound, bound=options.bound))
    rules: dict[str, Rule] = {
        "median": partial(_trim, cut=None),
        "trimmed": partial(_trim, cut=options.hostile),
        "krum": partial(_krum, hostile=options.hostile, several=False),
        "multi-krum": partial(_krum, hostile=options.hostile, several=True),
        "geometric": _find_geometric_median,
    }
    return Pool(options.pool, partial(_run, rules[options.pool]))


def _run(rule: Rule, ctx: Context, state: PyTree, messages: PyTree, weights: Weights) -> Pooled:
    numbers = jnp.arange(len(weights)) if ctx.numbers is None else ctx.numbers
    ruled = rule(_deal(to_rows(messages), weights, numbers))
    told = {"selection": ruled.selection, **ruled.told}
    return Pooled(from_row(ruled.row, messages), state, told, ruled.counted > 0)


def _deal(rows: Float[Array, "cohort entries"], weights: Weights, numbers: Int[Array, " cohort"]) -> Dealt:
    """Give each device all clients' values of its share of the entries."""
    clients, entries = rows.shape
    devices = jax.sharding.get_abstract_mesh().shape.get(CLIENTS, 1)
    rows = jnp.pad(rows.astype(jnp.float32), ((0, 0), (0, -entries % devices))).reshape(clients, devices, -1)
    beside = jnp.stack([weights, numbers.astype(jnp.float32)], axis=-1)[:, None]
    beside = jnp.broadcast_to(beside, (clients, devices, 2))
    whole = constrain(jnp.concatenate([rows, beside], axis=-1), CLIENTS)  # or its two parts would move one by one
    dealt = constrain(whole, None, CLIENTS)
    return Dealt(dealt[..., :-2], dealt[..., -2], dealt[..., -1], entries)


def _gather(parts: Float[Array, "devices share"], entries: int) -> Row:
    """Lay the devices' shares of a row side by side, whole on every device."""
    return constrain(parts).reshape(-1)[:entries]


def _trim(dealt: Dealt, cut: int | None) -> Ruled:
    """Average the values of each entry without the `cut` lowest and highest; without all but the middle if None."""
    clients, devices, share = dealt.values.shape
    counted = dealt.counted.sum(axis=0)  # [devices], as all that follows, each having the same
    most = jnp.maximum((counted - 1) // 2, 0)
    withstands = most if cut is None else jnp.minimum(cut, most)
    ordered = jnp.sort(dealt.fill(jnp.inf), axis=0)
    place = jnp.arange(clients)[:, None]
    kept = (place >= withstands) & (place < counted - withstands)
    number = jnp.maximum(counted - 2 * withstands, 1)
    mean = jnp.where(kept[..., None], ordered, 0).sum(axis=0) / number[:, None]
    # Of equal values all are kept, so that it does not matter in which order the clients stand.
    low, high = (
        jnp.where((place == at)[..., None], ordered, 0).sum(axis=0) for at in (withstands, counted - 1 - withstands)
    )
    real = jnp.arange(devices * share).reshape(devices, share) < dealt.entries
    inside = (dealt.values >= low) & (dealt.values <= high) & dealt.counted[..., None] & real
    # What is told rides on the gather of the result.
    beside = jnp.concatenate([inside.sum(axis=-1).T, withstands[:, None], counted[:, None]], axis=-1)
    gathered = constrain(jnp.concatenate([mean, beside.astype(jnp.float32)], axis=-1))
    selection = gathered[:, share:-2].sum(axis=0) / max(dealt.entries, 1)
    told = {} if cut is None else {WITHSTANDS: gathered[0, -2]}
    return Ruled(gathered[:, :share].reshape(-1)[: dealt.entries], selection, gathered[0, -1], told)


def _reduce(per_device: Float[Array, "cohort devices numbers"], dealt: Dealt) -> tuple[Array, Weights, Array]:
    """Add up what the devices found [K, numbers]; beside it the clients' weights and numbers [K], on every device."""
    first = (jnp.arange(dealt.weights.shape[1]) == 0)[:, None]
    beside = jnp.where(first, jnp.stack([dealt.weights, dealt.numbers], axis=-1), 0)
    reduced = constrain(jnp.concatenate([per_device, beside], axis=-1).sum(axis=1))
    return reduced[:, :-2], reduced[:, -2], reduced[:, -1]


def _krum(dealt: Dealt, hostile: int, several: bool) -> Ruled:
    """Take the message, or the mean of several, whose nearest others are nearest."""
    values, clients = dealt.fill(0), len(dealt.values)
    # From differences, not from products: equal messages are at distance 0 exactly, and ties are ties.
    squares = jax.lax.map(lambda one: jnp.sum(jnp.square(values - one), axis=-1), values)  # [K, K, devices]
    distances, weights, numbers = _reduce(squares.swapaxes(1, 2), dealt)
    counts = weights > 0
    counted = counts.sum()
    withstands = jnp.clip((counted - 3) // 2, 0, hostile)
    others = counts[:, None] & counts & ~jnp.eye(clients, dtype=bool)
    near = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    neighbours = jnp.maximum(counted - withstands - 2, 1)
    score = jnp.where(jnp.arange(clients) < neighbours, near, 0).sum(axis=1)
    order = jnp.lexsort((numbers, score, ~counts))  # the last key decides first
    taken = (counted - withstands) if several else jnp.minimum(counted, 1)
    chosen = jnp.zeros(clients).at[order].set((jnp.arange(clients) < taken).astype(jnp.float32))
    row = _mix(chosen / jnp.maximum(taken, 1), values, dealt.entries)
    return Ruled(row, chosen, counted.astype(jnp.float32), {WITHSTANDS: withstands.astype(jnp.float32)})


def _mix(shares: Float[Array, " cohort"], values: Float[Array, "cohort devices share"], entries: int) -> Row:
    return _gather(jnp.einsum("k,knd->nd", shares, values, precision="highest"), entries)


def _find_geometric_median(dealt: Dealt) -> Ruled:
    """Walk from the weighted mean to the point with the smallest weighted sum of distances.

    All points on the way are means of the messages, so distances come from products of the messages. These are taken of
    differences to the median of every entry, which hostile clients cannot move far either, as rounding grows with them.
    """
    ordered = jnp.sort(dealt.fill(jnp.inf), axis=0)
    middle = jnp.maximum((dealt.counted.sum(axis=0) - 1) // 2, 0)
    centre = jnp.where((jnp.arange(len(ordered))[:, None] == middle)[..., None], ordered, 0).sum(axis=0)
    centre = jnp.where(jnp.isfinite(centre), centre, 0)  # infinite where nobody counts
    values = jnp.where(dealt.counted[..., None], dealt.values - centre, 0)
    products = jnp.einsum("knd,jnd->knj", values, values, precision="highest")
    gram, weights, _ = _reduce(products, dealt)
    lengths = jnp.diagonal(gram)
    near = (weights > 0) & jnp.isfinite(lengths)  # who is so far away has no pull
    gram = jnp.where(near[:, None] & near, gram, 0)
    lengths, weights = jnp.where(near, lengths, 0), jnp.where(near, weights, 0)
    typical = jnp.sqrt(jnp.nanmedian(jnp.where(near, lengths, jnp.nan)))
    smallest = jnp.maximum(NEAR * jnp.where(jnp.isfinite(typical), typical, 0), jnp.finfo(jnp.float32).tiny)

    def pull(shares: Float[Array, " cohort"]) -> Float[Array, " cohort"]:
        toward = jnp.dot(gram, shares, precision="highest")
        squared = lengths - 2 * toward + jnp.dot(shares, toward, precision="highest")
        return 1 / jnp.maximum(jnp.sqrt(jnp.maximum(squared, 0)), smallest)

    def step(_: Int[Array, ""], shares: Float[Array, " cohort"]) -> Float[Array, " cohort"]:
        pulled = weights * (pulls := pull(shares)) / jnp.max(jnp.where(near, pulls, 0), initial=1e-30)
        return pulled / jnp.maximum(pulled.sum(), 1e-30)

    shares = jax.lax.fori_loop(0, STEPS, step, weights / jnp.maximum(weights.sum(), 1e-30))
    pulls = jnp.where(near, pull(shares), 0)
    # A row that is left out may hold what is infinite by now, and zero times that is no number.
    kept = jnp.where(near[:, None, None], values, 0)
    row = jnp.einsum("k,knd->nd", shares, kept, precision="highest") + centre
    counted = (weights > 0).sum().astype(jnp.float32)
    return Ruled(_gather(row, dealt.entries), pulls / jnp.maximum(pulls.max(), 1e-30), counted, {})


def _bound(ctx: Context, state: PyTree, messages: PyTree, weights: Weights, bound: float) -> Pooled:
    """Average messages whose norm is cut down to a bound."""
    del ctx
    rows = to_rows(messages).astype(jnp.float32)
    rows = jnp.where(weights[:, None] > 0, rows, 0)
    norms = jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
    left = jnp.where(weights > 0, jnp.minimum(1, bound / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)), 0)
    # What is left of each client rides on the sum of the messages: a gather of its own would be a second message.
    beside = jnp.eye(len(weights)) * left[:, None] / jnp.where(weights > 0, weights, 1)[:, None]
    cut = jnp.concatenate([rows * left[:, None], beside], axis=1)
    summed = constrain(jnp.einsum("k,kn->n", weights, cut, precision="highest"))
    entries = count_entries(messages)
    return Pooled(from_row(summed[:entries], messages), state, {"selection": jnp.clip(summed[entries:], 0, 1)})
