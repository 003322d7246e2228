"""The places of arrays on a mesh with the axes `clients` and `model`: shardings of the base and of a round.

Arrays of a cohort come as [waves, per_wave, …] and their second axis lies along `clients`; what the server holds is on
every device. The base is cut over `model` as its rules say (Megatron-LM, arXiv 1909.08053, for the shipped one) and is
the same along `clients`. Axes are Auto: the compiler places the reductions; over `clients` there is one.

A mesh may be made of several processes' devices, and a process reaches only the arrays on its local ones. So each gives
what lies there (`local_places`, `place_local`, `fetch_local`), and what is on the host whole all of them give and get
alike (`place`, `fetch`). Devices that share a base are of one process, which so can use the base by itself
(`local_base`). With one process, everything is local.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from fedvlm_jax.distributed.mesh import CLIENTS, MODEL
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.tree import flatten, unflatten


class Cut(NamedTuple):
    """A rule of which weights are cut over `model`.

    Attributes:
        pattern: regular expression that a parameter's whole path matches.
        axes: counted from the end, of which the first that divides is cut.
        units: parts of that axis that stay whole, such as heads; by default its numbers.
    """

    pattern: str
    axes: tuple[int, ...]
    units: int | None = None


Cuts = tuple[Cut, ...]
"""The rules of a model; the first whose pattern matches holds."""


def cut_base(mesh: Mesh, shapes: Mapping[str, Any], cuts: Cuts) -> dict[str, Any]:
    """Shardings of a base of these shapes, as a tree; touches no device.

    A leaf that no line of `cuts` names, or of which no named axis divides, is on every device.

    Raises:
        UserError: the mesh has more than one device along `model`, and no weight can be cut over them.
    """
    size, specs = mesh.shape[MODEL], dict[str, tuple[str | None, ...]]()
    for path, leaf in flatten(shapes).items():
        cut = next((cut for cut in cuts if re.fullmatch(cut.pattern, path)), Cut("", ()))
        axis = next((axis for axis in cut.axes if size > 1 and (cut.units or leaf.shape[axis]) % size == 0), None)
        specs[path] = () if axis is None else (*[None] * (len(leaf.shape) + axis), MODEL)
    if size > 1 and not any(specs.values()):
        raise UserError(
            f"--mesh with model={size}: no weight of this base divides over {size} devices; choose another number, or "
            "leave model out"
        )
    return unflatten({path: NamedSharding(mesh, PartitionSpec(*spec)) for path, spec in specs.items()})


def place(tree: Any, where: Any) -> Any:
    """Place a tree that every process has whole, on the host or on the devices; each takes what its devices hold.

    `where` is a sharding, or a tree of them; what lies right stays as it is.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    def put(array: Any, where: NamedSharding) -> jax.Array:
        if _is_shared(array):
            return _exchange(array, where)
        host = np.asarray(array)  # not `device_put`, which would have all processes compare what they have
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(where, tree))


def place_local(tree: Any, where: NamedSharding) -> Any:
    """Place a tree of host arrays of which each process has what its local devices hold."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(lambda host: jax.make_array_from_process_local_data(where, np.asarray(host)), tree)


def local_places(mesh: Mesh, count: int) -> Int[np.ndarray, " some"]:
    """Select of `count` places along `clients` those on this process's devices; all, where there is one process.

    >>> from fedvlm_jax.distributed.mesh import make_mesh
    >>> local_places(make_mesh(1), 3).tolist()
    [0, 1, 2]
    """
    if jax.process_count() == 1:
        return np.arange(count)
    owners = [group[0].process_index for group in mesh.devices]
    return np.flatnonzero(np.repeat(owners, count // len(owners)) == jax.process_index())


def fetch(tree: Any) -> Any:
    """A tree on the host, whole, in every process; all of them must ask for it."""

    def whole(array: Any) -> Any:
        if not _is_shared(array) or array.is_fully_replicated:
            return array
        assert isinstance(array.sharding, NamedSharding)
        return _exchange(array, NamedSharding(array.sharding.mesh, PartitionSpec()))

    return jax.device_get(jax.tree.map(whole, tree))


def _is_shared(array: Any) -> TypeGuard[jax.Array]:
    # Some of it lies on another process's devices.
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _exchange(array: jax.Array, where: NamedSharding) -> jax.Array:
    # Waits for the array. A CPU runs each collective on a thread of a small pool: where processes are at different ones
    # of many that are under way, all threads may wait for one that no thread is left for. Two processes stood still in
    # this way on busy cores.
    return jax.block_until_ready(jax.device_put(array, where))


def fetch_local(tree: Any) -> Any:
    """A tree of arrays [waves, per_wave, …] on the host, of which each process gets its part [waves, local, …]."""

    def join(array: jax.Array) -> np.ndarray:
        parts = {shard.index[1].start or 0: shard.data for shard in array.addressable_shards}  # alike along `model`
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=1)

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(join, tree)


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that is this process's."""
    return Mesh(mesh.devices[local_places(mesh, len(mesh.devices))], mesh.axis_names)


def local_base(params: Any) -> Any:
    """A base on this process's part of the mesh alone, for work that the others do not do; no weight is copied."""

    def localise(array: Any) -> Any:
        if not _is_shared(array):
            return array
        assert isinstance(array.sharding, NamedSharding)
        mesh = local_mesh(array.sharding.mesh)  # type: ignore[arg-type]
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
    """The sharding of arrays [waves, per_wave, …]: `per_wave` along `clients`."""
    return NamedSharding(mesh, PartitionSpec(None, CLIENTS))


def place_waves(mesh: Mesh, tree: Any) -> Any:
    """Place a tree of host arrays [waves, local places, …]."""
    return place_local(tree, wave_sharding(mesh))


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Lay an array out over the mesh in whose context a program is traced; without one it stays as it is.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones(3), "clients").tolist()
    [1.0, 1.0, 1.0]

    Args:
        array: of a program that is being traced, inside of `jax.sharding.use_abstract_mesh`.
        axes: of the mesh, along which its first axes lie; none: it is whole on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*axes))
