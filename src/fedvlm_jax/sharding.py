"""Where arrays live: a mesh with the axes `clients` and `model`, and the placements of the base and of a round.

Arrays of a cohort come as [waves, per_wave, …] and their second axis lies along `clients`; what the server holds is on
every device. The base is cut over `model` as its rules say (Megatron-LM, arXiv 1909.08053, for the shipped one) and is
the same along `clients`. Axes are Auto: the compiler places the reductions; over `clients` there is one.

A mesh may be made of several processes' devices, and a process reaches the arrays on its own alone. So each gives what
lies on its own devices (`own_places`, `place_own`, `fetch_own`), and what is on the host whole all of them give and get
alike (`place`, `fetch`). Devices that share a base are of one process, which so can use the base by itself
(`own_base`). With one process, everything is its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from fedvlm_jax.errors import UserError
from fedvlm_jax.tree import flatten, unflatten

__all__ = [
    "CLIENTS", "MODEL", "Cuts", "connect", "cut_base", "fetch", "fetch_own", "make_mesh", "own_base", "own_mesh",
    "own_places", "place", "place_base", "place_like", "place_own", "place_waves", "refuse_split_groups", "replicate",
    "wave_sharding",
]  # fmt: skip

CLIENTS = "clients"
MODEL = "model"

Cuts = tuple[tuple[str, tuple[int, ...]], ...]
"""Which weights are cut over `model`, a line each: a regular expression that a parameter's whole path matches, and the
axes, counted from the end, of which the first that divides is cut. The first line that matches holds."""


def make_mesh(clients: int | None = None, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices out as [clients, model], those of a process side by side; neighbours share a base.

    Args:
        clients: how many shares of the clients there are; by default as many as the devices allow.
        model: over how many devices the base is cut.
        devices: `jax.devices()` by default.

    Raises:
        UserError: there are fewer devices than asked for.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    clients = len(devices) // model if clients is None else clients
    if not 1 <= clients * model <= len(devices):
        asked = f"clients={clients}" + (f",model={model}" if model > 1 else "")
        raise UserError(
            f"--mesh {asked} takes {clients * model} devices: there are {len(devices)} ({devices[0].platform})"
        )
    return Mesh(np.asarray(devices[: clients * model]).reshape(clients, model), (CLIENTS, MODEL))


def connect(mesh: Mesh) -> None:
    """Reduce a number over each axis of a mesh, and over both; all processes must come at the same time.

    Devices of several processes connect when they first have something to exchange, and on a CPU they wait for each
    other for half a minute then, and never again. One that takes longer to compile its first program would be too late.
    """
    for axes in ((CLIENTS,), (MODEL,), (CLIENTS, MODEL)):
        where = NamedSharding(mesh, PartitionSpec(axes))
        count = int(np.prod([mesh.shape[axis] for axis in axes]))
        ones = jax.make_array_from_callback(
            (count,), where, lambda index, count=count: np.ones(count, np.float32)[index]
        )
        total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
        assert float(total) == count


def refuse_split_groups(mesh: Mesh) -> None:
    """Refuse a mesh on which a process has no device, or shares a base with another.

    Raises:
        UserError: that is so; with what to ask for.
    """
    processes, total = jax.process_count(), jax.device_count()
    if processes == 1:
        return
    clients, model = mesh.devices.shape
    if mesh.size != total:
        raise UserError(
            f"--mesh clients={clients},model={model} takes {mesh.size} of {total} devices: with {processes} processes "
            "it must take all of them; leave clients out of it, or start fewer processes"
        )
    if any(len({device.process_index for device in group}) > 1 for group in mesh.devices):
        own = jax.local_device_count()
        raise UserError(
            f"--mesh clients={clients},model={model}: a base may be cut over devices of one process only, and one "
            f"has {own}; choose a model that divides {own}"
        )


def cut_base(mesh: Mesh, shapes: Mapping[str, Any], cuts: Cuts) -> dict[str, Any]:
    """How a base lies on a mesh; touches no device.

    Args:
        mesh: the devices.
        shapes: the parameters, or their shapes, by nested name.
        cuts: of the model; a leaf that none of them names, or of which no named axis divides, is on every device.

    Returns:
        A tree of shardings.

    Raises:
        UserError: the mesh has more than one device along `model`, and no weight can be cut over them.
    """
    size = mesh.shape[MODEL]
    specs = {path: _choose_cut(path, leaf.shape, size, cuts) for path, leaf in flatten(shapes).items()}
    if size > 1 and not any(specs.values()):
        raise UserError(
            f"--mesh with model={size}: no weight of this base divides over {size} devices; choose another number, or "
            "leave model out"
        )
    return unflatten({path: NamedSharding(mesh, PartitionSpec(*spec)) for path, spec in specs.items()})


def _choose_cut(path: str, shape: Sequence[int], size: int, cuts: Cuts) -> tuple[str | None, ...]:
    """Mesh axes of an array's axes; none where it is whole on every device."""
    named = next((axes for pattern, axes in cuts if re.fullmatch(pattern, path)), ())
    axis = next((axis for axis in named if size > 1 and shape[axis] % size == 0), None)
    return () if axis is None else (*[None] * (len(shape) + axis), MODEL)


def place(tree: Any, where: Any) -> Any:
    """Place a tree that every process has whole, on the host or on the devices; each takes what its devices hold.

    Args:
        tree: of arrays; what lies right stays as it is.
        where: a sharding, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(_place, tree, jax.tree.broadcast(where, tree))


def _place(array: Any, where: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return _exchange(array, where)
    host = np.asarray(array)  # not `device_put`, which would have all processes compare what they have
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def place_own(tree: Any, where: NamedSharding) -> Any:
    """Place a tree of host arrays of which each process has what its own devices hold."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(lambda host: jax.make_array_from_process_local_data(where, np.asarray(host)), tree)


def own_places(mesh: Mesh, count: int) -> Int[np.ndarray, " some"]:
    """Of `count` places along `clients` those on this process's devices; all, where there is one process."""
    if jax.process_count() == 1:
        return np.arange(count)
    owners = [group[0].process_index for group in mesh.devices]
    return np.flatnonzero(np.repeat(owners, count // len(owners)) == jax.process_index())


def fetch(tree: Any) -> Any:
    """A tree on the host, whole, in every process; all of them must ask for it."""

    def whole(array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return array
        assert isinstance(array.sharding, NamedSharding)
        return _exchange(array, NamedSharding(array.sharding.mesh, PartitionSpec()))

    return jax.device_get(jax.tree.map(whole, tree))


def _exchange(array: jax.Array, where: NamedSharding) -> jax.Array:
    """Place an array that lies on several processes' devices, and wait for it.

    A CPU runs each collective on a thread of a small pool. Where processes are at different ones of many that are under
    way, all threads may wait for one that no thread is left for: two processes stood still in this way on busy cores.
    """
    return jax.block_until_ready(jax.device_put(array, where))


def fetch_own(tree: Any) -> Any:
    """What this process's devices hold of a tree of arrays [waves, per_wave, …], on the host: [waves, own, …]."""

    def join(array: jax.Array) -> np.ndarray:
        parts = {shard.index[1].start or 0: shard.data for shard in array.addressable_shards}  # alike along `model`
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=1)

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(join, tree)


def own_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that is this process's."""
    return Mesh(mesh.devices[own_places(mesh, len(mesh.devices))], mesh.axis_names)


def own_base(params: Any) -> Any:
    """The same base on this process's part of the mesh, for work that the others do not do; no weight is copied."""

    def localise(array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return array
        assert isinstance(array.sharding, NamedSharding)
        mesh = own_mesh(array.sharding.mesh)  # type: ignore[arg-type]
        held = {shard.device: shard.data for shard in array.addressable_shards}
        where = NamedSharding(mesh, array.sharding.spec)
        return jax.make_array_from_single_device_arrays(array.shape, where, [held[it] for it in mesh.devices.flat])

    return jax.tree.map(localise, params)


def place_base(mesh: Mesh, params: Mapping[str, Any], cuts: Cuts) -> dict[str, Any]:
    """Place a base as `cut_base` says, each weight straight onto its shards; what lies right stays as it is."""
    return place(dict(params), cut_base(mesh, params, cuts))


def place_like(params: Any, like: Any) -> Any:
    """Place arrays as those of another tree of the same form lie; those that the trees have in common stay."""
    return jax.tree.map(lambda new, old: new if new is old else place(new, old.sharding), params, like)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Place a tree on every device."""
    return place(tree, NamedSharding(mesh, PartitionSpec()))


def wave_sharding(mesh: Mesh) -> NamedSharding:
    """How arrays [waves, per_wave, …] lie: `per_wave` along `clients`."""
    return NamedSharding(mesh, PartitionSpec(None, CLIENTS))


def place_waves(mesh: Mesh, tree: Any) -> Any:
    """Place a tree of host arrays [waves, own places, …]."""
    return place_own(tree, wave_sharding(mesh))
