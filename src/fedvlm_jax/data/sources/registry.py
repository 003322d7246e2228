"""The named data sets, each a file of this folder with a module-level `DATASET`, and the reading of any data set.

A source's options are `Options` in its file; those of a path are `parquet.Options`.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fedvlm_jax.data.config import PARTITIONS, DataOptions, Partition
from fedvlm_jax.data.sources import parquet
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import list_options

if TYPE_CHECKING:
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table


class NamedSet(NamedTuple):
    """A data set that `--data NAME` finds.

    Attributes:
        name: as the user types it.
        summary: one line for listings.
        options: the class of its options.
        read: opens the rows; the options say where a set lies that does not ship, and which revision of it is wanted.
        federate: (table, options, seed) -> Federation; by the table's columns where it is None.
    """

    name: str
    summary: str
    options: type[DataOptions]
    read: "Callable[[Any], Table]"
    federate: "Callable[[Table, Any, int], Federation] | None" = None


@functools.cache
def find_sets() -> MappingProxyType[str, NamedSet]:
    """Collect name -> set, for every module of `fedvlm_jax.data.sources` that defines `DATASET`.

    Raises:
        RuntimeError: two modules claim one name.
    """
    found: dict[str, NamedSet] = {}
    for module in _list_modules():
        entry = getattr(importlib.import_module(f"{__package__}.{module}"), "DATASET", None)
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
    from fedvlm_jax.data.parquet_to_arrow import read_parquet

    options = make_options(source) if isinstance(source, str) else source
    known, path = find_sets(), Path(options.source).expanduser()
    root = options.image_root and options.image_root.expanduser() if isinstance(options, parquet.Options) else None
    if root is not None and not root.is_dir():
        raise UserError(f"--data.image-root {root} is no folder; expected the one that holds the images.")
    if options.source not in known and not path.exists():
        raise UserError(
            f"--data {options.source!r} is neither a named data set nor a path that exists; named sets are "
            f"{', '.join(sorted(known))}; else give a parquet file or a folder of parquet files."
        )
    table = known[options.source].read(options) if options.source in known else read_parquet(path)
    return dataclasses.replace(table, image_root=root, max_image_pixels=options.max_image_pixels)


def find_options(source: str) -> type[DataOptions]:
    """Return the class of a source's options; of the files in this folder it imports that one alone.

    >>> find_options("rlaif-v").__module__, find_options("./shards").__module__
    ('fedvlm_jax.data.sources.rlaif_v', 'fedvlm_jax.data.sources.parquet')
    """
    stem = source.replace("-", "_")
    named = "_" not in source and stem not in ("parquet", "registry") and stem in _list_modules()
    return importlib.import_module(f"{__package__}.{stem if named else 'parquet'}").Options


def find_partition(options: type[DataOptions], kind: str) -> type[Partition]:
    """Return the class of a partition's options; what is natural the source says.

    Raises:
        UserError: there is no such partition.
    """
    natural = next(field for field in dataclasses.fields(options) if field.name == "partition").default_factory
    kinds = {**PARTITIONS, "natural": natural}
    if kind not in kinds:
        raise UserError(f"--data.partition {kind}: there are {', '.join(kinds)}")
    return kinds[kind]  # type: ignore[return-value]  # a class is its own factory


def make_options(source: str = "emoji", partition: str = "natural", **numbers: Any) -> DataOptions:
    """Make the options of a source with a partition; each number goes to the one of the two that has it.

    Raises:
        UserError: neither has it, or a value cannot be.

    >>> make_options("emoji", "dirichlet", alpha=0.1, images_per_client=20).partition.alpha
    0.1
    """
    kind = find_options(source)
    of_partition = find_partition(kind, partition)
    names = {field.name for field in dataclasses.fields(of_partition)}
    numbers = {"by" if name == "partition_by" else name: value for name, value in numbers.items()}
    strange = sorted(numbers.keys() - names - {field.name for field in dataclasses.fields(kind)})
    if strange:
        flag = "--data." + ("partition-by" if strange[0] == "by" else strange[0].replace("_", "-"))
        raise UserError(f"{flag} belongs to {', '.join(list_owners(flag)) or 'nothing'}, and not to {source}")
    cut = of_partition(**{name: value for name, value in numbers.items() if name in names})
    rest = {name: value for name, value in numbers.items() if name not in names}
    return kind(source=source, partition=cut, **rest)


def list_owners(flag: str) -> list[str]:
    """List the choices that have an option: sources beside what all of them have, and partitions.

    >>> list_owners("--data.alpha")
    ['--data emoji', '--data.partition dirichlet', '--data.partition quantity']
    """
    owners = {f"--data {name}": (entry.options(), DataOptions()) for name, entry in find_sets().items()}
    owners["parquet files"] = find_options("")(), DataOptions()
    owners |= {f"--data.partition {kind}": (options(), Partition()) for kind, options in PARTITIONS.items()}
    return [name for name, (has, all_have) in owners.items() if flag in _list_flags(has) - _list_flags(all_have)]


def _list_flags(options: DataOptions | Partition) -> set[str]:
    return {option.flag for option in list_options(options, "data")}


@functools.cache
def _list_modules() -> tuple[str, ...]:
    folder = str(Path(__file__).parent)
    return tuple(module.name for module in pkgutil.iter_modules([folder]))
