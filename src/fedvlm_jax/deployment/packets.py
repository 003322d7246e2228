"""Packets between coordinator and nodes: a header that is JSON, and one flat vector of bytes.

This module imports nothing heavy: it is read by processes that live for one message.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from fedvlm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

MOST_HEADER = 2**24
"""Bytes that a header may take: more is no packet of ours."""


@dataclass(frozen=True)
class Packet:
    """An order of the coordinator, or a node's reply.

    >>> packet = Packet({"kind": "hello"}, b"12")
    >>> Packet.from_text(packet.header_text(), packet.payload) == packet
    True

    Attributes:
        header: plain values that JSON takes; `kind` says what is asked for.
        payload: the leaves of a tree, raw and one behind the other, by path (`vectors.py`); or nothing.
    """

    header: Mapping[str, Any]
    payload: bytes = field(default=b"", repr=False)

    def header_text(self) -> str:
        """Write the header as JSON."""
        return json.dumps(self.header)

    @staticmethod
    def from_text(header: str, payload: bytes) -> "Packet":
        """Read a packet of its header's text, which another machine wrote.

        Raises:
            UserError: the header is no JSON object, or too long.
        """
        try:
            content = json.loads(header) if len(header) <= MOST_HEADER else None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise UserError("a packet's header is no JSON object: the other side is no fedvlm node or coordinator")
        return Packet(content, payload)


@dataclass(frozen=True)
class Failure:
    """The lack of a reply: its reason, in one line, as the node or the network gave it."""

    reason: str


class Transport(Protocol):
    """Carry packets to nodes and back; nodes have numbers that the network gives them and that mean nothing else."""

    def list_nodes(self) -> list[int]:
        """List the nodes that are there now."""
        ...

    def ask(self, orders: Mapping[int, Packet], timeout: float) -> dict[int, Packet | Failure]:
        """Send an order to each of these nodes; return what came back within `timeout` seconds.

        A node that did not answer in time, or left, is missing in what comes back.
        """
        ...


class SecureSum(NamedTuple):
    """The sum of vectors of which nobody saw a single one."""

    vector: "np.ndarray"  # float32
    nodes: list[int]  # whose vectors are in it


@runtime_checkable
class SecureTransport(Transport, Protocol):
    """A transport whose nodes' payloads can be summed in secret."""

    def ask_sum(self, orders: Mapping[int, Packet], clip: float, timeout: float) -> SecureSum:
        """Have each of these nodes send what it would answer to its order, a float32 vector, into one secret sum.

        No entry may be larger than `clip`. Nodes that leave before they send are not in the sum.
        """
        ...
