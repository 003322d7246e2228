"""What a compiled round needs of a device's memory, as its compiler says, and how many clients fit side by side."""

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fedvlm_jax.distributed.sharding import CLIENTS
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import balance_wave

GIB = 2**30

USABLE = 0.9
"""Share of a device's memory that a round may take: the rest is for evaluation's arrays and what fragments."""

T = TypeVar("T")


class TooLargeError(Exception):
    """The compiler itself refused: the program does not fit on the device."""

    @property
    def needed(self) -> int | None:
        """Bytes that the program would take at least, where the compiler's words tell."""
        told = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", str(self))
        if told is None:
            return None
        number, unit = (part for part in told.groups() if part)
        return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


class Footprint(NamedTuple):
    """Bytes of a device that a round needs.

    Attributes:
        base: the frozen base.
        total: at most at a time, the base included.
        clients: trained side by side on the device.
    """

    base: int
    total: int
    clients: int

    @property
    def per_client(self) -> int:
        """What a client costs, with its share of what does not depend on clients."""
        return max(0, self.total - self.base) // self.clients


class Memory(NamedTuple):
    """What a compiler says of a program's memory on one device: its `memory_analysis()`, field by field, in bytes.

    Attributes:
        arguments: what the program is given and reads, as the device lays it out.
        outputs: what it returns.
        aliases: of that, what is written over arguments (donated ones).
        temporaries: scratch.
        code: the program itself.
        peak: the most at a time, as the compiler has it.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """What must be free for it: all of it side by side, or the peak where the compiler puts that higher."""
        return max(self.peak, self.arguments + self.outputs - self.aliases + self.temporaries + self.code)


def read_memory(compiled: Any) -> Memory:
    """Read the analysis of what `jax.jit(…).lower(…).compile()` returns."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliases=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


def measure(compiled: Any, base: PyTree, mesh: Mesh, wave: int, unread: int = 0) -> Footprint:
    """Read a compiled round's footprint.

    Args:
        compiled: of `jax.jit(…).lower(…).compile()`.
        base: the base as it is placed.
        mesh: of the round.
        wave: clients side by side, over all devices.
        unread: of `count_unread`.
    """
    return Footprint(count_device_bytes(base), read_memory(compiled).total + unread, wave // mesh.shape[CLIENTS])


def count_device_bytes(placed: PyTree) -> int:
    """Bytes of a placed tree, or of its shapes, on each device: a sharded array's shard, a replicated one's whole."""

    def count(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        size = leaf.dtype.itemsize
        for length in leaf.shape if sharding is None else sharding.shard_shape(leaf.shape):
            size *= length
        return size

    return sum(count(leaf) for leaf in jax.tree.leaves(placed))


def count_unread(compiled: Any, arguments: tuple[Any, ...]) -> int:
    """Count the bytes on each device of arguments that the program does not read.

    The compiler does not count them: the vision tower, where its features are kept.
    """
    kept = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda one: one is None)
    leaves = jax.tree.leaves(arguments)
    return count_device_bytes([leaf for leaf, where in zip(leaves, kept, strict=True) if where is None])


def read_device_bytes(mesh: Mesh) -> int | None:
    """The memory of a device of this process, or on a CPU its share of the machine's; None where nobody says."""
    device = mesh.local_devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.devices.size
    except (AttributeError, OSError, ValueError):
        return None


def find_wave(
    try_wave: Callable[[int], tuple[T, Footprint]], wave: int, cohort: int, devices: int, limit: int | None
) -> tuple[T, Footprint]:
    """The widest wave, from `wave` downwards, whose round fits, and of those the narrowest in as many waves.

    Args:
        try_wave: wave -> what was made for it, and its footprint; raises `TooLargeError` where the compiler refuses.
        wave: where to start, a multiple of `devices`.
        cohort: clients a round.
        devices: over which the wave is spread.
        limit: bytes of a device, all of which may be used; None: whatever compiles, fits.

    Raises:
        UserError: not even one client fits on a device.
    """
    seen: list[Footprint] = []
    while True:
        try:
            made, footprint = try_wave(wave)
        except TooLargeError as error:
            made, footprint, told = None, None, str(error)
        else:
            seen.append(footprint)
            if limit is None or footprint.total <= USABLE * limit:
                return made, footprint
            told = f"it takes {footprint.total / GIB:.1f} GiB, {footprint.base / GIB:.1f} of them the base"
        if wave <= devices:
            room = f" of {limit / GIB:.1f} GiB" if limit else ""
            raise UserError(
                f"a round with one client on a device{room} does not fit: {told}. Take smaller batches "
                "(--train.batch-size), --system.remat, --system.compute bfloat16, or spread the base over devices "
                "(--mesh clients=N,model=M)"
            )
        wave = balance_wave(devices * _narrow(wave // devices, seen if footprint else [], limit), cohort, devices)


def _narrow(clients: int, seen: list[Footprint], limit: int | None) -> int:
    """As many clients a device as should fit by the last footprints, or half as many where there are none.

    What a cohort reads lies on the devices whatever the wave, so the line that leads to what fits is the one through
    two footprints; the first guess has only one, and the base. A round of one wave and one of several differ by more
    than clients, though, and a line that is too flat for that leads nearly to nothing: so it is followed half way down
    at most.
    """
    if not seen or limit is None or not seen[-1].per_client:
        return max(1, clients // 2)
    last, slope, least = seen[-1], float(seen[-1].per_client), 1
    if len(seen) > 1 and seen[-2].total > last.total:
        slope, least = (seen[-2].total - last.total) / (seen[-2].clients - last.clients), max(1, clients // 2)
    fit = last.clients + math.floor((USABLE * limit - last.total) / slope)
    return max(least, min(fit, clients - 1))
