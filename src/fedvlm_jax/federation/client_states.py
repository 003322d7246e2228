"""The personal states of all clients, outside of the devices: only a round's cohort is ever on one.

A state is packed into a record, and the records stand in the *slots* of one file, which is read and written by cohort:
memory does not grow with the population. A table says which slot holds whose state. A record that some kept table names
(that of a checkpoint, or of the best round so far) is never overwritten: the client's next state goes to a free slot.
So a checkpoint writes the table and nothing else, and costs what changed since the one before; and remembering the
models of a round costs as much.

A record ends with a digest of its state, of its slot and of the write that put it there, counted from the run's start.
Every reading checks it: a flipped bit, a record that was never written, or one of another time is an error, never a
number.

Several processes share the file, on a disk that all of them reach: each keeps the whole table, finds the same free
slots, and writes and reads only the records that it has to do with; `meet` lies between one's writing and another's
reading. A client of the next round may so fall to whichever process its place in the cohort is on.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Int, PyTree

from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import DamagedError, naming
from fedvlm_jax.utils import digests

NOBODY = -1
Slots = Int[np.ndarray, " clients"]  # the slot of every client's record; `NOBODY` for clients that have none yet
Stamps = Int[np.ndarray, " clients"]  # the number of the write of every client's record, from 1; 0 if it has none yet
MOST_PARTS = 1024  # parts that one call may read or write: IOV_MAX of Linux and macOS


class ClientStates:
    """Personal states of C clients in a file.

    A client's state changes only through `scatter` with its own number: whoever is not in a cohort keeps its state to
    the bit.

    Attributes:
        shapes: of one client's state.
        slots: where every client's record is now [C].
    """

    def __init__(self, shapes: PyTree, clients: int, file: Path | None = None) -> None:
        """Make room for `clients` states of the given shapes (a tree of `jax.ShapeDtypeStruct`) in a file.

        By default that is a temporary one; what another holds is known once `load` has said where it is.
        """
        self.shapes = shapes
        self._leaves, self._structure = jax.tree.flatten(shapes)
        self._bytes = [leaf.size * leaf.dtype.itemsize for leaf in self._leaves]
        self._path, self._name = file, "its temporary file" if file is None else str(file)
        if file is None:
            with tempfile.TemporaryFile() as temporary:  # it has no name, and ends with the process
                self._file = os.dup(temporary.fileno())
        else:
            self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)
        self.slots: Slots = np.full(clients, NOBODY, np.int64)
        self._writes = 0
        self._written = np.zeros(0, np.int64)  # by slot, the write that put its record there
        self._kept: dict[Hashable, Slots] = {}

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def known(self) -> Bool[np.ndarray, " clients"]:
        """Whether each client has a state [C]."""
        return self.slots != NOBODY

    @property
    def record(self) -> int:
        """Bytes of a client's record: its state and the digest."""
        return sum(self._bytes) + digests.DIGEST_SIZE

    def gather(self, numbers: Sequence[int] | np.ndarray, slots: Slots | None = None) -> PyTree:
        """Copy the states of these clients [K, …], now or where a table of another time says.

        Those of clients who have none are zeros, which mean nothing.

        Raises:
            DamagedError: a record is not as it was written.
        """
        at = (self.slots if slots is None else slots)[np.asarray(numbers, np.int64)]
        states = [np.empty((len(at), *leaf.shape), leaf.dtype) for leaf in self._leaves]
        rows = self._to_rows(states)
        for place, slot in enumerate(at.tolist()):
            if slot == NOBODY:
                for row in rows:
                    row[place] = 0
            else:
                self._read(slot, [row[place] for row in rows])
        return jax.tree.unflatten(self._structure, states)

    def scatter(
        self, numbers: Sequence[int] | np.ndarray, states: PyTree, own: Int[np.ndarray, " own"] | None = None
    ) -> None:
        """Give these K clients, each named once, new states; they are known from now on.

        With several processes `states` [K, …] are those that this process has, and `own` their places among `numbers`,
        all by default. The other processes write the rest.
        """
        at = np.asarray(numbers, np.int64)
        own = np.arange(len(at)) if own is None else own
        rows = self._to_rows([np.ascontiguousarray(leaf)[: len(own)] for leaf in jax.tree.leaves(states)])
        self.slots[at] = NOBODY  # their old records are free, unless a table that is kept names them
        tables = [self.slots, *self._kept.values()]
        taken = np.zeros(1 + max(int(table.max(initial=NOBODY)) for table in tables) + len(at), bool)
        for table in tables:
            taken[table[table != NOBODY]] = True
        slots = np.flatnonzero(~taken)[: len(at)]
        self._stamp(slots, self._writes + 1)
        for place, slot in enumerate(slots[own].tolist()):
            parts = [row[place] for row in rows]
            seal = np.frombuffer(self._digest(slot, parts), np.uint8)
            _transfer(os.pwritev, self._file, [*parts, seal], slot * self.record, self._name)
        self.slots[at] = slots

    def meet(self) -> None:
        """With several processes: go on when all have written, and read what they wrote."""
        if processes.count() == 1:
            return
        assert self._path is not None, "a temporary file is nobody else's"
        self.flush()
        processes.wait_for_all()
        # A network disk shows what others wrote from one's next opening of a file on.
        fresh = os.open(self._path, os.O_RDWR)
        os.dup2(fresh, self._file)
        os.close(fresh)

    def keep(self, name: Hashable, slots: Slots | None = None) -> Slots:
        """Keep the records as they are now, or as a table says, readable under a name; returns the table."""
        self._kept[name] = self.slots.copy() if slots is None else slots
        return self._kept[name]

    def let_go(self, name: Hashable) -> None:
        """Allow the records that were kept under this name to be overwritten."""
        self._kept.pop(name, None)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        with naming(self._name):
            os.fsync(self._file)

    def stamps(self, slots: Slots | None = None) -> Stamps:
        """Return the writes of the records that a table names; that of now, by default."""
        slots = self.slots if slots is None else slots
        stamps = np.zeros(len(slots), np.int64)
        stamps[slots != NOBODY] = self._written[slots[slots != NOBODY]]
        return stamps

    def load(self, slots: Slots, stamps: Stamps) -> None:
        """Go back to a table, which was written with these stamps; no other is kept."""
        self.slots = np.array(slots, np.int64)
        self._kept = {}
        self._writes, self._written = 0, np.zeros(0, np.int64)
        self.recall(slots, stamps)

    def recall(self, slots: Slots, stamps: Stamps) -> None:
        """Note which writes put the records of a table there."""
        known = np.asarray(slots) != NOBODY
        self._stamp(np.asarray(slots)[known], np.asarray(stamps)[known])

    def find_damage(self, *tables: Slots) -> str | None:
        """Read every record that these tables name; returns what is wrong with the first that is not as written."""
        states = self._to_rows([np.empty((1, *leaf.shape), leaf.dtype) for leaf in self._leaves])
        for slot in np.unique(np.concatenate([table[table != NOBODY] for table in tables])).tolist():
            try:
                self._read(slot, [row[0] for row in states])
            except DamagedError as error:
                return str(error)
        return None

    def _read(self, slot: int, parts: Sequence[np.ndarray]) -> None:
        """Fill the parts of a state from a slot, and check it."""
        seal, begin = np.empty(digests.DIGEST_SIZE, np.uint8), slot * self.record
        _transfer(os.preadv, self._file, [*parts, seal], begin, self._name)
        if seal.tobytes() != self._digest(slot, parts):
            raise DamagedError(
                f"{self._name} is damaged: the client's state at its bytes {begin:,} to {begin + self.record:,} is not "
                "the one that was written there"
            )

    def _digest(self, slot: int, parts: Sequence[np.ndarray]) -> bytes:
        return digests.digest_parts(parts, slot, int(self._written[slot]))

    def _stamp(self, slots: np.ndarray, stamps: Int[np.ndarray, " some"] | int) -> None:
        """Note by which writes these slots were filled."""
        more = int(slots.max(initial=NOBODY)) + 1 - len(self._written)
        if more > 0:  # by half at least, so that growing costs little
            self._written = np.pad(self._written, (0, max(more, len(self._written) // 2)))
        self._written[slots] = stamps
        self._writes = max(self._writes, int(np.max(stamps, initial=0)))

    def _to_rows(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """View the leaves of states [K, …] as bytes [K, bytes]."""
        return [
            state.reshape(len(state), leaf.size).view(np.uint8).reshape(len(state), size)
            for leaf, size, state in zip(self._leaves, self._bytes, states, strict=True)
        ]


def _transfer(how: Callable[..., int], file: int, parts: Sequence[np.ndarray], at: int, name: str) -> None:
    """Read or write the bytes of a record's parts, in order from a place of the file on, without a copy."""
    left = [part for part in parts if len(part)]
    while left:
        with naming(name):
            done = how(file, left[:MOST_PARTS], at)
        if not done:
            missing = sum(len(part) for part in left)
            raise DamagedError(f"{name} ends {missing:,} bytes before the end of a client's state; was it cut?")
        at += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if done:  # a call moves 2 GiB at most
            left[0] = left[0][done:]
