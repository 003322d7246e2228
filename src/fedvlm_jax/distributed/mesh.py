"""The mesh of devices, with the axes `clients` and `model`: laid out, connected, and refused where processes differ."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedvlm_jax.distributed.mesh_option import MeshShape
from fedvlm_jax.errors import UserError, format_count

CLIENTS = "clients"
MODEL = "model"


def make_mesh(clients: int | None = None, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices, all by default, out as [clients, model], those of a process side by side; neighbours share a base.

    `clients`, shares of the clients, are as many as the devices allow by default; over `model` the base is cut.

    Raises:
        UserError: there are fewer devices than asked for.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    shape = MeshShape(len(devices) // model if clients is None else clients, model)
    if not 1 <= shape.devices <= len(devices):
        raise UserError(
            f"--mesh {shape} takes {format_count(shape.devices, 'device')}: there are {len(devices)} "
            f"({devices[0].platform})"
        )
    return Mesh(np.asarray(devices[: shape.devices]).reshape(shape), (CLIENTS, MODEL))


def connect(mesh: Mesh) -> None:
    """Reduce a number over each axis of a mesh, and over both; all processes must come at the same time.

    Devices of several processes connect when they first have something to exchange, and on a CPU they wait for each
    other for half a minute then, and never again. One that takes longer to compile its first program would be too late.
    """
    for axes in ((CLIENTS,), (MODEL,), (CLIENTS, MODEL)):
        ones = np.ones([mesh.shape[axis] for axis in axes], np.float32).ravel()
        where = NamedSharding(mesh, PartitionSpec(axes))
        placed = jax.make_array_from_callback(ones.shape, where, lambda index, ones=ones: ones[index])
        total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(placed)
        assert float(total) == ones.size


def refuse_split_groups(mesh: Mesh) -> None:
    """Refuse a mesh on which a process has no device, or shares a base with another; say what to ask for instead.

    Raises:
        UserError: that is so; with what to ask for.
    """
    processes, total = jax.process_count(), jax.device_count()
    if processes == 1:
        return
    clients, model = mesh.devices.shape
    if mesh.size != total:
        raise UserError(
            f"--mesh clients={clients},model={model} takes {mesh.size} of "
            f"{format_count(total, 'device')}: with {processes} processes "
            "it must take all of them; leave clients out of it, or start fewer processes"
        )
    if any(len({device.process_index for device in group}) > 1 for group in mesh.devices):
        local = jax.local_device_count()
        raise UserError(
            f"--mesh clients={clients},model={model}: a base may be cut over devices of one process only, and one "
            f"has {local}; choose a model that divides {local}"
        )
