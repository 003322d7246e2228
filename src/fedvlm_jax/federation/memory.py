"""What a compiled round needs of a device's memory, as its compiler says, and how many clients fit side by side."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fedvlm_jax.errors import UserError
from fedvlm_jax.sharding import CLIENTS

__all__ = [
    "GIB",
    "USABLE",
    "Footprint",
    "TooLargeError",
    "count_device_bytes",
    "find_wave",
    "measure",
    "read_device_bytes",
]

GIB = 2**30

USABLE = 0.9
"""Share of a device's memory that a round may take: the rest is for evaluation's arrays and what fragments."""

T = TypeVar("T")


class TooLargeError(Exception):
    """The compiler itself refused: the program does not fit on the device."""


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


def measure(compiled: Any, base: PyTree, mesh: Mesh, wave: int) -> Footprint:
    """Read a compiled round's footprint.

    Args:
        compiled: of `jax.jit(…).lower(…).compile()`.
        base: the base as it is placed.
        mesh: of the round.
        wave: clients side by side, over all devices.
    """
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return Footprint(count_device_bytes(base), total - stats.alias_size_in_bytes, wave // mesh.shape[CLIENTS])


def count_device_bytes(placed: PyTree) -> int:
    """Bytes of a placed tree on each device: a sharded array's shard, a replicated one's whole."""

    def count(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
        size = leaf.dtype.itemsize
        for length in shape:
            size *= length
        return size

    return sum(count(leaf) for leaf in jax.tree.leaves(placed))


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
    try_wave: Callable[[int], tuple[T, Footprint]], wave: int, devices: int, limit: int | None
) -> tuple[T, Footprint]:
    """The widest wave, from `wave` downwards, whose round fits.

    Args:
        try_wave: wave -> what was made for it, and its footprint; raises `TooLargeError` where the compiler refuses.
        wave: where to start, a multiple of `devices`.
        devices: over which the wave is spread.
        limit: bytes of a device, all of which may be used; None: whatever compiles, fits.

    Raises:
        UserError: not even one client fits on a device.
    """
    while True:
        try:
            made, footprint = try_wave(wave)
        except TooLargeError as error:
            made, footprint, told = None, None, str(error)
        else:
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
        wave = _narrow(wave, devices, footprint, limit)


def _narrow(wave: int, devices: int, footprint: Footprint | None, limit: int | None) -> int:
    """As many clients a device as should fit by their footprint, or half as many where there is none."""
    clients = wave // devices
    if footprint is None or limit is None or not footprint.per_client:
        return devices * max(1, clients // 2)
    fit = int((USABLE * limit - footprint.base) // footprint.per_client)
    return devices * max(1, min(fit, clients - 1))
