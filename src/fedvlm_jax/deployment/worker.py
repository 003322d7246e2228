"""A node's long-lived worker: a server on a UNIX socket, which holds base, features and compiled programs.

Flower starts a process for each message (flwr 1.42, `superexec/executor/subprocess_executor.py`). Such a process hands
the order to the worker of its machine and its reply back. Orders are answered one at a time by the thread that calls
`serve`, so that a signal stops what is being computed; others wait. Who hung up while waiting is not answered.
"""

import contextlib
import fcntl
import os
import queue
import select
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedvlm_jax.deployment.frames import check_path, receive_packet, send_packet
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.errors import UserError, describe_os_error, explain_error
from fedvlm_jax.run_dir.folder_lock import remove_unused

WAITING = 16
"""Orders that may wait for the one that is being answered."""

SILENCE = 60.0
"""Seconds that a client may take to hand over an order, or to take a reply."""

Answer = Callable[[Packet], Packet]


@dataclass
class _Order:
    """An order, and the connection on which its reply is waited for."""

    packet: Packet
    stream: socket.socket
    reply: Packet | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def is_waited_for(self) -> bool:
        """Tell whether the client is still there: it sends nothing more, so what can be read is its end."""
        with contextlib.suppress(OSError):
            ready, _, _ = select.select([self.stream], [], [], 0)
            return not ready or bool(self.stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False


class Worker:
    """A server that takes orders from the start, and answers them once `serve` is called.

    Attributes:
        path: of its socket.
    """

    def __init__(self, path: Path, listener: socket.socket) -> None:
        """Take orders on a socket that listens; see `open_worker`."""
        self.path, self._listener = path, listener
        self._orders: queue.Queue[_Order] = queue.Queue(WAITING)
        threading.Thread(target=self._accept, name="fedvlm-worker", daemon=True).start()

    def serve(self, answer: Answer, note: Callable[[str], None] = lambda _: None) -> None:
        """Answer orders, one at a time, until an exception such as Ctrl-C ends it.

        Args:
            answer: makes the reply. Its `UserError` and what else it raises becomes a reply with the header's `error`.
            note: is told in a line what failed.
        """
        while True:
            self.answer_one(answer, note)

    def answer_one(self, answer: Answer, note: Callable[[str], None] = lambda _: None) -> None:
        """Wait for an order and answer it; see `serve`."""
        order = self._orders.get()
        if not order.is_waited_for():
            note("an order was taken back before its turn: whoever asked has hung up")
            order.done.set()
            return
        try:
            order.reply = answer(order.packet)
        except Exception as error:
            order.reply = Packet({"error": describe_error(error)})
            note(f"an order failed: {order.reply.header['error']}")
            if not isinstance(error, UserError | OSError | MemoryError):
                note("".join(traceback.format_exception(error)).rstrip())
        finally:
            order.done.set()

    def close(self) -> None:
        """Take no more orders, and hang up on those that wait."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, which closing does not
        self._listener.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self._orders.get_nowait().done.set()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:  # closed: the worker has ended
                    return
                time.sleep(0.1)  # too many open files, for example: they will be fewer
                continue
            threading.Thread(target=self._attend, args=(stream,), daemon=True).start()

    def _attend(self, stream: socket.socket) -> None:
        """Read an order, wait for its turn, and send its reply; a client that fails costs itself alone."""
        with stream, contextlib.suppress(OSError):
            try:
                order = _Order(receive_packet(stream, time.monotonic() + SILENCE), stream)
                self._orders.put_nowait(order)
                order.done.wait()
                reply = order.reply
            except UserError as error:
                reply = Packet({"error": describe_error(error)})
            except queue.Full:
                reply = Packet({"error": f"{WAITING} orders are waiting for this node's worker already"})
            if reply is not None:
                send_packet(stream, reply, time.monotonic() + SILENCE)


def describe_error(error: Exception) -> str:
    r"""Say in one line what went wrong, as another machine is told.

    >>> describe_error(UserError("two\nlines")), describe_error(RuntimeError("odd"))
    ('two lines', 'RuntimeError: odd')
    """
    if isinstance(error, OSError) and error.errno is not None:
        return " ".join(describe_os_error(error).split())
    return explain_error(error)


@contextmanager
def open_worker(path: Path) -> Generator[Worker]:
    """Listen on a socket that this user alone can open; orders wait until the worker serves.

    Raises:
        UserError: a running worker has the socket, something else has its name, or it cannot be there.
    """
    path = path.absolute()
    check_path(path)
    try:
        with _claim(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            _bind(listener, path)
            inode = path.lstat().st_ino
            worker = Worker(path, listener)
            try:
                yield worker
            finally:
                worker.close()
                with contextlib.suppress(OSError):
                    if path.lstat().st_ino == inode:
                        path.unlink()
    except _TakenError as error:
        raise UserError(f"--socket {path}: {error}") from None


class _TakenError(Exception):
    """The socket cannot be had."""


@contextmanager
def _claim(path: Path) -> Generator[None]:
    """Hold a lock beside the socket: it ends with its process, while a socket's name stays behind."""
    lock, made = path.with_name(f"{path.name}.lock"), not path.parent.is_dir()
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(lambda: remove_unused(path.parent) if made else None)
            held = stack.enter_context(lock.open("ab"))
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(held.fileno()), lock.stat()):
                raise BlockingIOError  # of one that has just ended, or just begun
        except BlockingIOError:
            raise _TakenError("a running `fedvlm node` has it; stop that one, or choose another path") from None
        except OSError as error:
            raise _TakenError(describe_os_error(error)) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()  # before its lock goes: whoever has opened it then finds another file there, or none


def _bind(listener: socket.socket, path: Path) -> None:
    try:
        if path.is_symlink() or (path.exists() and not stat.S_ISSOCK(path.lstat().st_mode)):
            raise _TakenError("something that is no socket has that name; choose another path")
        path.unlink(missing_ok=True)  # of a worker that was killed: nobody holds the lock
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(WAITING)
    except OSError as error:
        raise _TakenError(describe_os_error(error)) from None
