"""Data sets by name, a file of this folder each with the class of its options, and the reading of any data set."""

import dataclasses
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm_jax.data.config import PARTITIONS, DataOptions, Partition
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import list_options

if TYPE_CHECKING:
    from fedvlm_jax.data.table import Table


@functools.cache
def list_sets() -> tuple[str, ...]:
    """List the names of data sets, which are those of their files."""
    modules = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(name.replace("_", "-") for name in sorted(modules) if name not in ("parquet", "registry"))


def find_options(source: str) -> type[DataOptions]:
    """Return the class of a source's options, which are those of parquet for a path; it imports that file alone.

    >>> find_options("rlaif-v").__module__, find_options("./shards").__module__
    ('fedvlm_jax.data.sources.rlaif_v', 'fedvlm_jax.data.sources.parquet')
    """
    module = source.replace("-", "_") if source in list_sets() else "parquet"
    return importlib.import_module(f"{__package__}.{module}").Options


def read_table(source: str | DataOptions) -> "Table":
    """Open a named data set, a parquet file, or a folder of parquet shards. A name wins over a path; `./name` is none.

    Raises:
        UserError: neither such a name nor such a path, or the files do not hold what is needed.
    """
    options = make_options(source) if isinstance(source, str) else source
    check_source(options)
    return dataclasses.replace(options.read(), max_image_pixels=options.max_image_pixels)


def check_source(options: DataOptions) -> None:
    """Refuse options that are of another class than their source's: they would open another set than they name.

    Raises:
        UserError: they are.
    """
    if type(options) is not find_options(options.source):
        raise UserError(f"--data {options.source} has other options than {type(options).__qualname__}")


def find_partition(options: type[DataOptions], kind: str) -> type[Partition]:
    """Return the class of a partition's options; what is natural the source says.

    Raises:
        UserError: there is no such partition.
    """
    kinds = {**PARTITIONS, "natural": type(options().partition)}
    if kind not in kinds:
        raise UserError(f"--data.partition {kind}: there are {', '.join(kinds)}")
    return kinds[kind]


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
    if strange := sorted(numbers.keys() - names - {field.name for field in dataclasses.fields(kind)}):
        flag = "--data." + ("partition-by" if strange[0] == "by" else strange[0].replace("_", "-"))
        raise UserError(f"{flag} belongs to {', '.join(list_owners(flag)) or 'nothing'}, and not to {source}")
    cut = of_partition(**{name: numbers.pop(name) for name in names & numbers.keys()})
    return kind(source=source, partition=cut, **numbers)


def list_owners(flag: str) -> list[str]:
    """List the choices that have an option: sources beside what all of them have, and partitions.

    >>> list_owners("--data.alpha")
    ['--data emoji', '--data.partition dirichlet', '--data.partition quantity']
    """
    owners = {f"--data {name}": (find_options(name)(), DataOptions()) for name in list_sets()}
    owners["parquet files"] = find_options("")(), DataOptions()
    owners |= {f"--data.partition {kind}": (options(), Partition()) for kind, options in PARTITIONS.items()}
    return [name for name, (has, all_have) in owners.items() if flag in _list_flags(has) - _list_flags(all_have)]


def _list_flags(options: DataOptions | Partition) -> set[str]:
    return {option.flag for option in list_options(options, "data")}
