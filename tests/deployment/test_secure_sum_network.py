"""The secure sum over a SuperLink and three SuperNodes on loopback, a process for every message, as Flower does it."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

import fedvlm_jax

pytest.importorskip("flwr", reason="needs the extra `flower`: pip install -e '.[flower,test]'")
pytestmark = pytest.mark.slow

NODES, ENTRIES, CLIP = 3, 45_056, 0.05
WEIGHTS = (0.001, 0.04, 0.959)
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "secureapp"
version = "0.1.0"
description = ""
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "secureapp.server_app:app"
clientapp = "secureapp.client_app:app"

[tool.flwr.app.config]
"""
CLIENT = """
import time

import numpy as np
from flwr.clientapp import ClientApp

from fedvlm_jax.deployment.flower.secure_sum import answer_stage, is_stage

app = ClientApp()


@app.train()
def train(message, context):
    assert is_stage(message)
    number = context.node_config["partition-id"]

    def fetch(header):
        if number in header["late"]:
            time.sleep(1.5 * header["timeout"])
        vector = np.random.default_rng([header["round"], number]).normal(0, 2e-3, {entries}).astype(np.float32)
        if number in header["large"]:
            vector[7] = 500
        return vector * np.float32({weights}[number])

    return answer_stage(message, context, fetch)
"""
SERVER = """
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from flwr.serverapp import ServerApp

from fedvlm_jax.deployment.flower.secure_sum import ask_sum
from fedvlm_jax.errors import UserError

app = ServerApp()


@app.main()
def main(grid, context):
    out, lines = Path({out!r}), []
    while len(nodes := list(grid.get_node_ids())) < {nodes}:
        time.sleep(0.2)
    for number, header in enumerate({headers}):
        try:
            found = ask_sum(grid, dict.fromkeys(nodes, header), clip={clip}, timeout=header["timeout"])
        except UserError as error:
            lines.append({{"error": str(error)}})
            continue
        np.save(out / f"sum-{{number}}.npy", found.vector)
        lost = list(found.lost.values())
        lines.append({{"counted": len(found.nodes), "lost": lost, "bytes": found.bytes_up, "seconds": found.seconds}})
    lines.append({{"jax": "jax" in sys.modules}})
    (out / "done.tmp").write_text(json.dumps(lines))
    os.rename(out / "done.tmp", out / "done.json")
"""
HEADERS = (
    {"round": 1, "large": [], "late": [], "timeout": 90},
    {"round": 2, "large": [0], "late": [], "timeout": 90},
    {"round": 3, "large": [], "late": [2], "timeout": 60},
    {"round": 4, "large": [0, 1], "late": [], "timeout": 90},
)


def find_ports(count):
    """Ports that are free now; all are held at once, so that they differ."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


@contextmanager
def started(log, *command, env):
    """A process and all that it starts, which end with the block."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait(20)


def wait_for(found, processes, seconds, folder):
    end = time.monotonic() + seconds
    while not found():
        dead = [process.args[0] for process in processes if process.poll() is not None]
        late = time.monotonic() > end
        if dead or late:
            logs = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))
            pytest.fail(f"{'too late' if late else dead}\n{logs}")
        time.sleep(0.2)


def is_open(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def make_app(folder, out):
    package = folder / "secureapp"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(CLIENT.format(entries=ENTRIES, weights=WEIGHTS))
    server = SERVER.format(out=str(out), nodes=NODES, headers=HEADERS, clip=CLIP)
    (package / "server_app.py").write_text(server)


def exact(round_, numbers):
    vectors = [np.random.default_rng([round_, n]).normal(0, 2e-3, ENTRIES).astype(np.float32) for n in numbers]
    return np.tensordot([WEIGHTS[n] for n in numbers], np.asarray(vectors, np.float64), 1)


def test_a_sum_of_three_supernodes(tmp_path):
    home, out, port, *ports = tmp_path / "home", tmp_path / "out", *find_ports(1 + NODES)
    home.mkdir(), out.mkdir()
    make_app(tmp_path / "app", out)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    tools, source = Path(sys.executable).parent, Path(fedvlm_jax.__file__).parents[1]
    env = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONPATH": str(source), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with ExitStack() as stack:

        def start(name, *words):
            return stack.enter_context(started(tmp_path / f"{name}.log", str(tools / words[0]), *words[1:], env=env))

        link = start("link", "flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation")  # fmt: skip # noqa: E501
        wait_for(lambda: is_open(port), [link], 90, tmp_path)
        nodes = [
            start(f"node{number}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                  "--port", str(own), "--node-config", f"partition-id={number}")
            for number, own in enumerate(ports)
        ]  # fmt: skip
        run = [str(tools / "flwr"), "run", str(tmp_path / "app"), "here"]
        told = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert told.returncode == 0, told.stdout + told.stderr
        wait_for((out / "done.json").exists, [link, *nodes], 600, tmp_path)

    full, refused, late, few, modules = json.loads((out / "done.json").read_text())
    sys.stdout.write(json.dumps([full, refused, late, few]))  # seconds and bytes, for whoever asks with -rP
    assert modules == {"jax": False}
    for number, line, counted in ((0, full, [0, 1, 2]), (1, refused, [1, 2]), (2, late, [0, 1])):
        found, expected = np.load(out / f"sum-{number}.npy"), exact(number + 1, counted)
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected), line
        assert line["counted"] == len(counted)
    assert full["lost"] == []
    assert refused["lost"] == ["secure sum: an entry of 0.5 is beyond 0.05, which the server allows: not sent"]
    assert late["lost"] == ["no reply within 60 s"]
    assert "1 of 3 nodes is left after stage 3 of 4, 2 are needed" in few["error"]
    assert 8 * ENTRIES < full["bytes"] < 8 * ENTRIES + 4096
