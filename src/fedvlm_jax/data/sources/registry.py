"""Data sets by name, a file of this folder each with the class of its options, and the reading of any data.

What is no name is one's own data, whose form is found, and has its options in a file of `data/forms`.
"""

import dataclasses
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm_jax.data.config import PARTITIONS, DataOptions, Partition
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.detection import FORMS, find_form
from fedvlm_jax.utils.option_ranges import list_options

if TYPE_CHECKING:
    from fedvlm_jax.data.table import Table

FORMS_OF_FILES = "fedvlm_jax.data.forms"


@functools.cache
def list_sets() -> tuple[str, ...]:
    """List the names of data sets, which are those of their files."""
    modules = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(name.replace("_", "-") for name in sorted(modules) if name != "registry")


def find_options(source: str, form: str | None = None) -> type[DataOptions]:
    """Return the class of a source's options: those of its form where it is no name. It imports that file alone.

    Raises:
        UserError: there is no such form, or nothing tells which it is.

    >>> find_options("rlaif-v").__module__, find_options("rows.csv").__module__
    ('fedvlm_jax.data.sources.rlaif_v', 'fedvlm_jax.data.forms.csv')
    """
    if source in list_sets():
        return importlib.import_module(f"{__package__}.{source.replace('-', '_')}").Options
    form = form or find_form(source)
    if form not in FORMS:
        raise UserError(f"--data.form {form}: there are {', '.join(FORMS)}")
    return importlib.import_module(f"{FORMS_OF_FILES}.{form}").Options


def read_table(source: str | DataOptions) -> "Table":
    """Open a named data set, or one's own data. A name wins over a path (`./name` is none), a path over a hub's id.

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
    if type(options) is not find_options(options.source, getattr(options, "form", None)):
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


def make_options(
    source: str = "emoji", partition: str = "natural", form: str | None = None, **numbers: Any
) -> DataOptions:
    """Make the options of a source with a partition; each number goes to the one of the two that has it.

    The form is that of one's own data; None: as found.

    Raises:
        UserError: neither has it, or a value cannot be.

    >>> make_options("emoji", "dirichlet", alpha=0.1, images_per_client=20).partition.alpha
    0.1
    """
    kind = find_options(source, form)
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
    forms = {form: find_options("", form)() for form in FORMS}
    if all(flag in _list_flags(options) for options in forms.values()):
        owners["one's own data"] = forms["parquet"], DataOptions()
    else:
        owners |= {f"--data.form {form}": (options, DataOptions()) for form, options in forms.items()}
    owners |= {f"--data.partition {kind}": (options(), Partition()) for kind, options in PARTITIONS.items()}
    return [name for name, (has, all_have) in owners.items() if flag in _list_flags(has) - _list_flags(all_have)]


def _list_flags(options: DataOptions | Partition) -> set[str]:
    return {option.flag for option in list_options(options, "data")}
