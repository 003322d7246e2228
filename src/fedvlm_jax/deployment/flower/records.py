"""Packets as the content of Flower's messages: one array of bytes, and the header's text beside it.

An array for each leaf would cost an HTTP request and some hundred bytes each. The same bytes for several nodes are
uploaded once: flwr names objects by their content.
"""

from typing import Any

from fedvlm_jax.deployment.flower.library import load_flower
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.errors import UserError

PACKET, HEADER, PAYLOAD = "packet", "header", "payload"
RAW = "raw"
"""A name for how the array is stored: not as numpy would, whose files have a header of 128 bytes."""


def write_record(packet: Packet) -> Any:
    """Make the `RecordDict` that holds a packet."""
    flower = load_flower("app")
    content = flower.RecordDict({PACKET: flower.ConfigRecord({HEADER: packet.header_text()})})
    if packet.payload:
        size = len(packet.payload)
        array = flower.Array(dtype="uint8", shape=(size,), stype=RAW, data=packet.payload)
        content[PAYLOAD] = flower.ArrayRecord({PAYLOAD: array})
    return content


def read_record(content: Any) -> Packet:
    """Read the packet of a `RecordDict` that another machine wrote.

    Raises:
        UserError: it holds none.
    """
    try:
        header = content[PACKET][HEADER]
        array = content[PAYLOAD][PAYLOAD] if PAYLOAD in content else None
        payload = b"" if array is None else array.data
        if isinstance(header, str) and isinstance(payload, bytes) and (array is None or array.stype == RAW):
            return Packet.from_text(header, payload)
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError("a message of Flower's holds no packet: the other side is another app, or of another version")
