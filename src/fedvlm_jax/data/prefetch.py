"""Host work done ahead of the device: the next batches are read while the current one is computed.

By grain, whose threads fill a bounded buffer and whose elements come in their order whatever the number of threads, so
that a run's numbers never depend on it. Its shuffling and sharding stay unused: what a round reads is a function of
(seed, round) alone, which makes a killed run resumable.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def read_ahead(make: Callable[[int], T], start: int, stop: int, *, ahead: int = 2) -> Iterator[T]:
    """Yield `make(start)`, …, `make(stop - 1)` in order, up to `ahead` of them made before they are asked for.

    Args:
        make: index -> element, never None (grain would leave it out). It runs in another thread, and its exceptions
            come out of the iterator in their turn.
        start, stop: the range of indices.
        ahead: elements in memory beside the current one, and threads that make them (by default one is being read, one
            waits); 0 makes them when asked for.

    >>> list(read_ahead(lambda index: index * 10, 0, 3, ahead=0))
    [0, 10, 20]
    """
    if ahead < 1 or stop - start < 2:
        yield from map(make, range(start, stop))
        return
    import grain  # late: it takes a second to import

    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    yield from grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)
