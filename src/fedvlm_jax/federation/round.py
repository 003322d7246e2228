"""One round as one compiled program: waves of clients trained side by side on one base, then the aggregation.

The base is an unbatched argument: under `vmap` its matmuls run once over all clients' rows, and nobody copies it. A
cohort of K = W·V clients is laid out as [W, V]: a scan over W waves of V clients each, V along the mesh axis `clients`.
Position k of the cohort sits at wave k mod W, place k div W: so the messages [W, V, …] become [K, …] in the cohort's
order by joining two axes of which the outer one is the sharded one, which moves nothing between devices. What is left
for the network is one all-reduce in `aggregate`, and before it one flag per client, gathered: whoever's training gave
numbers that are not finite has no weight, and the others' weights add up to one again.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax.distributed.sharding import CLIENTS, wave_sharding
from fedvlm_jax.federation.local_training import LocalTrainer
from fedvlm_jax.methods import Client, Context, Method
from fedvlm_jax.methods.base import Metrics, Train
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.random_streams import Stream

__all__ = ["RoundOutput", "from_waves", "make_round", "start_personal", "to_waves"]


class RoundOutput(NamedTuple):
    """What a round returns.

    Attributes:
        server: the new server state.
        personal: the cohort's new personal states [W, V, …].
        messages: what the clients sent [K, …], in the cohort's order; zeros of those with numbers that are not finite,
            whose personal state is the one that they came with.
        metrics: of the clients' training [K].
        health: of the aggregation, scalars.
        weights: [K], p_k as they counted.
        finite: is the new server state?
    """

    server: PyTree
    personal: PyTree
    messages: PyTree
    metrics: Metrics
    health: Metrics
    weights: Float[Array, " cohort"]
    finite: Bool[Array, ""]


def to_waves(tree: PyTree, waves: int) -> PyTree:
    """Lay arrays [K, …] out as [W, V, …], K = W·V; position k goes to wave k mod W, place k div W."""
    return jax.tree.map(lambda x: x.reshape(-1, waves, *x.shape[1:]).swapaxes(0, 1), tree)


def from_waves(tree: PyTree) -> PyTree:
    """Undo `to_waves`: [W, V, …] to [K, …]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def start_personal(method: Method, key: PRNGKeyArray, server: PyTree, number: Int[Array, ""]) -> PyTree:
    """The state that client `number` begins with; `key` is the run's, the same in every round."""
    return method.init_client(jax.random.fold_in(jax.random.fold_in(key, Stream.NEWCOMERS), number), server, number)


def _choose(first: Bool[Array, ""], one: PyTree, other: PyTree) -> PyTree:
    """One tree or the other, leaf by leaf; what is not chosen leaves no trace, as a product with zero would."""
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)


def _leave_out(weights: Float[Array, " cohort"], finite: Bool[Array, " cohort"]) -> Float[Array, " cohort"]:
    """The weights of those whose numbers are finite, adding up to what they did before; untouched where all are."""
    left = jnp.where(finite, weights, 0)
    renewed = left / jnp.maximum(left.sum(), jnp.finfo(left.dtype).tiny)
    return jnp.where(jnp.all(left == weights), weights, renewed)


def make_round(method: Method, trainer: LocalTrainer, mesh: Mesh) -> Callable[..., RoundOutput]:
    """Compile-once round: `run(params, server, personal, clients, weights, rates, round, key, *, phase=0)`.

    Args of the result:
        params: the frozen base, as the method has it in this round.
        server: the server's state.
        personal: personal states [W, V, …]; donated. What newcomers bring is ignored: they begin with `init_client`.
        clients: a `Client` of arrays [W, V, …].
        weights: [K], p_k in the cohort's order; Σ p_k = 1, or all 0.
        rates: learning rates.
        round: the round's number.
        key: the run's key; a client's own is folded from it, the round and the client's number.
        phase: of the round; static, a program each.
    """
    across, everywhere = NamedSharding(mesh, PartitionSpec(CLIENTS)), NamedSharding(mesh, PartitionSpec())

    def run(
        params: PyTree,
        server: PyTree,
        personal: PyTree,
        clients: Client,
        weights: Float[Array, " cohort"],
        rates: dict[str, Float[Array, ""]],
        round: Int[Array, ""],
        key: PRNGKeyArray,
        phase: int = 0,
    ) -> RoundOutput:
        def train(factors: Any, optimizer: Any, client: Client, **choices: Any) -> Any:
            return trainer.run(params, factors, optimizer, client, rates, **choices)

        def train_with(key: PRNGKeyArray) -> Train:
            """Local training of one client in this round; each that its method asks for draws from a key of its own."""
            asked = itertools.count()
            return lambda *arguments, **choices: train(*arguments, **choices, key=jax.random.fold_in(key, next(asked)))

        ctx = Context(params, round, phase, rates, train)

        def update(personal: PyTree, client: Client) -> Any:
            with jax.named_scope("start_clients"):
                fresh = start_personal(method, key, server, client.number)
                personal = _choose(client.new, fresh, personal)
            own_key = jax.random.fold_in(
                jax.random.fold_in(jax.random.fold_in(key, Stream.UPDATES), round), client.number
            )
            own = ctx
            if trainer.draws:
                drops = jax.random.fold_in(jax.random.fold_in(key, Stream.DROPOUT), round)
                own = ctx._replace(train=train_with(jax.random.fold_in(drops, client.number)))
            new, message, metrics = method.client_update(own, server, personal, client, own_key)
            with jax.named_scope("look_for_numbers_that_are_not_finite"):
                finite = tree.is_finite((new, message, metrics["loss"]))
                new, message = _choose(finite, (new, message), (personal, jax.tree.map(jnp.zeros_like, message)))
            return new, message, metrics, finite

        wave = jax.vmap(update, spmd_axis_name=CLIENTS)

        def one_wave(_: None, inputs: Any) -> Any:
            return None, wave(*inputs)

        _, (personal, messages, metrics, finite) = jax.lax.scan(one_wave, None, (personal, clients))
        personal, messages, metrics = jax.lax.with_sharding_constraint(
            (personal, messages, metrics), wave_sharding(mesh)
        )
        messages, metrics = jax.lax.with_sharding_constraint((from_waves(messages), from_waves(metrics)), across)
        # Every device knows all flags and reckons all weights itself: to share that out would take four more messages.
        weights, finite = jax.lax.with_sharding_constraint((weights, from_waves(finite)), everywhere)
        weights = jax.lax.with_sharding_constraint(_leave_out(weights, finite), everywhere)
        with jax.named_scope("aggregate"):
            # Laid out as the messages are, or the partitioner may gather the messages to meet the weights.
            spread = jax.lax.with_sharding_constraint(weights, across)
            server, health = method.aggregate(ctx, server, messages, spread)
        return RoundOutput(server, personal, messages, metrics, health, weights, tree.is_finite(server))

    # Told, not inferred: the server's state comes back exactly as it goes in, so the next round finds its program.
    outputs = RoundOutput(everywhere, wave_sharding(mesh), across, across, *[everywhere] * 3)  # type: ignore[arg-type]
    return jax.jit(run, donate_argnames="personal", static_argnames="phase", out_shardings=outputs)
