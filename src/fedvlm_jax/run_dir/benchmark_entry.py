"""Entries of a benchmark's table, a line of JSON each: rows of scores, and what they were measured with.

A line has the scores alone, by method, seed and client. Means, intervals and differences are computed of them wherever
they are shown, so a line cannot say what its scores do not. It may be a stranger's, and is read so.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm_jax.config.benchmark import Benchmark, Rates
from fedvlm_jax.config.option_checks import plain
from fedvlm_jax.config.run_options import SHARE, methods_available
from fedvlm_jax.errors import UserError, describe_os_error, format_count
from fedvlm_jax.evaluation.statistics.over_seeds import BySeed
from fedvlm_jax.methods.config import MethodOptions, find_method_options
from fedvlm_jax.run_dir.validated_files import parse_json
from fedvlm_jax.utils.files import read_plain
from fedvlm_jax.utils.serialization import decode, encode
from fedvlm_jax.utils.untrusted_text import clean, cut

LARGEST = 2**24
"""Bytes of a file of entries at most."""

ZERO_SHOT = "zero-shot"
"""The row of the bare base, which has no learning rates."""
MOST = 1e15  # bytes or seconds
LONG = 60  # characters of a name that a message shows


@dataclass(frozen=True)
class Row:
    """A method's scores."""

    method: str
    rates: Rates | None
    """Learning rates of A and of B; None for the bare base."""
    options: dict[str, Any]
    """The method's numbers."""
    scores: dict[str, dict[str, float]]
    """seed -> client -> score."""
    upload: float | None
    """Bytes of a client in a round."""
    seconds: float
    """Training of all seeds."""

    @property
    def by_seed(self) -> BySeed:
        """Return its scores by the seed's number."""
        return {int(seed): scores for seed, scores in self.scores.items()}

    def make_options(self) -> MethodOptions:
        """Return the method's numbers.

        Raises:
            UserError: they are not those of this version's method.
        """
        return decode(find_method_options(plain(self.method)), self.options, f"the numbers of {self.method}")


@dataclass(frozen=True)
class Entry:
    """A line of a benchmark's table."""

    benchmark: str
    version: int
    setup: str
    metric: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    data: str
    weights: str
    package: str
    jax: str
    machine: dict[str, Any]
    commit: str | None
    seconds: float

    @property
    def methods(self) -> tuple[str, ...]:
        """Name the methods that were trained."""
        return tuple(row.method for row in self.rows if row.method != ZERO_SHOT)

    def row(self, method: str) -> Row:
        """Find a method's row.

        Raises:
            UserError: there is none.
        """
        for row in self.rows:
            if row.method == method:
                return row
        raise UserError(f"--methods {method}: the line has rows of {_show(', '.join(self.methods))}")


def write_entry(entry: Entry) -> str:
    """Write an entry as its line.

    >>> row = Row("local", (0.002, 0.002), {}, {"0": {"ann": 0.5}}, 0.0, 9.0)
    >>> about = {"data": "d", "weights": "w", "package": "0.1.0", "jax": "0.10", "machine": {}, "commit": None}
    >>> entry = Entry("emoji-16", 1, "ab", "exact_match", (0,), (row,), seconds=9.0, **about)
    >>> read_line(write_entry(entry), "line 1") == entry
    True
    """
    return json.dumps(encode(entry), ensure_ascii=False)


def read_line(text: str, where: str) -> Entry:
    """Read a line; its numbers are looked at, and its names are whatever they are.

    Args:
        where: of the file and the line, for messages.

    Raises:
        UserError: it is none.
    """
    stored = parse_json(Path(where), text)
    try:
        entry = decode(Entry, stored)
        _check(entry)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return entry


def _check(entry: Entry) -> None:
    if not entry.seeds or entry.seeds != tuple(range(len(entry.seeds))):
        raise UserError(f"the seeds are {_show(str(list(entry.seeds)))}; expected 0, 1 and so on")
    names = [row.method for row in entry.rows]
    if not names or len({*names}) < len(names):
        raise UserError("expected a row for every method, and one only")
    for row in entry.rows:
        if [*row.scores] != list(map(str, entry.seeds)) or not all(row.scores.values()):
            raise UserError(f"{_show(row.method)} has scores of other seeds than {_show(str(list(entry.seeds)))}")
        for value in (value for scores in row.scores.values() for value in scores.values()):
            if not 0 <= value <= 1:  # also what is no number
                raise UserError(f"{_show(row.method)} has a score of {value:g}; expected one from 0 to 1")
        if (row.rates is None) != (row.method == ZERO_SHOT):
            raise UserError(f"{_show(row.method)} has {'no' if row.rates is None else 'strange'} learning rates")
        if not all(0 <= number < MOST for number in (row.upload or 0.0, row.seconds, entry.seconds)):
            raise UserError(f"{_show(row.method)} has bytes or seconds that cannot be")
        if any(row.scores[seed].keys() != first.keys() for seed, first in entry.rows[0].scores.items()):
            raise UserError(f"{_show(row.method)} has scores of other clients than {_show(entry.rows[0].method)}")


def read_entries(file: Path) -> list[Entry]:
    """Read a file of entries, a line each.

    Raises:
        UserError: it cannot be read, is too large, or a line is no entry.
    """
    try:
        if (size := file.stat().st_size) > LARGEST:
            raise UserError(f"{file} has {size:,} bytes, more than lines of a benchmark take")
        text = read_plain(file).decode()
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8; expected the line that fedvlm compare --benchmark writes") from None
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} has no line")
    return [read_line(line, f"{file}, line {number}") for number, line in lines]


def read_submission(file: Path, benchmark: Benchmark) -> Entry:
    """Read the one line of a benchmark that a file has, and see that it can be rerun here.

    Raises:
        UserError: it is none, of another set-up, or names what this version does not have.
    """
    entries = [entry for entry in read_entries(file) if entry.benchmark == benchmark.name]
    if len(entries) != 1:
        raise UserError(f"{file} has {format_count(len(entries), 'line')} of {benchmark.name}; expected one")
    entry = entries[0]
    if (entry.version, entry.setup) != (benchmark.version, benchmark.setup):
        raise UserError(
            f"{file} is of version {_show(str(entry.version))}, set-up {_show(entry.setup)}, and {benchmark.name} here "
            f"is version {benchmark.version}, set-up {benchmark.setup}: the two cannot be compared"
        )
    if entry.metric != benchmark.metric:
        raise UserError(
            f"{file} has scores of {_show(entry.metric)}, and {benchmark.name} is judged by {benchmark.metric}"
        )
    if not entry.methods:
        raise UserError(f"{file} has no row but that of {ZERO_SHOT}, which nothing was trained for")
    if len(entry.seeds) > benchmark.seeds:
        raise UserError(
            f"{file} has {format_count(len(entry.seeds), 'seed')}, and {benchmark.name} has {benchmark.seeds}"
        )
    for row in entry.rows:
        if row.rates is not None and row.rates not in benchmark.grid:
            raise UserError(f"{file}: {_show(row.method)} has learning rates {row.rates}, which are not in the grid")
    return entry


def take_numbers(entry: Entry, methods: tuple[str, ...]) -> dict[str, MethodOptions]:
    """Return the numbers that a line has for methods, by their plain names; without those of methods that have none.

    Raises:
        UserError: as `check_known`; or two rows of one method have other numbers, with and without an ending.
    """
    check_known(entry, methods)
    numbers = dict[str, MethodOptions]()
    for method in methods:
        options = entry.row(method).make_options()
        if numbers.setdefault(plain(method), options) != options:
            raise UserError(f"the line has rows of {_show(plain(method))} with other numbers: rerun one of them")
    return {name: options for name, options in numbers.items() if type(options) is not MethodOptions}


def check_known(entry: Entry, methods: tuple[str, ...]) -> None:
    """Refuse methods without a row, and those that this version does not have.

    Raises:
        UserError: the first of them.
    """
    for method in methods:
        row = entry.row(method)
        if plain(method) not in (*methods_available(), SHARE):
            raise UserError(f"this version has no method {_show(method)}, so its row cannot be rerun")
        row.make_options()


def _show(text: str) -> str:
    return cut(clean(text), LONG)
