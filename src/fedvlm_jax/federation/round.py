"""One round as one compiled program: waves of clients trained side by side on one base, then the aggregation.

The base is an unbatched argument: under `vmap` its matmuls run once over all clients' rows, and nobody copies it. A
cohort of K = W·V clients is laid out as [W, V]: a scan over W waves of V clients each, V along the mesh axis `clients`.
Position k of the cohort sits at wave k mod W, place k div W: so the messages [W, V, …] become [K, …] in the cohort's
order by joining two axes of which the outer one is the sharded one, which moves nothing between devices. What is left
for the network is one all-reduce in `aggregate`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from fedvlm_jax.federation.training import LocalTrainer
from fedvlm_jax.methods import Client, Context, Method
from fedvlm_jax.methods.record import Metrics
from fedvlm_jax.sharding import CLIENTS, wave_sharding
from fedvlm_jax.streams import Stream

__all__ = ["RoundOutput", "from_waves", "make_round", "start_personal", "to_waves"]


class RoundOutput(NamedTuple):
    """What a round returns.

    Attributes:
        server: the new server state.
        personal: the cohort's new personal states [W, V, …].
        messages: what the clients sent [K, …], in the cohort's order.
        metrics: of the clients' training [K].
        health: of the aggregation, scalars.
    """

    server: PyTree
    personal: PyTree
    messages: PyTree
    metrics: Metrics
    health: Metrics


def to_waves(tree: PyTree, waves: int) -> PyTree:
    """Lay arrays [K, …] out as [W, V, …], K = W·V; position k goes to wave k mod W, place k div W."""
    return jax.tree.map(lambda x: x.reshape(-1, waves, *x.shape[1:]).swapaxes(0, 1), tree)


def from_waves(tree: PyTree) -> PyTree:
    """Undo `to_waves`: [W, V, …] to [K, …]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def start_personal(method: Method, key: PRNGKeyArray, server: PyTree, number: Int[Array, ""]) -> PyTree:
    """The state that client `number` begins with; `key` is the run's, the same in every round."""
    return method.init_client(jax.random.fold_in(jax.random.fold_in(key, Stream.NEWCOMERS), number), server, number)


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
    across = NamedSharding(mesh, PartitionSpec(CLIENTS))

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

        ctx = Context(params, round, phase, rates, train)

        def update(personal: PyTree, client: Client) -> Any:
            with jax.named_scope("start_clients"):
                fresh = start_personal(method, key, server, client.number)
                personal = jax.tree.map(lambda new, old: jnp.where(client.new, new, old), fresh, personal)
            own_key = jax.random.fold_in(
                jax.random.fold_in(jax.random.fold_in(key, Stream.UPDATES), round), client.number
            )
            return method.client_update(ctx, server, personal, client, own_key)

        wave = jax.vmap(update, spmd_axis_name=CLIENTS)

        def one_wave(_: None, inputs: Any) -> Any:
            return None, wave(*inputs)

        _, (personal, messages, metrics) = jax.lax.scan(one_wave, None, (personal, clients))
        personal, messages, metrics = jax.lax.with_sharding_constraint(
            (personal, messages, metrics), wave_sharding(mesh)
        )
        messages, metrics = jax.lax.with_sharding_constraint((from_waves(messages), from_waves(metrics)), across)
        if method.deliver is not None and method.receive is not None:
            with jax.named_scope("deliver"):
                downloads = method.deliver(ctx, server, messages, weights)
                received = jax.vmap(method.receive)(from_waves(personal), downloads)
            here = lambda new, old: jnp.where(weights.reshape(-1, *[1] * (new.ndim - 1)) > 0, new, old)  # noqa: E731
            received = jax.tree.map(here, received, from_waves(personal))  # who dropped out is not there any more
            personal = jax.lax.with_sharding_constraint(
                to_waves(received, clients.weight.shape[0]), wave_sharding(mesh)
            )
        with jax.named_scope("aggregate"):
            server, health = method.aggregate(ctx, server, messages, weights)
        return RoundOutput(server, personal, messages, metrics, health)

    # Told, not inferred: the server's state comes back exactly as it goes in, so the next round finds its program.
    everywhere = NamedSharding(mesh, PartitionSpec())
    outputs = RoundOutput(everywhere, wave_sharding(mesh), across, across, everywhere)  # type: ignore[arg-type]
    return jax.jit(run, donate_argnames="personal", static_argnames="phase", out_shardings=outputs)
