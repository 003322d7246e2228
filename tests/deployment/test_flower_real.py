"""Real clients over Flower's own processes on this machine: plain, with TLS and node keys, with a node killed."""

import re
import shutil
import subprocess
import time
from importlib.util import find_spec

import numpy as np
import pytest
from deployment_world import NAMES, write_rows
from flower_network import find_ports, open_network
from safetensors.numpy import load_file

from fedvlm_jax.run_dir.reader import read_finished, read_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flwr") is None, reason="needs the extra `flower`: pip install -e '.[flower,test]'"),
]

OPTIONS = (
    "--rounds", "2", "--train.local-steps", "2", "--train.batch-size", "2", "--rank", "2", "--seed", "1",
    "--evaluation.max-answer-tokens", "4", "--data.max-prompt-tokens", "40", "--data.max-answer-tokens", "12",
)  # fmt: skip
RUNNING = "Uvicorn running"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


class Deployment:
    """A deployment whose commands are those that its README has, with ports that are free."""

    def __init__(self, network, folder, rows, port, node_ports):
        self.network, self.folder, self.rows, self.port, self.node_ports = network, folder, rows, port, node_ports
        self.clients = len(node_ports)
        self.secure, self.workers, self.supernodes = {}, {}, {}

    def start_link(self):
        words = ["--insecure"]
        if self.secure:
            words = ["--enable-supernode-auth", "--ssl-ca-certfile", self.secure["ca"]]
            words += ["--ssl-certfile", self.secure["certificate"], "--ssl-keyfile", self.secure["key"]]
        self.link = self.network.start(
            "superlink",
            "flower-superlink",
            *words,
            "--port",
            self.port,
            "--disable-runtime-dependency-installation",
            "--database",
            self.folder / "d" / "superlink.db",
        )
        self.link.wait_for(RUNNING)

    def start_worker(self, number):
        self.workers[number] = self.network.start(
            f"node-{number}", "fedvlm", "node", self.folder / "d" / "nodes" / f"client-{number}.json", "--data",
            self.rows / NAMES[number], "--folder", self.folder / f"node-{number}",
        )  # fmt: skip

    def start_supernode(self, number):
        words = ["--insecure"]
        if self.secure:
            words = ["--root-certificates", self.secure["ca"], "--ssl-ca-certfile", self.secure["ca"]]
            words += ["--ssl-certfile", self.secure["certificate"], "--ssl-keyfile", self.secure["key"]]
            words += ["--auth-supernode-private-key", self.secure[f"node-{number}"]]
        self.supernodes[number] = self.network.start(
            f"supernode-{number}", "flower-supernode", *words, "--superlink", f"127.0.0.1:{self.port}",
            "--port", self.node_ports[number],
            "--node-config", f'socket="{self.folder / f"node-{number}" / "worker.sock"}"',
        )  # fmt: skip

    def start_run(self):
        said = self.network.run("flwr-run", "flwr", "run", self.folder / "d" / "app", self.network.connection)
        assert "Successfully started run" in said, said

    def wait_until(self, done, what, seconds=400):
        end = time.monotonic() + seconds
        while not done():
            for process in (self.link, *self.workers.values(), *self.supernodes.values()):
                assert process.process.poll() is None, process.read()
            assert time.monotonic() < end, f"{what} did not come:\n" + "\n".join(
                f"== {process.words[0]}\n{process.read()[-4000:]}" for process in self.network.processes
            )
            time.sleep(0.1)

    @property
    def out(self):
        return self.folder / "d" / "run"

    def count_rounds(self):
        file = self.out / "metrics.jsonl"
        return file.read_text().count("\n") if file.is_file() else 0

    def check(self):
        """The server's folder is a run's, without a client's model; each node has its own."""
        record = read_run(self.out)
        assert [line["round"] for line in record.rounds] == [1, 2]
        assert {line["bytes_up_per_client"] for line in record.rounds} == {
            sum(array.nbytes for array in load_file(self.out / "adapters" / "shared.safetensors").values())
        }
        assert set(record.scores("personal", "loss")) == set(NAMES[: self.clients])
        assert not list((self.out / "adapters").glob("clients/*"))
        for number in range(self.clients):
            assert read_finished(self.folder / f"node-{number}" / "run").clients == (NAMES[number],)
        return record


@pytest.fixture
def deploy(tmp_path, model, rows):
    with open_network(tmp_path / "logs", tmp_path / "d" / "flwr") as network:

        def make(clients=2, *options):
            port, *node_ports = find_ports(1 + clients)
            network.run(
                "init", "fedvlm", "deploy", "init", tmp_path / "d", "--clients", clients, "--port", port,
                "--model", model, *OPTIONS, *options,
            )  # fmt: skip
            return Deployment(network, tmp_path, rows, port, node_ports)

        yield make


@pytest.fixture
def deployment(deploy):
    return deploy()


def test_two_rounds_over_loopback(deployment):
    for number in range(deployment.clients):
        deployment.start_worker(number)
    deployment.start_link()
    for number in range(deployment.clients):
        deployment.workers[number].wait_for("flower-supernode --insecure")
        deployment.start_supernode(number)
    deployment.start_run()
    deployment.wait_until(lambda: (deployment.out / "results.json").is_file(), "results")
    record = deployment.check()
    for number, worker in deployment.workers.items():
        said = worker.read()
        assert f"client  {number} of 2, {NAMES[number]}" in said
        lines = re.findall(r"train (\d) +([\d,]+) bytes in, ([\d,]+) out", said)
        assert [line[0] for line in lines] == ["1", "2"]
        assert {int(line[2].replace(",", "")) for line in lines} == {record.rounds[0]["bytes_up_per_client"]}


def test_three_nodes_do_what_the_simulator_does(deploy, model, rows):
    """Losses, the shared part and every client's own adapter, within 1e-4 of what training moved."""
    deployment = deploy(3)
    deployment.start_link()
    for number in range(3):
        deployment.start_worker(number)
        deployment.start_supernode(number)
    deployment.start_run()
    deployment.wait_until(lambda: (deployment.out / "results.json").is_file(), "results")
    record, out = deployment.check(), deployment.folder / "simulated"
    deployment.network.run(
        "train", "fedvlm", "train", "--data", rows / "all", "--model", model, *OPTIONS, "--no-baseline", "--out", out
    )
    simulated = read_run(out)
    assert record.results["selected_round"] == simulated.results["selected_round"] == 2
    for line, other in zip(record.rounds, simulated.rounds, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    shared = [load_file(folder / "adapters" / "shared.safetensors") for folder in (deployment.out, out)]
    for path, b in shared[1].items():  # B begins at zero
        assert np.abs(shared[0][path] - b).max() <= 1e-4 * np.abs(b).max()
    clients = [load_file(find_adapter(out, name)) for name in NAMES]
    for number, want in enumerate(clients):
        got = load_file(find_adapter(deployment.folder / f"node-{number}" / "run", NAMES[number]))
        assert got.keys() == want.keys()
        for path, factor in want.items():  # A begins the same for all, so clients' are as far apart as they went
            moved = max(np.abs(factor - other[path]).max() for other in clients) if path.endswith("/a") else 0
            moved = moved or np.abs(factor).max()
            assert np.abs(got[path] - factor).max() <= 1e-4 * moved


def find_adapter(run, name):
    (file,) = (run / "adapters" / "clients").glob(f"*{name}*.safetensors")
    return file


def test_tls_and_node_keys(deployment):
    """A node without a registered key is not let in; the others train."""
    if shutil.which("openssl") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("openssl and ssh-keygen make the certificates and keys")
    deployment.secure = make_certificates(deployment.folder / "d" / "certificates")
    deployment.network.connection = "tls"
    deployment.start_link()
    for number in range(deployment.clients):
        deployment.start_worker(number)
        key = f"{deployment.secure[f'node-{number}']}.pub"
        said = deployment.network.run(f"register-{number}", "flwr", "supernode", "register", key, "tls")
        assert "rror" not in said, said
        deployment.start_supernode(number)
    deployment.secure["node-7"] = make_key(deployment.folder / "stranger")
    deployment.node_ports.extend([None] * 5 + find_ports(1))
    deployment.start_supernode(7)
    stranger = deployment.supernodes.pop(7)
    assert stranger.wait() != 0
    deployment.start_run()
    deployment.wait_until(lambda: (deployment.out / "results.json").is_file(), "results")
    deployment.check()


def test_a_node_killed_between_rounds_goes_on_with_its_personal_state(deployment):
    """Killed with -9 and started again while the coordinator is at work, it takes part with what it had."""
    deployment.start_link()
    for number in range(deployment.clients):
        deployment.start_worker(number)
        deployment.start_supernode(number)
    deployment.start_run()
    deployment.wait_until(lambda: deployment.count_rounds() == 1, "the first round")
    deployment.workers[1].kill()
    deployment.supernodes[1].kill()
    states = sorted((deployment.folder / "node-1" / "states").iterdir())
    assert states
    before = states[-1].read_bytes()
    deployment.start_worker(1)
    deployment.start_supernode(1)
    deployment.wait_until(lambda: (deployment.out / "results.json").is_file(), "results")
    deployment.check()
    assert states[-1].read_bytes() == before or not states[-1].exists()
    said = deployment.link.read()
    assert "has lost its personal state" not in said


def test_a_server_killed_between_rounds_goes_on(deployment):
    """SuperLink and app, with -9, and started again: workers and SuperNodes stay, the run goes on where it was."""
    deployment.start_link()
    for number in range(deployment.clients):
        deployment.start_worker(number)
        deployment.start_supernode(number)
    deployment.start_run()
    deployment.wait_until(lambda: deployment.count_rounds() == 1, "the first round")
    deployment.link.kill()
    before = (deployment.out / "metrics.jsonl").read_text().splitlines()[0]
    deployment.start_link()
    deployment.start_run()
    deployment.wait_until(lambda: (deployment.out / "results.json").is_file(), "results")
    assert deployment.check().rounds[1]["dropped"] == 0
    assert (deployment.out / "metrics.jsonl").read_text().splitlines()[0] == before


def test_a_secret_sum_of_three(deploy):
    """The server gets no message by itself, and the run is as another."""
    deployment = deploy(3, "--secure")
    deployment.start_link()
    for number in range(3):
        deployment.start_worker(number)
        deployment.start_supernode(number)
    deployment.start_run()
    deployment.wait_until(lambda: (deployment.out / "results.json").is_file(), "results")
    assert [line["dropped"] for line in deployment.check().rounds] == [0, 0]
    for worker in deployment.workers.values():
        said = re.findall(r"(train|message) +(\d) +([\d,]+) bytes in, ([\d,]+) out", worker.read())
        assert [(kind, number) for kind, number, _, _ in said] == [
            ("train", "1"), ("message", "1"), ("train", "2"), ("message", "2")
        ]  # fmt: skip
        assert {went for kind, _, _, went in said if kind == "train"} == {"0"}


def make_certificates(folder):
    """A certificate for 127.0.0.1 and a key for each node, as the README has it."""
    folder.mkdir(mode=0o700)
    run = lambda *words: subprocess.run(words, cwd=folder, check=True, capture_output=True)  # noqa: E731
    new = ("openssl", "req", "-newkey", "rsa:2048", "-nodes")
    run(*new, "-x509", "-days", "2", "-subj", "/CN=fedvlm", "-keyout", "ca.key", "-out", "ca.crt")
    run(*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    (folder / "san.txt").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    run(
        "openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "san.txt", "-out", "server.crt",
    )  # fmt: skip
    made = {"ca": folder / "ca.crt", "certificate": folder / "server.crt", "key": folder / "server.key"}
    return made | {f"node-{number}": make_key(folder / f"node-{number}") for number in range(2)}


def make_key(file):
    words = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(file)]
    subprocess.run(words, check=True, capture_output=True)
    return file
