"""Signals that ask a command to end: Ctrl-C, the scheduler's SIGTERM, a terminal that closes.

All of them end it in one way: what is being done stops at the next line of Python, what holds a file or a process lets
go, one line tells how to go on, and the exit code is 128 and the signal's number. A second one ends the process at
once, also while it is inside of a compilation, which no line of Python interrupts. What a run has stored stands either
way. A signal that is ignored from the start (`nohup`, a shell's background) stays ignored.

Python raises where it gets to a signal, and drops what is raised in a weak reference's callback or in `__del__`, of
which jax has many after a compilation: the signal is then sent once more.
"""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from fedvlm_jax.errors import UserError, describe_os_error
from fedvlm_jax.utils.untrusted_text import clean

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 2  # seconds after which a message says that Python has not got to the signal yet
WAITING = b"\nfedvlm: stopping when what is being computed is through; a second signal ends it at once\n"
SHOW_CURSOR = b"\x1b[?25h"
DROPPED = 255
"""A byte beside the numbers of signals: Python has dropped what was raised."""
AGAIN = 0.05
"""Seconds until a signal is sent once more."""


class StoppedError(KeyboardInterrupt):
    """A signal asked the command to end; `code` is the exit code that belongs to it."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.code = 128 + number


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a command that was asked to end.

    >>> exit_code(StoppedError(15)), exit_code(KeyboardInterrupt())
    (143, 130)
    """
    return error.code if isinstance(error, StoppedError) else StoppedError().code


@contextmanager
def advising(finish: Callable[[], None], advise: Callable[[], str]) -> Generator[None]:
    """End with `finish` what is shown in the block; where a signal or a disk ends it early, `advise` how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        finish()
        raise SystemExit(say(f"stopped. {advise()}", exit_code(error))) from None
    except OSError as error:
        raise UserError(f"{describe_os_error(error)}. {advise()}") from error
    finally:
        finish()


@contextmanager
def heed_signals() -> Generator[None]:
    """Raise `StoppedError` in the block when a signal asks it to end; only the main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reached = threading.Event()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        reached.set()
        raise StoppedError(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    heeded = [number for number in ENDING if before[number] not in (signal.SIG_IGN, None)]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    show_dropped = sys.unraisablehook

    def hear(dropped: "sys.UnraisableHookArgs") -> None:
        if isinstance(dropped.exc_value, StoppedError):
            os.write(writer, bytes([DROPPED]))
        else:
            show_dropped(dropped)

    sys.unraisablehook = hear
    fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, reached), daemon=True).start()
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:  # once asked to end, a process that is on its way out ends at the next signal
            signal.signal(number, signal.SIG_DFL if reached.is_set() else before[number])
        sys.unraisablehook = show_dropped
        signal.set_wakeup_fd(fd)
        os.close(writer)


@contextmanager
def ending_at_once() -> Generator[None]:
    """Have a process that a signal asked to end leave without C++'s destructors, when all else has run.

    Threads of XLA may still be computing. Once what they use is destroyed they crash, and the exit code would be that
    of a segmentation fault. What is registered first runs last: enter before jax is imported.
    """
    codes = list[int]()
    atexit.register(lambda: _leave(codes))
    try:
        yield
    except SystemExit as stop:
        if stop.code in [128 + number for number in ENDING]:
            codes.append(int(stop.code))
        raise


def _leave(codes: Sequence[int]) -> None:
    if codes:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or never there
                stream.flush()
        os._exit(codes[0])


def say(text: str, code: int) -> int:
    """Say what ended a command, where there still is somebody to read it; returns its exit code."""
    with suppress(OSError):
        begin = "\n" if code == StoppedError().code and sys.stderr.isatty() else ""  # after the terminal's ^C
        shown = clean(text, "\n")  # messages that list something have several lines
        print(f"{begin}fedvlm: {shown}", file=sys.stderr, flush=True)
    return code


def _watch(reader: int, reached: threading.Event) -> None:
    """Read the numbers of signals as they come, until the writing end is closed; the second ends the process."""
    with open(reader, "rb", buffering=0) as numbers:
        first = _find_next(numbers.fileno())
        if not first:
            return
        ready, _, _ = select.select([numbers], [], [], PATIENCE)
        with suppress(OSError):  # the terminal may be gone
            if not ready and not reached.is_set():
                os.write(2, WAITING)
        while (second := _find_next(numbers.fileno())) == DROPPED:
            time.sleep(AGAIN)
            signal.pthread_kill(threading.main_thread().ident or 0, first)
            _find_next(numbers.fileno())  # that of this signal
        if second:
            with suppress(OSError):
                if sys.stderr is not None and sys.stderr.isatty():
                    os.write(2, SHOW_CURSOR)
            os._exit(128 + second)


def _find_next(reader: int) -> int:
    """Return the number of the next signal that asks to end, or `DROPPED`; 0 where there will be none."""
    while byte := os.read(reader, 1):
        if byte[0] in (*ENDING, DROPPED):
            return byte[0]
    return 0
