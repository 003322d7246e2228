"""The sum of the nodes' messages, of which the server sees none: SecAgg+ (ePrint 2020/704), Flower's own.

Training and the sum are apart: a node trains, keeps its message and says in its header how large it is; then `ask_sum`
asks for the sum in four stages (keys, shares of keys, masked vectors, shares to unmask), which `answer_stage` answers.
Masks, keys and shares are those of flwr 1.42: `secaggplus_mod` at a node, the stages of `SecAggPlusWorkflow` at the
server, which know Flower's legacy records and strategies alone.

Deviations from `SecAggPlusWorkflow`: nodes multiply by their weights themselves, so that all have the same for flwr; a
node that leaves before it has shared its keys is left out, where flwr gives the round up after the masked vectors were
sent; entries above the range are refused, where flwr cuts them; a node refuses orders that would show it alone, which
flwr obeys.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedvlm_jax.deployment.flower.library import load_flower
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.utils.untrusted_text import clean, cut

STAGE_RECORD, STATE_RECORD = "secaggplus_configs", "secaggplus_state"
"""Flower's names: of the record of a stage's message, and of what a node's context keeps between stages."""

STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
HEADER = "fedvlm_header"
"""The key in the orders' configuration under which a node's header travels."""

LEVELS = 2**30
"""To how many an entry is rounded within its range: the most that flwr's rounding, by way of int32, leaves whole."""

MODULUS = 2**62
"""What sums are taken modulo: no sum of levels comes near. flwr's description asks for less than 2³², which would leave
fewer levels the more nodes there are; its code draws, adds and sends int64, of whose 2⁶⁴ this is a divisor."""

LEAST_NODES = 3
PAUSES = (0.05, 1.0)
"""Seconds between two looks for replies, at first and at most. Flower's own `send_and_receive` waits 3 each time."""

GRACE = 300.0
"""Seconds that a message lives beyond its timeout, since clocks differ; then no node obeys it any more."""

LONGEST_REASON = 300
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors that flwr's code raises where a message of another machine is not as it should be."""

Fetch = Callable[[Mapping[str, Any]], np.ndarray]
"""(header of `ask_sum`) -> what the node sends into the sum: a flat vector, weighted. May raise `UserError`."""


class TooFewNodesError(UserError):
    """Fewer nodes are there, or are left, than a secure sum needs."""


@dataclass(frozen=True)
class SecretSum:
    """The sum of those nodes' vectors that counted.

    Attributes:
        vector: [entries], float32.
        nodes: whose vectors are in it, in rising order.
        lost: the others -> why, in a line.
        bytes_up: that the node which sent most has sent, keys and shares included.
        messages: that a node has answered to be in it.
        seconds: that it took.
    """

    vector: np.ndarray
    nodes: list[int]
    lost: Mapping[int, str]
    bytes_up: int
    messages: int
    seconds: float


def ask_sum(
    grid: Any, headers: Mapping[int, Mapping[str, Any]], *, clip: float, timeout: float, threshold: float = 2 / 3
) -> SecretSum:
    """Ask nodes for the sum of their vectors, so that none can be read by itself; inside the `main` of a ServerApp.

    Args:
        grid: Flower's.
        headers: by node, of three or more: plain values that JSON takes, for its `Fetch`.
        clip: no entry is further from 0: a node that has one does not send. 1.25 times the largest is a good value.
        timeout: seconds that each of the four stages waits for replies.
        threshold: how many nodes must be left at the end, and must collude with the server to see a vector: a whole
            number is a count, a fraction below 1 a share of the nodes, rounded up. More than half of them.

    Raises:
        TooFewNodesError: too few nodes are there, or left for the threshold.
        UserError: an argument is out of range, or the replies make no sum.
    """
    start, count = time.monotonic(), len(headers)
    needed = count_needed(count, threshold)
    if not 0 <= clip < math.inf or not 0 < timeout < math.inf:
        raise UserError(f"secure sum: entries of at most {clip} within {timeout} seconds cannot be")
    workflow = load_flower("server.workflow").SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=needed,
        max_weight=1.0,
        clipping_range=float(clip or 1),  # where all entries are 0 any range does
        quantization_range=LEVELS,
        modulus_range=MODULUS,
        timeout=timeout,
    )
    state = load_flower("server.workflow.secure_aggregation.secaggplus_workflow").WorkflowState()
    strategy, watched = _Strategy(headers), _WatchedGrid(grid)
    context = _make_context(strategy)
    for number, stage in enumerate(STAGES, 1):
        try:
            enough = getattr(workflow, f"{stage}_stage")(watched, context, state)
            if stage in STAGES[:2]:
                _forget_lost(state)
        except UserError:
            raise
        except MALFORMED as error:
            raise UserError(f"secure sum: the replies of stage {number} of 4 fit no sum: {_say(error)}") from error
        if not enough:
            raise TooFewNodesError(_explain_lack(count, state.active_node_ids, needed, number, watched.lost))
    vector = strategy.read_sum()
    if not np.isfinite(vector).all():
        raise UserError("secure sum: it is not finite")
    return SecretSum(
        vector=vector,
        nodes=sorted(strategy.counted),
        lost={node: reason for node, reason in watched.lost.items() if node not in strategy.counted},
        bytes_up=max(watched.bytes_up.values()),
        messages=len(STAGES),
        seconds=time.monotonic() - start,
    )


def is_stage(message: Any) -> bool:
    """Return whether a message of type `train` is one of the four stages, for `answer_stage`."""
    return STAGE_RECORD in message.content.config_records


def answer_stage(message: Any, context: Any, fetch: Fetch) -> Any:
    """Answer one of the four stages at a node: -> Flower's reply, an `Error` with the reason where it is refused.

    Keys and shares lie in `context.state`, which Flower carries from one message of a node to the next, until the last
    stage is answered.

    Args:
        message: Flower's, for which `is_stage` holds.
        context: Flower's.
        fetch: is called in the third stage alone.
    """
    flower = load_flower("app")
    try:
        configs = message.content.config_records[STAGE_RECORD]
        stage = configs.get("stage")
        refuse_exposure(stage, configs)

        def send_kept(order: Any, _: Any) -> Any:
            return flower.Message(_write_kept(order.content, context.state, fetch), reply_to=order)

        reply = load_flower("client.mod").secaggplus_mod(message, context, send_kept)
    except MALFORMED as error:
        code = load_flower("common.constant").ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return flower.Message(flower.Error(code, _say(error)), reply_to=message)
    if stage == "unmask":
        del context.state[STATE_RECORD]
    return reply


def read_vector(packet: Packet) -> np.ndarray:
    """Read what a worker answered to its header, for a `Fetch`.

    >>> read_vector(Packet({}, np.float32([1, 2]).tobytes()))
    array([1., 2.], dtype=float32)

    Raises:
        UserError: it answered with an error, or with no vector.
    """
    if "error" in packet.header:
        raise UserError(str(packet.header["error"]))
    if len(packet.payload) % 4:
        raise UserError(f"secure sum: {len(packet.payload)} bytes are no vector of float32")
    return np.frombuffer(packet.payload, np.float32)


def count_needed(nodes: int, threshold: float) -> int:
    """Return how many of the nodes must be left, see `ask_sum`.

    >>> [count_needed(nodes, 2 / 3) for nodes in (3, 4, 16)], count_needed(5, 3)
    ([2, 3, 11], 3)

    Raises:
        TooFewNodesError: there are fewer than three nodes.
        UserError: the threshold is not more than half of them, or above them.
    """
    if nodes < LEAST_NODES:
        raise TooFewNodesError(
            f"secure sum of {nodes} nodes: at least {LEAST_NODES} are needed, for each of two knows the other's "
            "message from the sum"
        )
    needed = math.ceil(threshold * nodes - 1e-9) if 0 < threshold < 1 else threshold
    if not nodes / 2 < needed <= nodes or needed != int(needed):
        raise UserError(
            f"secure sum of {nodes} nodes: a threshold of {threshold} is not between {nodes // 2 + 1} and {nodes}, "
            "nor a share of them that comes to as much"
        )
    return int(needed)


def refuse_exposure(stage: Any, configs: Mapping[str, Any]) -> None:
    """Refuse orders by which a server could see this node's message alone.

    With shares from at most half of the nodes, or with both shares of a node, one learns both of its masks.

    Args:
        stage: Flower's name of it.
        configs: the stage's record.

    Raises:
        UserError: it is such an order.
    """
    if stage == "setup":
        count_needed(configs["sample_num"], configs["threshold"])
        if configs["share_num"] != configs["sample_num"]:
            raise UserError(f"secure sum: {configs['share_num']} shares for {configs['sample_num']} nodes")
    if stage == "unmask" and set(configs["active_nids"]) & set(configs["dead_nids"]):
        raise UserError("secure sum: the server asks for both shares of a node, with which it could read its message")


def _write_kept(content: Any, state: Any, fetch: Fetch) -> Any:
    """Write the node's vector as a legacy result, of which the mod takes it before anything is sent."""
    legacy, compat = load_flower("common"), load_flower("compat.common.recorddict_compat")
    header = json.loads(compat.recorddict_to_fitins(content, keep_input=True).config[HEADER])
    vector, clip = fetch(header), state[STATE_RECORD]["clipping_range"]
    largest = float(np.abs(vector).max(initial=0))
    if vector.ndim != 1 or not largest <= clip:
        raise UserError(f"secure sum: an entry of {largest:g} is beyond {clip:g}, which the server allows: not sent")
    # float64: in float32 the mod would round to 24 bits before it rounds to its levels.
    parameters = legacy.ndarrays_to_parameters([vector.astype(np.float64)])
    result = legacy.FitRes(legacy.Status(legacy.Code.OK, ""), parameters, 1, {})
    return compat.fitres_to_recorddict(result, keep_input=False)


class _Strategy:
    """The two functions that the stages call of a legacy strategy: whom to ask, and what came of it."""

    def __init__(self, headers: Mapping[int, Mapping[str, Any]]) -> None:
        legacy = load_flower("common")
        self._orders = [
            (
                SimpleNamespace(node_id=node),
                legacy.FitIns(legacy.Parameters([], ""), {HEADER: json.dumps(dict(header))}),
            )
            for node, header in headers.items()
        ]
        self._mean: Any = None
        self.counted: list[int] = []

    def configure_fit(self, *_: Any) -> list[tuple[Any, Any]]:
        return self._orders

    def aggregate_fit(self, _: int, results: Sequence[tuple[Any, Any]], failures: Any) -> tuple[None, dict[str, Any]]:
        del failures
        self.counted = [proxy.node_id for proxy, _ in results]
        self._mean = results[0][1].parameters
        return None, {}

    def read_sum(self) -> np.ndarray:
        (mean,) = load_flower("common").parameters_to_ndarrays(self._mean)
        return (mean * len(self.counted)).astype(np.float32)


def _make_context(strategy: _Strategy) -> Any:
    """Make the legacy context of one sum: its round's number only groups messages in Flower's log."""
    flower = load_flower("app")
    state = flower.RecordDict({"config": flower.ConfigRecord({"current_round": 0}), "parameters": flower.ArrayRecord()})
    context = flower.Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
    return load_flower("server").LegacyContext(context, strategy=strategy)


class _WatchedGrid:
    """Send a stage's messages and wait for the replies; note bytes, and why nodes do not answer."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self.lost: dict[int, str] = {}
        self.bytes_up: dict[int, int] = {}

    def send_and_receive(self, messages: Sequence[Any], *, timeout: float) -> list[Any]:
        for message in messages:
            message.metadata.ttl = timeout + GRACE
        nodes = [message.metadata.dst_node_id for message in messages]
        names = list(self._grid.push_messages(messages))
        if not names:  # which is how flwr tells that HTTP refused the size (413)
            raise UserError("secure sum: the messages are larger than Flower carries")
        waiting = {name: node for name, node in zip(names, nodes, strict=True) if name}
        self.lost |= {node: "it left" for name, node in zip(names, nodes, strict=True) if not name}
        replies, end, pause = [], time.monotonic() + timeout, PAUSES[0]
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None and self._note(node, reply):
                    replies.append(reply)
            left = end - time.monotonic()
            if not waiting or left <= 0:
                break
            time.sleep(min(pause, left))
            pause = min(PAUSES[1], pause * 1.5)
        self.lost |= dict.fromkeys(waiting.values(), f"no reply within {timeout:g} s")
        return replies

    def _note(self, node: int, reply: Any) -> bool:
        """Note a reply; returns whether it is one that the workflow can use."""
        if reply.has_error():
            self.lost[node] = _shorten(str(reply.error.reason))
            return False
        sent = sum(_count_bytes(list(record.values())) for record in reply.content.values())
        self.bytes_up[node] = self.bytes_up.get(node, 0) + sent
        return reply.metadata.src_node_id == node


def _count_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(_count_bytes(item) for item in value)
    return len(value) if isinstance(value, bytes | str) else 8


def _forget_lost(state: Any) -> None:
    """Leave out nodes that left before their vector could be masked with anybody's: flwr would ask for their shares."""
    active = state.active_node_ids
    state.sampled_node_ids = set(active)
    state.nid_to_neighbours = {node: near & active for node, near in state.nid_to_neighbours.items() if node in active}


def _explain_lack(asked: int, active: Iterable[int], needed: int, stage: int, lost: Mapping[int, str]) -> str:
    reasons = "; ".join(f"node {node}: {reason}" for node, reason in list(lost.items())[:3])
    left = len(set(active))
    return (
        f"secure sum: {left} of {asked} nodes {'is' if left == 1 else 'are'} left after stage {stage} of 4, "
        f"{needed} are needed ({reasons})"
    )


def _say(error: BaseException) -> str:
    return _shorten(explain_error(error))


def _shorten(reason: str) -> str:
    return cut(clean(" ".join(reason.split())), LONGEST_REASON)
