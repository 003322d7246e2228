"""Memory of a device that a compiled round needs, as its compiler says, and how many clients fit side by side."""

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import balance_wave

GIB = 2**30
USABLE = 0.9  # share of a device's memory that a round may take: the rest is for evaluation and what fragments

T = TypeVar("T")


class TooLargeError(Exception):
    """The compiler itself refused: the program does not fit on the device."""

    @property
    def needed(self) -> int | None:
        """Bytes that the program would take at least, where the compiler's words tell.

        >>> TooLargeError("RESOURCE_EXHAUSTED: Used 2.00G of 1.50G hbm.").needed == 2 * GIB
        True
        """
        found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", str(self))
        if found is None:
            return None
        number, unit = (part for part in found.groups() if part)
        return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


class Footprint(NamedTuple):
    """Bytes of a device that a round needs."""

    base: int  # the frozen base
    total: int  # at most at a time, the base included
    clients: int  # trained side by side on the device

    @property
    def per_client(self) -> int:
        """Bytes of a client, with its share of what does not depend on clients.

        >>> Footprint(base=100, total=160, clients=3).per_client
        20
        """
        return max(0, self.total - self.base) // self.clients


class Memory(NamedTuple):
    """A program's memory on one device as its compiler has it: `memory_analysis()`, field by field, in bytes."""

    arguments: int  # what the program is given and reads, as the device lays it out
    outputs: int  # what it returns
    aliases: int  # of that, what is written over arguments (donated ones)
    temporaries: int  # scratch
    code: int  # the program itself
    peak: int  # the most at a time, as the compiler has it

    @property
    def total(self) -> int:
        """Bytes that must be free for it: all of it side by side, or the peak where the compiler puts that higher."""
        return max(self.peak, self.arguments + self.outputs - self.aliases + self.temporaries + self.code)


def read_memory(compiled: Any) -> Memory:
    """Read the analysis of what `jax.jit(…).lower(…).compile()` returns."""
    stats = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    sizes = [getattr(stats, f"{kind}_size_in_bytes") for kind in kinds]
    return Memory._make([*sizes, stats.peak_memory_in_bytes])


def measure(compiled: Any, base: PyTree, mesh: Mesh, wave: int, unread: int = 0) -> Footprint:
    """Read a compiled round's footprint: the base as it is placed, a wave over all devices, and `count_unread`."""
    return Footprint(count_device_bytes(base), read_memory(compiled).total + unread, wave // mesh.shape[CLIENTS])


def count_device_bytes(placed: PyTree) -> int:
    """Count the bytes of a placed tree, or of its shapes, on each device: of a sharded array those of a shard.

    >>> count_device_bytes({"w": jax.ShapeDtypeStruct((4, 2), "float32")})
    32
    """
    total = 0
    for leaf in jax.tree.leaves(placed):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def count_unread(compiled: Any, arguments: tuple[Any, ...]) -> int:
    """Count the bytes on each device of arguments that the program does not read.

    The compiler does not count them: the vision tower, where its features are kept.
    """
    # None stands for what is not read, and in the arguments for what there is not: both keep their places.
    kept, leaves = (
        jax.tree.leaves(part, is_leaf=lambda one: one is None) for part in (compiled.input_shardings[0], arguments)
    )
    return count_device_bytes([leaf for leaf, where in zip(leaves, kept, strict=True) if where is None])


def read_device_bytes(mesh: Mesh) -> int | None:
    """Read the memory of a device of this process, on a CPU its share of the machine's; None where nobody says."""
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
    """Find the widest wave, from `wave` downwards, whose round fits, and of those the narrowest in as many waves.

    Waves, and so `wave`, are multiples of `devices`.

    `try_wave` returns what was made for a wave, with its footprint; it raises `TooLargeError` if the compiler refuses.
    `limit` is bytes of a device, all of which may be used; None: whatever compiles, fits.

    Raises:
        UserError: not even one client fits on a device.

    >>> find_wave(lambda wave: (wave, Footprint(20, 20 + 10 * wave, wave)), wave=16, cohort=100, devices=1, limit=100)
    (7, Footprint(base=20, total=90, clients=7))
    """
    seen: list[Footprint] = []
    while True:
        try:
            made, footprint = try_wave(wave)
        except TooLargeError as error:
            footprint, reason = None, str(error)
        else:
            seen.append(footprint)
            if limit is None or footprint.total <= USABLE * limit:
                return made, footprint
            reason = f"it takes {footprint.total / GIB:.1f} GiB, {footprint.base / GIB:.1f} of them the base"
        if wave <= devices:
            room = f" of {limit / GIB:.1f} GiB" if limit else ""
            raise UserError(
                f"a round with one client on a device{room} does not fit: {reason}. Take smaller batches "
                "(--train.batch-size), --system.remat, --system.compute bfloat16, or spread the base over devices "
                "(--mesh clients=N,model=M)"
            )
        wave = balance_wave(devices * _narrow(wave // devices, seen if footprint else [], limit), cohort, devices)


def _narrow(clients: int, seen: list[Footprint], limit: int | None) -> int:
    """Return how many clients a device should hold by the last footprints; half as many as now where there are none.

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
