"""How the processes of a run find out that all of them are there, before jax is started, and when one is gone.

jax ends a process that waits in vain with the stack of a C++ abort, and cannot tell who is missing. So process 0 first
listens itself, at the address at which jax's service will: each of the others says which it is and of how many, and all
of them are told to go on, or why not. These connections stay: one that breaks tells at once what jax would notice after
half a minute, or not say clearly.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from fedvlm_jax.errors import UserError

__all__ = ["meet", "watch"]

GO, BYE, GONE = "go", "bye", "gone"
PAUSE = 0.2
"""Seconds between two tries to reach process 0."""


def meet(host: str, port: int, processes: int, process: int, timeout: float) -> dict[int, socket.socket]:
    """Wait until all processes are there.

    Args:
        host, port: of process 0.
        processes: how many there are.
        process: which this is.
        timeout: seconds.

    Returns:
        Connections to the others, by number: of process 0 to all of them, of the others to process 0.

    Raises:
        UserError: they did not come in time, the port is taken, or they do not agree about who they are.
    """
    deadline = time.monotonic() + timeout
    if process:
        return {0: _report(host, port, f"fedvlm process {process} of {processes}", deadline, timeout)}
    return _receive(port, processes, deadline, timeout)


def watch(others: Mapping[int, socket.socket], lost: Callable[[int], None]) -> Callable[[], None]:
    """Notice in the background when a process goes without saying so.

    Args:
        others: what `meet` returned.
        lost: called, in another thread, with the number of the first that did.

    Returns:
        What this process calls to say that it goes.
    """
    first = threading.Lock()

    def tell(number: int) -> None:
        if first.acquire(blocking=False):  # once, and never given back
            for connection in others.values():
                _send(connection, f"{GONE} {number}")
            lost(number)

    def listen(number: int, connection: socket.socket) -> None:
        word, _, who = _read_line(connection, None).partition(" ")
        if word != BYE:
            tell(int(who) if word == GONE and who.isdigit() else number)

    def leave() -> None:
        first.acquire(blocking=False)
        for connection in others.values():
            _send(connection, BYE)

    for number, connection in others.items():
        threading.Thread(target=listen, args=(number, connection), daemon=True).start()
    return leave


def _receive(port: int, processes: int, deadline: float, timeout: float) -> dict[int, socket.socket]:
    """Process 0: let the others come."""
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        raise UserError(
            f"--distributed.coordinator: process 0 cannot listen at port {port} ({error.strerror}); does another run? "
            "Choose another port, the same for all"
        ) from None
    come: dict[int, socket.socket] = {}
    with server, ExitStack() as stack:
        try:
            while len(come) < processes - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(other) for other in range(1, processes) if other not in come)
                    raise UserError(
                        f"after {timeout:.0f} s process {missing} of {processes} is not there: start all of them, with "
                        "the same --distributed.coordinator; --distributed.timeout waits longer"
                    ) from None
                stack.enter_context(connection)
                said = _read_line(connection, 5.0).split()
                if said[:2] != ["fedvlm", "process"] or len(said) != 5:
                    connection.close()  # a stranger
                    continue
                who, of = int(said[2]), int(said[4])
                if of != processes or who in come:
                    twice = f"there are two processes {who}: each must have another --distributed.process"
                    unlike = f"process 0 was told --distributed.processes {processes}, and process {who} {of}"
                    _send(connection, unlike if of != processes else twice)
                    raise UserError(unlike if of != processes else twice)
                come[who] = connection
        except UserError as error:
            for connection in come.values():
                _send(connection, str(error))
            raise
        for connection in come.values():
            _send(connection, GO)
        stack.pop_all()
    return come


def _report(host: str, port: int, who: str, deadline: float, timeout: float) -> socket.socket:
    """The others: reach process 0 and wait for its word."""
    while time.monotonic() < deadline:
        with suppress(OSError), ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection((host, port), 5.0))
            _send(connection, who)
            said = _read_line(connection, deadline + 5.0 - time.monotonic())
            if said == GO:
                stack.pop_all()
                return connection
            if said:
                raise UserError(said)
        time.sleep(PAUSE)
    raise UserError(
        f"--distributed.coordinator {host}:{port}: process 0 did not answer there within {timeout:.0f} s. Is it "
        "started, is that its address, and is the port open? --distributed.timeout waits longer"
    )


def _send(connection: socket.socket, text: str) -> None:
    with suppress(OSError):
        connection.sendall(f"{text}\n".encode())


def _read_line(connection: socket.socket, timeout: float | None) -> str:
    """A line that the other side said; empty where it hung up or said nothing in time."""
    with suppress(OSError, UnicodeDecodeError), connection.makefile("r", encoding="utf-8") as lines:
        connection.settimeout(timeout)
        return lines.readline(4096).strip()
    return ""
