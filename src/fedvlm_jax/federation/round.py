"""One round as one compiled program: waves of clients trained side by side on one base, then the aggregation.

The base is an unbatched argument: under `vmap` its matmuls run once over all clients' rows, and nobody copies it. A
cohort of K = W·V clients is laid out as [W, V]: a scan over W waves of V clients each, V along the mesh axis `clients`.
Position k of the cohort sits at wave k mod W, place k div W: so the messages [W, V, …] become [K, …] in the cohort's
order by joining two axes of which the outer one is the sharded one, which moves nothing between devices. What is left
for the network is one all-reduce in `aggregate`, and before it one flag per client, gathered: whoever's training gave
numbers that are not finite has no weight, and the others' weights add up to one again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.distributed.sharding import wave_sharding
from fedvlm_jax.federation.client_round import Frame, make_client_round, make_context
from fedvlm_jax.federation.local_training import LocalTrainer
from fedvlm_jax.methods import Client, Method
from fedvlm_jax.methods.base import AnyArray, Metrics, Number
from fedvlm_jax.utils import tree


class RoundArguments(NamedTuple):
    """The arguments of a compiled round, arrays on the devices or their shapes, in the function's order."""

    params: PyTree  # the frozen base, as the method has it in this round
    server: PyTree
    personal: PyTree  # states [W, V, …]; donated. Those of newcomers are ignored: they begin with `init_client`
    clients: Client  # leaves [W, V, …]
    weights: Float[AnyArray, " cohort"]  # p_k in the cohort's order; Σ p_k = 1, or all 0
    rates: dict[str, Float[Array, ""]]  # learning rates of `a` and `b`
    round: Number
    key: PRNGKeyArray  # the run's; a client's is folded from it, the round and the client's number
    tables: PyTree = None  # see `Frame`; the same for all clients


def make_arguments(
    *,
    params: PyTree,
    server: PyTree,
    personal: PyTree,
    clients: Client,
    weights: Float[AnyArray, " cohort"],
    key: PRNGKeyArray,
    rates: Mapping[str, float] | None = None,
    round_: int = 1,
    tables: PyTree = None,
) -> RoundArguments:
    """Make the arguments of a compiled round, of arrays or of shapes alike.

    Without `rates` these are zero: so nothing is trained, and the program is the same.
    """
    rates = {"a": 0.0, "b": 0.0} if rates is None else rates
    scalars = {name: jnp.float32(rate) for name, rate in rates.items()}
    return RoundArguments(params, server, personal, clients, weights, scalars, jnp.int32(round_), key, tables)


class RoundOutput(NamedTuple):
    """The results of a round.

    A client whose numbers are not finite sends zeros, and its personal state is the one that it came with.
    """

    server: PyTree
    personal: PyTree  # the cohort's new states [W, V, …]
    messages: PyTree  # [K, …], in the cohort's order
    metrics: Metrics  # of the clients' training [K]
    health: Metrics  # of the aggregation, scalars
    weights: Float[Array, " cohort"]  # p_k as they counted
    finite: Bool[Array, ""]  # whether the new server state is


def to_waves(tree: PyTree, waves: int) -> PyTree:
    """Lay arrays [K, …] out as [W, V, …], K = W·V; position k goes to wave k mod W, place k div W.

    >>> import numpy as np
    >>> to_waves(np.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    return jax.tree.map(lambda x: x.reshape(-1, waves, *x.shape[1:]).swapaxes(0, 1), tree)


def from_waves(tree: PyTree) -> PyTree:
    """Undo `to_waves`: [W, V, …] to [K, …].

    >>> from_waves(jnp.asarray([[0, 2, 4], [1, 3, 5]])).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _leave_out(weights: Float[Array, " cohort"], finite: Bool[Array, " cohort"]) -> Float[Array, " cohort"]:
    """Return the weights of those whose numbers are finite, with the sum that all had; untouched where all are.

    >>> _leave_out(jnp.asarray([0.5, 0.25, 0.25]), jnp.asarray([False, True, True])).tolist()
    [0.0, 0.5, 0.5]
    """
    left = jnp.where(finite, weights, 0)
    renewed = left / jnp.maximum(left.sum(), jnp.finfo(left.dtype).tiny)
    return jnp.where(jnp.all(left == weights), weights, renewed)


def make_round(method: Method, trainer: LocalTrainer, mesh: Mesh) -> jax.stages.Wrapped:
    """Make the jitted round: `run(*arguments, phase=0)` of `RoundArguments`; a program for each phase.

    `personal` is donated. The server's state comes back exactly as it goes in, so the next round finds its program.
    """
    across, everywhere = NamedSharding(mesh, PartitionSpec(CLIENTS)), NamedSharding(mesh, PartitionSpec())
    client_round = make_client_round(method, trainer)

    def run(
        params: PyTree,
        server: PyTree,
        personal: PyTree,
        clients: Client,
        weights: Float[Array, " cohort"],
        rates: dict[str, Float[Array, ""]],
        round: Number,
        key: PRNGKeyArray,
        tables: PyTree = None,
        phase: int = 0,
    ) -> RoundOutput:
        frame = Frame(params, server, rates, round, key, tables)
        ctx = make_context(trainer, frame, phase)
        wave = jax.vmap(lambda personal, client: client_round(frame, personal, client, phase), spmd_axis_name=CLIENTS)

        def run_wave(_: None, inputs: Any) -> Any:
            return None, wave(*inputs)

        _, (personal, messages, metrics, finite) = jax.lax.scan(run_wave, None, (personal, clients))
        personal, messages, metrics = jax.lax.with_sharding_constraint(
            (personal, messages, metrics), wave_sharding(mesh)
        )
        messages, metrics = jax.lax.with_sharding_constraint((from_waves(messages), from_waves(metrics)), across)
        # Every device knows all flags and computes all weights: to share that out would take four more messages.
        weights, finite = jax.lax.with_sharding_constraint((weights, from_waves(finite)), everywhere)
        weights = jax.lax.with_sharding_constraint(_leave_out(weights, finite), everywhere)
        # The mesh is given for pools, which lay messages out anew.
        with jax.named_scope("aggregate"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # Laid out as the messages are, or the partitioner may gather the messages to meet the weights.
            spread = jax.lax.with_sharding_constraint(weights, across)
            numbers = jax.lax.with_sharding_constraint(from_waves(clients.number), across)
            ctx = ctx._replace(numbers=numbers)
            server, health = method.aggregate(ctx, server=server, messages=messages, weights=spread)
        return RoundOutput(server, personal, messages, metrics, health, weights, tree.is_finite(server))

    outputs = RoundOutput(everywhere, wave_sharding(mesh), across, across, *[everywhere] * 3)  # type: ignore[arg-type]
    return jax.jit(run, donate_argnames="personal", static_argnames="phase", out_shardings=outputs)
