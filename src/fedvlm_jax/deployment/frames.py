"""Packets on a stream of bytes: two lengths, the header's text, the payload.

Read and written by processes that live for one message: nothing heavy is imported.
"""

import socket
import struct
import time
from pathlib import Path

from fedvlm_jax.deployment.packets import MOST_HEADER, Packet
from fedvlm_jax.errors import UserError

LENGTHS = struct.Struct("!4sIQ")
"""A frame's beginning: its kind, bytes of the header, bytes of the payload."""

KIND = b"FVX1"
MOST_PAYLOAD = 2**32
"""Bytes that a payload may take: more is no frame of ours."""

CHUNK = 2**20
LONGEST_PATH = 103
"""Bytes of a UNIX socket's path: Linux has room for 107, macOS for 103."""


class HungUpError(OSError):
    """The other side of a stream has closed it before all was there."""


def check_path(path: Path) -> None:
    """Refuse a path that no UNIX socket can have.

    Raises:
        UserError: it is too long.

    >>> check_path(Path("/tmp/node/worker.sock"))
    """
    if (length := len(bytes(path))) > LONGEST_PATH:
        raise UserError(
            f"--socket {path}: a socket's path has at most {LONGEST_PATH} bytes, and this one has {length}; say a "
            "shorter one that is this user's alone, /run/user/UID/client-0.sock for example"
        )


def send_packet(stream: socket.socket, packet: Packet, deadline: float) -> None:
    """Write a packet.

    Args:
        deadline: of `time.monotonic()`.

    Raises:
        UserError: the packet is too large.
        TimeoutError: the other side did not take it in time.
        OSError: the other side is gone.
    """
    header = packet.header_text().encode()
    if len(header) > MOST_HEADER or len(packet.payload) > MOST_PAYLOAD:
        raise UserError(f"a packet of {len(header)} and {len(packet.payload)} bytes is larger than may be sent")
    start = LENGTHS.pack(KIND, len(header), len(packet.payload)) + header
    for part in (memoryview(start), memoryview(packet.payload)):
        for place in range(0, len(part), CHUNK):
            stream.settimeout(_time_left(deadline))
            stream.sendall(part[place : place + CHUNK])


def receive_packet(stream: socket.socket, deadline: float) -> Packet:
    """Read a packet; see `send_packet`.

    Raises:
        UserError: what came is no packet.
        TimeoutError: it did not come in time.
        HungUpError: the other side closed the stream before.
    """
    kind, header, payload = LENGTHS.unpack(_receive(stream, LENGTHS.size, deadline))
    if kind != KIND or header > MOST_HEADER or payload > MOST_PAYLOAD:
        raise UserError("what came through the socket is no packet: the other side is another program or version")
    try:
        text = _receive(stream, header, deadline).decode()
    except UnicodeDecodeError:
        raise UserError("a packet's header is no text: the other side is no fedvlm node or coordinator") from None
    return Packet.from_text(text, bytes(_receive(stream, payload, deadline)))


def _receive(stream: socket.socket, size: int, deadline: float) -> bytearray:
    """Read so many bytes; memory is taken as they come, and not for what the other side only says will come."""
    content = bytearray()
    while len(content) < size:
        stream.settimeout(_time_left(deadline))
        part = stream.recv(min(CHUNK, size - len(content)))
        if not part:
            raise HungUpError("the other side of the socket has hung up")
        content += part
    return content


def _time_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the other side of the socket took too long")
    return left
