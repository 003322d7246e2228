"""The coordinator's `Transport` over Flower's Grid."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedvlm_jax.deployment.flower.library import load_flower
from fedvlm_jax.deployment.flower.records import read_record, write_record
from fedvlm_jax.deployment.packets import Failure, Packet, SecureSum
from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.utils.untrusted_text import clean, cut

LONGEST_REASON = 300
PAUSES = (0.05, 1.0)
"""Seconds between two looks for replies, at first and at most. Flower's own `send_and_receive` waits 3 each time."""

GRACE = 300.0
"""Seconds that a message lives beyond its timeout: clocks of two machines may differ, and a node counts by its own."""

QUERY = "query"


class GridTransport:
    """Carry packets over a Grid: an order is a message, whose reply is its own.

    What Flower says of a message becomes a `Failure`, but for a node that left and a reply that came too late, which
    are missing in what comes back.
    """

    def __init__(self, grid: Any) -> None:
        """Take the `Grid` that Flower gives a ServerApp."""
        self._grid = grid
        codes = load_flower("common.constant").ErrorCode
        self._absent = (codes.NODE_UNAVAILABLE, codes.MESSAGE_UNAVAILABLE, codes.REPLY_MESSAGE_UNAVAILABLE)

    def list_nodes(self) -> list[int]:
        """List the SuperNodes that are connected now."""
        return sorted(self._grid.get_node_ids())

    def ask(self, orders: Mapping[int, Packet], timeout: float) -> dict[int, Packet | Failure]:
        """Send an order to each node; see `Transport`.

        Raises:
            UserError: an order is larger than Flower carries.
        """
        message = load_flower("app").Message
        numbers = list(orders)
        sent = self._grid.push_messages(
            [
                message(write_record(orders[number]), dst_node_id=number, message_type=QUERY, ttl=timeout + GRACE)
                for number in numbers
            ]
        )
        ids = list(sent)
        if numbers and not ids:  # which is how flwr tells that HTTP refused the size (413)
            raise UserError("an order is larger than Flower carries: choose a lower --lora.rank, or fewer targets")
        waiting = {name: number for name, number in zip(ids, numbers, strict=True) if name}  # None: the node left
        end, pause, replies = time.monotonic() + timeout, PAUSES[0], dict[int, Packet | Failure]()
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                number = waiting.pop(reply.metadata.reply_to_message_id, None)
                read = None if number is None else self._read(reply)
                if number is not None and read is not None:
                    replies[number] = read
            left = end - time.monotonic()
            if not waiting or left <= 0:
                break
            time.sleep(min(pause, left))
            pause = min(PAUSES[1], pause * 1.5)
        return replies

    def ask_sum(self, orders: Mapping[int, Packet], clip: float, timeout: float) -> SecureSum:
        """Have the nodes send what they would answer into one secret sum; see `SecureTransport`.

        Of fewer nodes than the sum's threshold there is none: it is of nobody.
        """
        from fedvlm_jax.deployment.flower.secure_sum import TooFewNodesError, ask_sum

        headers = {node: order.header for node, order in orders.items()}
        try:
            found = ask_sum(self._grid, headers, clip=clip, timeout=timeout)
        except TooFewNodesError:
            return SecureSum(np.zeros(0, np.float32), [])
        return SecureSum(found.vector, found.nodes)

    def _read(self, reply: Any) -> Packet | Failure | None:
        """Read a reply; None where the node left or it came too late."""
        if reply.has_error():
            absent = reply.error.code in self._absent
            return None if absent else _fail(f"Flower: {reply.error.reason}")
        try:
            packet = read_record(reply.content)
        except UserError as error:
            return _fail(explain_error(error))
        return _fail(str(packet.header["error"])) if "error" in packet.header else packet


def _fail(reason: str) -> Failure:
    return Failure(cut(clean(" ".join(reason.split())), LONGEST_REASON))
