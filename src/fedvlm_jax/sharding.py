"""Where arrays live: a mesh with the axes `clients` and `model`, and the placements of the base and of a round.

Arrays of a cohort come as [waves, per_wave, …] and their second axis lies along `clients`; what the server holds is on
every device. The base is cut over `model` as its rules say (Megatron-LM, arXiv 1909.08053, for the shipped one) and is
the same along `clients`. Axes are Auto: the compiler places the reductions; over `clients` there is one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedvlm_jax.errors import UserError
from fedvlm_jax.tree import flatten, unflatten

__all__ = [
    "CLIENTS", "MODEL", "Cuts", "cut_base", "make_mesh", "place_base", "place_like", "place_waves", "replicate",
    "wave_sharding",
]  # fmt: skip

CLIENTS = "clients"
MODEL = "model"

Cuts = tuple[tuple[str, tuple[int, ...]], ...]
"""Which weights are cut over `model`, a line each: a regular expression that a parameter's whole path matches, and the
axes, counted from the end, of which the first that divides is cut. The first line that matches holds."""


def make_mesh(clients: int | None = None, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices out as [clients, model]; neighbours share a base.

    Args:
        clients: how many shares of the clients there are; by default as many as the devices allow.
        model: over how many devices the base is cut.
        devices: `jax.devices()` by default.

    Raises:
        UserError: there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    clients = len(devices) // model if clients is None else clients
    if not 1 <= clients * model <= len(devices):
        asked = f"clients={clients}" + (f",model={model}" if model > 1 else "")
        raise UserError(
            f"--mesh {asked} takes {clients * model} devices: there are {len(devices)} ({devices[0].platform})"
        )
    return Mesh(np.asarray(devices[: clients * model]).reshape(clients, model), (CLIENTS, MODEL))


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


def place_base(mesh: Mesh, params: Mapping[str, Any], cuts: Cuts) -> dict[str, Any]:
    """Place a base as `cut_base` says, each weight straight onto its shards; what lies right stays as it is."""
    return jax.device_put(dict(params), cut_base(mesh, params, cuts))


def place_like(params: Any, like: Any) -> Any:
    """Place arrays as those of another tree of the same form lie; those that the trees have in common stay."""
    return jax.tree.map(lambda new, old: new if new is old else jax.device_put(new, old.sharding), params, like)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Place a tree on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def wave_sharding(mesh: Mesh) -> NamedSharding:
    """How arrays [waves, per_wave, …] lie: `per_wave` along `clients`."""
    return NamedSharding(mesh, PartitionSpec(None, CLIENTS))


def place_waves(mesh: Mesh, tree: Any) -> Any:
    """Place a tree of host arrays [waves, per_wave, …]."""
    return jax.device_put(tree, wave_sharding(mesh))
