"""The named data sets: each is one file of this folder with a module-level `DATASET`, found by looking.

Such a file imports nothing heavy at its top, because the command line lists the names.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fedvlm_jax.data.config import DataOptions
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table

__all__ = ["NamedSet", "find_sets"]


class NamedSet(NamedTuple):
    """A data set that `--data NAME` finds.

    Attributes:
        name: what the user types.
        summary: one line for listings.
        read: opens the rows; the options say where a set lies that does not ship, and which revision of it is wanted.
        federate: (table, options, seed) -> Federation.
        options: those of `options.NOT_EVERYWHERE` that mean something for this set; the others are refused.
    """

    name: str
    summary: str
    read: "Callable[[DataOptions], Table]"
    federate: "Callable[[Table, DataOptions, int], Federation]"
    options: frozenset[str]


@functools.cache
def find_sets() -> MappingProxyType[str, NamedSet]:
    """Name -> set, for every module of `fedvlm_jax.data.sources` that defines `DATASET`.

    Raises:
        RuntimeError: two modules claim one name.
    """
    import fedvlm_jax.data.sources as room

    found: dict[str, NamedSet] = {}
    for module in pkgutil.iter_modules(room.__path__):
        entry = getattr(importlib.import_module(f"{room.__name__}.{module.name}"), "DATASET", None)
        if isinstance(entry, NamedSet):
            if entry.name in found:
                raise RuntimeError(f"two modules of fedvlm_jax.data.sources define the data set {entry.name!r}")
            found[entry.name] = entry
    return MappingProxyType(found)
