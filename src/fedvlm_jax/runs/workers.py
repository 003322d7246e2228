"""Independent pieces of work spread over processes, each with cores of its own.

A CPU program waits for its slowest thread at every step. Two processes with a core each do more than one that has both:
about a quarter more for the shipped model.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import jax

from fedvlm_jax.errors import UserError
from fedvlm_jax.runs.heap import keep_heap
from fedvlm_jax.runs.progress import SilentProgress

__all__ = ["WorkerProgress", "spread"]

Task = TypeVar("Task")
Result = TypeVar("Result")


_stop: Any = None
"""In a worker: set when no more is wanted."""


class WorkerProgress(SilentProgress):
    """The progress of a run in a worker: silent, and its end when nobody waits for it any more."""

    def round(self, line: Any) -> None:
        """Stop if the process that asked is gone: whoever goes on with its runs must find them at rest."""
        del line
        parent = parent_process()
        if (_stop is not None and _stop.is_set()) or (parent is not None and not parent.is_alive()):
            raise SystemExit(1)

    def note(self, text: str) -> None:
        """Nobody reads it."""


def spread(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """Yield the results of `work` in the order in which they are ready.

    Args:
        work: a function of a module, so that it can be sent to a process; it may keep what the next task needs too.
        tasks: what it is called with; each goes to the next process that is free.
        processes: how many.

    Raises:
        UserError: there is an accelerator, which processes cannot share, or there are fewer cores than processes.
        Exception: what `work` raised; runs under way stop at their next round, those not yet begun are dropped.
    """
    if jax.default_backend() != "cpu":
        raise UserError(f"--processes {processes}: processes cannot share an accelerator; leave it out")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if processes > len(cores):
        raise UserError(f"--processes {processes}: there are {len(cores)} cores, ask for as many at most")
    context = get_context("spawn")  # a fork would inherit JAX's threads' locks
    shares, stop = context.SimpleQueue(), context.Event()
    for number in range(processes):
        shares.put(cores[number::processes])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_settle, initargs=(shares, stop)) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _settle(shares: Any, stop: Any) -> None:
    """Take a share of the cores, before JAX counts them."""
    global _stop  # no other way to tell what runs in there
    _stop = stop
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())
    keep_heap()
