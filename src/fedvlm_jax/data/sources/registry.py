"""The named data sets, each a file of this folder with a module-level `DATASET`, and the reading of any data set.

Such a file imports nothing heavy at its top, because the command line lists the names.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from fedvlm_jax.errors import UserError

if TYPE_CHECKING:
    from fedvlm_jax.data.config import DataOptions
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table

__all__ = ["NamedSet", "find_sets", "read_table"]


class NamedSet(NamedTuple):
    """A data set that `--data NAME` finds.

    Attributes:
        name: as the user types it.
        summary: one line for listings.
        read: opens the rows; the options say where a set lies that does not ship, and which revision of it is wanted.
        federate: (table, options, seed) -> Federation.
        options: those of `config.NOT_EVERYWHERE` that mean something for this set; the others are refused.
    """

    name: str
    summary: str
    read: "Callable[[DataOptions], Table]"
    federate: "Callable[[Table, DataOptions, int], Federation]"
    options: frozenset[str]


@functools.cache
def find_sets() -> MappingProxyType[str, NamedSet]:
    """Collect name -> set, for every module of `fedvlm_jax.data.sources` that defines `DATASET`.

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


def read_table(source: "str | DataOptions") -> "Table":
    """Open a named data set, a parquet file, or a folder of parquet shards.

    Args:
        source: a name that `find_sets` knows, or a path; or the options that hold it, which also say where a set lies
            that does not ship. A name wins over a path; `./name` is always a path.

    Raises:
        UserError: neither such a name nor such a path, or the files do not hold what is needed.
    """
    from fedvlm_jax.data.config import DataOptions
    from fedvlm_jax.data.parquet_to_arrow import read_parquet

    options = DataOptions(source=source) if isinstance(source, str) else source
    known, path = find_sets(), Path(options.source).expanduser()
    root = options.image_root and options.image_root.expanduser()
    if root is not None and not root.is_dir():
        raise UserError(f"--data.image-root {options.image_root} is no folder; expected the one that holds the images.")
    if options.source not in known and not path.exists():
        raise UserError(
            f"--data {options.source!r} is neither a named data set nor a path that exists; named sets are "
            f"{', '.join(sorted(known))}; else give a parquet file or a folder of parquet files."
        )
    table = known[options.source].read(options) if options.source in known else read_parquet(path)
    return dataclasses.replace(table, image_root=root, max_image_pixels=options.max_image_pixels)
