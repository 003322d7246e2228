"""Ask the worker of this machine, from a process that lives for one message: nothing heavy is imported."""

import socket
import time
from pathlib import Path

from fedvlm_jax.deployment.frames import HungUpError, check_path, receive_packet, send_packet
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.errors import UserError, format_count


def ask_worker(path: Path, packet: Packet, timeout: float) -> Packet:
    """Give a worker an order and wait for its reply.

    Args:
        path: of the worker's socket.
        packet: the order.
        timeout: seconds until the reply must be there.

    Raises:
        UserError: there is no worker, it ended, did not answer in time, or is another program.
    """
    check_path(path)
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        try:
            stream.settimeout(timeout)
            stream.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise UserError(f"worker is not running: start `fedvlm node` with --socket {path} there") from None
        except OSError as error:
            raise UserError(f"worker cannot be reached at {path}: {error.strerror or error}") from None
        try:
            send_packet(stream, packet, deadline)
            return receive_packet(stream, deadline)
        except TimeoutError:
            raise UserError(
                f"worker did not answer within {format_count(round(timeout), 'second')}: allow more, or look there"
            ) from None
        except (HungUpError, BrokenPipeError, ConnectionResetError):
            raise UserError("worker ended while it had the order: start it again") from None
