"""Bytes and seconds of an order and its reply over Flower, beside the payload: needs the extra `flower`, and no model.

    python benchmarks/flower_wire.py

One SuperNode with a worker that sends back what it gets; a relay between it and the SuperLink counts all bytes of TCP
both ways while an order is out, HTTP's headers and Flower's looking for messages included.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.deployment.worker import open_worker

SIZES = (0, 180_224, 1_802_240)
"""Bytes of payload: none, florence2-nano's at rank 8, ten times that."""

REPEATS = 5
PROJECT = """
[project]
name = "wire-app"
version = "0.1.0"
description = "Orders that come back as they are"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "local"
[tool.flwr.app.components]
serverapp = "wire.server_app:app"
clientapp = "wire.client_app:app"
[tool.flwr.app.config]
out = ""
"""
CLIENT = "from fedvlm_jax.deployment.flower.client_app import make_client_app\n\napp = make_client_app()\n"
SERVER = f"""
import json, os, time
from pathlib import Path
from flwr.serverapp import ServerApp
from fedvlm_jax.deployment.flower.transport import GridTransport
from fedvlm_jax.deployment.packets import Packet

app = ServerApp()

@app.main()
def main(grid, context):
    carried, spans = GridTransport(grid), []
    while not carried.list_nodes():
        time.sleep(0.2)
    for size in {SIZES}:
        for _ in range({REPEATS}):
            order = Packet({{"kind": "echo"}}, os.urandom(size))
            start = time.time()
            (reply,) = carried.ask({{node: order for node in carried.list_nodes()}}, 120).values()
            assert reply.payload == order.payload, reply
            spans.append((size, start, time.time()))
    Path(context.run_config["out"]).write_text(json.dumps(spans))
"""


class Relay:
    """Pass on what comes to a port, and note when how many bytes went which way."""

    def __init__(self, target: int) -> None:
        self.target, self.seen = target, list[tuple[float, str, int]]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            far = socket.create_connection(("127.0.0.1", self.target))
            for one, other, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pump, args=(one, other, way), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, way: str) -> None:
        try:
            while part := one.recv(2**16):
                self.seen.append((time.time(), way, len(part)))
                other.sendall(part)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def count(self, way: str, start: float, end: float) -> int:
        """Sum the bytes that went one way in a span of time."""
        return sum(size for at, name, size in self.seen if name == way and start <= at <= end)


def measure() -> list[tuple[int, float, float, float]]:
    """Return, by size: median bytes to the node, from the node, and seconds."""
    folder = Path(tempfile.mkdtemp(prefix="wire-"))
    for name, text in {"server_app": SERVER, "client_app": CLIENT, "__init__": ""}.items():
        (folder / "app" / "wire").mkdir(parents=True, exist_ok=True)
        (folder / "app" / "wire" / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "app" / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, own = one.getsockname()[1], two.getsockname()[1]
    connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(connection, encoding="utf-8")
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FLWR_HOME": f"{folder}/home"}
    here |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    result, path = folder / "spans.json", folder / "w.sock"
    with ExitStack() as running:
        worker = running.enter_context(open_worker(path))
        threading.Thread(target=worker.serve, args=(lambda order: Packet({}, order.payload),), daemon=True).start()

        def start(*words: object) -> None:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen([*map(str, words)], env=here, **quiet)
            running.callback(process.wait)
            running.callback(process.terminate)

        start("flower-superlink", "--insecure", "--port", port, "--disable-runtime-dependency-installation")
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        relay = Relay(port)
        config = f'socket="{path}"'
        where = ("--superlink", f"127.0.0.1:{relay.port}", "--port", own)
        start("flower-supernode", "--insecure", *where, "--node-config", config)
        asked = ["flwr", "run", str(folder / "app"), "here", "--run-config", f'out="{result}"']
        subprocess.run(asked, env=here, check=True, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 600
        while not result.is_file() and time.monotonic() < end:
            time.sleep(0.5)
    spans = json.loads(result.read_text(encoding="utf-8"))
    rows = []
    for size in SIZES:
        found = [(start, end) for of, start, end in spans if of == size][1:]  # the first also fetches the app
        ways = [statistics.median(relay.count(way, *span) for span in found) for way in ("down", "up")]
        rows.append((size, *ways, statistics.median(end - start for start, end in found)))
    return rows


if __name__ == "__main__":
    print("| payload each way | to the node | from the node | seconds |\n| ---: | ---: | ---: | ---: |")
    for size, down, up, seconds in measure():
        print(f"| {size:,} | {down:,.0f} | {up:,.0f} | {seconds:.1f} |")
