"""Flower's real processes on this machine, for tests: free ports looked for first, and all of them ended at the end."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

BIN = Path(sys.executable).parent
PATIENCE = 120
"""Seconds that a process may take to say what it is waited for."""


def find_ports(count):
    """Ports that are free now; all are held until all are found."""
    with_socket = [socket.socket() for _ in range(count)]
    try:
        for opened in with_socket:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in with_socket]
    finally:
        for opened in with_socket:
            opened.close()


class Process:
    """A process in a session of its own, whose output goes to a file."""

    def __init__(self, words, log, environment):
        self.words, self.log = words, log
        self.before = log.stat().st_size if log.exists() else 0  # what an earlier process of this name has said
        with log.open("ab") as written:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def read(self):
        return self.log.read_bytes()[self.before :].decode(errors="replace")

    def wait_for(self, text, times=1, seconds=PATIENCE):
        """Wait until it has said this so often."""
        end = time.monotonic() + seconds
        while self.read().count(text) < times:
            assert self.process.poll() is None, f"{self.words} ended with {self.process.returncode}:\n{self.read()}"
            assert time.monotonic() < end, f"{self.words} did not say {text!r}:\n{self.read()}"
            time.sleep(0.05)

    def wait(self, seconds=PATIENCE):
        """Wait until it ends; returns its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.words} did not end:\n{self.read()}") from None

    def kill(self):
        """Kill it with -9, and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def end(self):
        """Ask it to end, and kill what is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()


class Network:
    """A SuperLink and SuperNodes; `options` and `node_options` are those of a connection with or without TLS."""

    def __init__(self, folder, home, environment=None):
        self.folder, self.processes, self.connection = folder, [], "plain"
        self.environment = {
            **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200",
            **(environment or {}),
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name, *words):
        """Start a program of the environment that tests run in."""
        process = Process([str(BIN / words[0]), *map(str, words[1:])], self.folder / f"{name}.log", self.environment)
        self.processes.append(process)
        return process

    def run(self, name, *words, seconds=PATIENCE):
        """Run a program to its end; returns what it said."""
        process = self.start(name, *words)
        code = process.wait(seconds)
        assert code == 0, process.read()
        return process.read()

    def end(self):
        for process in reversed(self.processes):
            process.end()


@contextmanager
def open_network(folder, home, **more):
    network = Network(folder, home, **more)
    try:
        yield network
    finally:
        network.end()
