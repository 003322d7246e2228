"""Where arrays live: a mesh with an axis `clients`, and the placements of a round.

The base and what the server holds are on every device; arrays of a cohort come as [waves, per_wave, …] and their second
axis lies along `clients`. Axes are Auto: the compiler places the reduction, and there is one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedvlm_jax.errors import UserError

__all__ = ["CLIENTS", "MODEL", "make_mesh", "place_waves", "replicate", "wave_sharding"]

CLIENTS = "clients"
MODEL = "model"


def make_mesh(clients: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices out along `clients` (and an axis `model` of size 1).

    Args:
        clients: how many devices; all there are by default.
        devices: `jax.devices()` by default.

    Raises:
        UserError: there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices) if clients is None else clients
    if not 1 <= count <= len(devices):
        raise UserError(f"--system.mesh-clients {count}: there are {len(devices)} devices ({devices[0].platform})")
    return Mesh(np.asarray(devices[:count]).reshape(count, 1), (CLIENTS, MODEL))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Place a tree on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def wave_sharding(mesh: Mesh) -> NamedSharding:
    """How arrays [waves, per_wave, …] lie: `per_wave` along `clients`."""
    return NamedSharding(mesh, PartitionSpec(None, CLIENTS))


def place_waves(mesh: Mesh, tree: Any) -> Any:
    """Place a tree of host arrays [waves, per_wave, …]."""
    return jax.device_put(tree, wave_sharding(mesh))
