"""Independent pieces of work spread over processes, each with its share of the cores.

A CPU program waits for its slowest thread at every step. Two processes with a core each do more than one that has both:
about a quarter more for the shipped model.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

import jax

from fedvlm_jax.errors import UserError, format_count

Task = TypeVar("Task")
Result = TypeVar("Result")


def spread(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """Yield the results of `work` for each task in the order in which they are ready.

    `work` is a function of a module, so that it can be sent to a process; it may keep what the next task needs too.

    Raises:
        UserError: there is an accelerator, which processes cannot share, there are fewer cores than processes, or one
            was killed from outside.
        Exception: what `work` raised, or what stopped this process; the other processes are ended, and what they were
            at is as after a kill.
    """
    if jax.default_backend() != "cpu":
        raise UserError(f"--processes {processes}: processes cannot share an accelerator; leave it out")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if processes > len(cores):
        raise UserError(
            f"--processes {processes}: there {'is' if len(cores) == 1 else 'are'} "
            f"{format_count(len(cores), 'core')}, ask for as many at most"
        )
    context = get_context("spawn")  # a fork would inherit JAX's threads' locks
    shares, stop = context.SimpleQueue(), context.Event()
    for number in range(processes):
        shares.put(cores[number::processes])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_settle, initargs=(shares, stop)) as pool:
        try:
            # A Ctrl-C or a closed terminal reaches all processes alike; those that start here leave it to this one.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            try:
                futures = [pool.submit(work, task) for task in tasks]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            stop.set()
            raise UserError(
                f"one of the {processes} processes was killed from outside, perhaps for want of memory. Repeat the "
                "command with the same --out to go on, with fewer --processes if memory is short"
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _settle(shares: Any, stop: Any) -> None:
    """Take a share of the cores, before JAX counts them, and end when nobody waits any more."""
    Thread(target=_end_with, args=(stop,), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())


def _end_with(stop: Any) -> None:
    """End this process once it is asked to, or the process that started it is gone; look twice a second."""
    parent = parent_process()
    while not stop.wait(0.5):
        if parent is not None and not parent.is_alive():
            break
    os._exit(1)  # sys.exit would end this thread alone
