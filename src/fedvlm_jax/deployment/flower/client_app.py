"""The ClientApp: hands an order of the coordinator to this machine's worker, and its reply back.

Flower starts a process for it with every message, which must be at work within 30 seconds (flwr 1.42,
`HEARTBEAT_DEFAULT_INTERVAL`): it imports neither jax nor a model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvlm_jax.deployment.flower.library import load_flower
from fedvlm_jax.deployment.flower.records import read_record, write_record
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.deployment.worker_client import ask_worker
from fedvlm_jax.errors import UserError

SOCKET = "socket"
"""The key of a SuperNode's `--node-config` under which it says where the worker listens."""

SUMMED = "message"
"""The kind of an order whose reply only a secure sum may take."""


def make_client_app() -> Any:
    """Make the ClientApp of a SuperNode.

    Raises:
        UserError: Flower is not installed.
    """
    app = load_flower("clientapp").ClientApp()

    @app.query()
    def hand_over(message: Any, context: Any) -> Any:
        reply = pass_on(message.content, context.node_config, message.metadata.ttl)
        return load_flower("app").Message(write_record(reply), reply_to=message)

    @app.train()
    def sum_secretly(message: Any, context: Any) -> Any:
        from fedvlm_jax.deployment.flower.secure_sum import answer_stage, read_vector

        def fetch(header: Mapping[str, Any]) -> Any:
            return read_vector(ask_worker(find_socket(context.node_config), Packet(header), message.metadata.ttl))

        return answer_stage(message, context, fetch)

    return app


def find_socket(node_config: Mapping[str, Any]) -> Path:
    """Find where the worker listens.

    Raises:
        UserError: the SuperNode does not say.

    >>> str(find_socket({"socket": "/node/worker.sock"}))
    '/node/worker.sock'
    """
    socket = node_config.get(SOCKET)
    if not isinstance(socket, str) or not socket:
        raise UserError(f"the SuperNode does not say where its worker is: --node-config '{SOCKET}=\"PATH\"'")
    return Path(socket)


def pass_on(content: Any, node_config: Mapping[str, Any], timeout: float) -> Packet:
    """Ask the worker; what goes wrong is the reply, so that the coordinator can say it.

    Args:
        content: of Flower's message.
        node_config: of the SuperNode.
        timeout: seconds after which nobody waits for the reply any more.
    """
    try:
        packet = read_record(content)
        if packet.header.get("kind") == SUMMED:
            raise UserError("a message is handed over into a secure sum alone, and not to whoever asks for it")
        return ask_worker(find_socket(node_config), packet, timeout)
    except UserError as error:
        return Packet({"error": " ".join(str(error).split())})
