"""The tables of `fedvlm explain`: what a method does to which tensors, what that comes to, and all methods."""

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise, zip_longest

from fedvlm_jax.analysis.explain import Explanation
from fedvlm_jax.analysis.trace_method import Held, Stage, Tensor
from fedvlm_jax.config.method_options import declare
from fedvlm_jax.config.run_options import SHARE, Run, methods_available
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.base import AVERAGING
from fedvlm_jax.methods.config import list_method_flags
from fedvlm_jax.reporting.tables import Table, format_bytes

WIDTH = 22
"""Longer paths are folded at their slashes, so that a table fits a terminal of 80 columns."""

NOTHING = "–"


def tabulate_explanation(explained: Explanation) -> list[Table]:
    """Tabulate the tensors, phase by phase, and the totals."""
    return [*(_tabulate_stage(explained, stage) for stage in explained.stages), _tabulate_totals(explained)]


def tabulate_methods(run: Run) -> Table:
    """Tabulate every method that there is with its source, and what it takes beside the usual options."""
    rows = []
    for name in (*methods_available(), SHARE):
        try:
            method = declare(name, run)
        except UserError as error:
            rows.append((name, f"cannot be used: {error}", NOTHING))
            continue
        common = [path.rpartition(".")[2] for path in AVERAGING if path not in method.refuses]
        words = [*sorted(common), *list_method_flags(name)]
        rows.append((name, method.source, ", ".join(words) or NOTHING))
    note = (
        "p_k: weight of client k. Takes: of the options that not every method takes (--server.*, --local.proximal, "
        "--local.scaffold, --lora.ranks, and numbers of its own) these. `fedvlm explain METHOD` shows what a method "
        "does to the tensors of a model."
    )
    return Table("Methods", ("method", "source: update", "takes"), tuple(rows), note=note, prose=frozenset({1, 2}))


def _tabulate_stage(explained: Explanation, stage: Stage) -> Table:
    rows = []
    alike: dict[tuple[object, ...], list[str]] = {}
    for group, tensors in groupby(stage.tensors, key=lambda tensor: tensor.group):
        lines = tuple(tensors)
        parent, _, last = group.rpartition("/")
        key = (parent, *((t.name, t.shape, t.trained, t.sent, t.received, t.kept) for t in lines))
        alike.setdefault(key, []).append(last)
        if len(alike[key]) == 1:
            rows.append((key, parent, lines))
    top = _common_top([tensor.group for tensor in stage.tensors if tensor.group])
    cells: list[tuple[str, ...]] = []
    for key, parent, lines in rows:
        path = _fold(_join(parent, alike[key]).removeprefix(f"{top}/")) or ["(one of all)"]
        leaves = [_describe(tensor) for tensor in lines]
        cells += [(before or "", *(leaf or [""] * 6)) for before, leaf in zip_longest(path, leaves)]  # a line of each
    heading = f"tensors in {top}" if top else "tensors"
    return Table(
        f"{explained.name} on {explained.model}, {_write_rounds(stage.rounds, explained)}",
        (heading, "leaf", "shape", "training", "sent", "received", "kept"),
        tuple(cells),
        note=_write_note(explained, stage) if stage is explained.stages[-1] else "",
        prose=frozenset(range(1, 7)),
    )


def _tabulate_totals(explained: Explanation) -> Table:
    several = len(explained.stages) > 1
    rows: list[tuple[str, ...]] = [
        (
            "trained by a client",
            *(f"{stage.trained:,} ({_percent(stage.trained, explained.base)})" for stage in explained.stages),
        ),
        ("sent by a client", *(_write_bytes(stage.up) for stage in explained.stages)),
        ("received by a client", *(_write_bytes(stage.down) for stage in explained.stages)),
    ]
    for rank in explained.stages[0].by_rank:
        sizes = [stage.by_rank[rank] for stage in explained.stages]
        written = [f"{format_bytes(up)} sent, {format_bytes(down)} received" for up, down in sizes]
        rows.append((f"  of rank {rank}", *written))
    every = [""] * (len(explained.stages) - 1)
    same = "all the same" if any(stage.down for stage in explained.stages) else "nothing"
    kept = f"{format_bytes(explained.state)}, {format_bytes(explained.optimizer)} of it optimiser"
    rows += [
        ("kept by a client", kept, *every),
        ("the base", "is added to in every round" if explained.moves_base else "stays as it is", *every),
        ("clients receive", "something of their own" if explained.own_download else same, *every),
    ]
    ranks = " (bytes: mean over the clients, whose ranks differ)" if explained.stages[0].by_rank else ""
    columns = ("", *(_write_rounds(stage.rounds, explained) for stage in explained.stages)) if several else ("", "")
    return Table(
        "Per client and round",
        columns,
        tuple(rows),
        note=f"{explained.cohort} of {explained.population} clients in a round{ranks}; the base has "
        f"{explained.base:,} parameters.",
        prose=frozenset(range(1, 1 + len(explained.stages))),
    )


def _describe(tensor: Tensor) -> tuple[str, ...]:
    held = (_write_held(places) for places in (tensor.sent, tensor.received, tensor.kept))
    return (tensor.name, "×".join(map(str, tensor.shape)) or "number", _write_training(tensor), *held)


def _write_note(explained: Explanation, stage: Stage) -> str:
    note = "Kept: from round to round, by the client, and as what the method calls it."
    times = {held.times for tensor in stage.tensors for held in tensor.received} - {1}
    if times:
        note += f" {max(times)}×: those of so many clients."
    if explained.layer:
        note += f" A single layer is, for --share, {explained.layer}."
    return note


def _write_training(tensor: Tensor) -> str:
    if not tensor.trained:
        return "frozen"
    return "trained" if tensor.trained == 1 else f"{tensor.trained} trained"


def _write_held(places: Sequence[Held]) -> str:
    words = []
    for held in places:
        layers = f"layer{'s'[: len(held.layers) > 1]} {_write_numbers(held.layers)}" if held.layers else ""
        times = f"{held.times}×" if held.times > 1 else ""
        words.append(" ".join(word for word in (times, held.place, layers) if word) or "yes")
    return ", ".join(words) or NOTHING


def _write_rounds(rounds: tuple[int, ...], explained: Explanation) -> str:
    if len(explained.stages) == 1:
        return "every round"
    steps = {after - before for before, after in pairwise(rounds)}
    if steps <= {1}:
        return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}–{rounds[-1]}"
    return f"rounds {', '.join(map(str, rounds[:3]))}{', …' if len(rounds) > 3 else ''}"


def _write_numbers(layers: Iterable[str]) -> str:
    """Write `0, 1, 2, 5` as `0–2, 5`; indices of several axes stay as they are."""
    names = list(layers)
    if not all(name.isdigit() for name in names):
        return ", ".join(names)
    numbers = sorted(map(int, names))
    runs = [[n for _, n in part] for _, part in groupby(enumerate(numbers), key=lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _write_bytes(count: int) -> str:
    return format_bytes(count) if count < 1024 else f"{format_bytes(count)} ({count:,} bytes)"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2g} % of the base"


def _common_top(groups: Sequence[str]) -> str:
    tops = {group.partition("/")[0] for group in groups if "/" in group}
    return tops.pop() if len(tops) == 1 and all("/" in group for group in groups) else ""


def _join(parent: str, names: Sequence[str]) -> str:
    """One path for sites that are alike: `self_attn/{k,out,q,v}_proj`."""
    if len(names) == 1:
        return f"{parent}/{names[0]}".removeprefix("/")
    ends = {name.rpartition("_")[2] for name in names if "_" in name}
    end = f"_{ends.pop()}" if len(ends) == 1 and all("_" in name for name in names) else ""
    return f"{parent}/{{{','.join(name.removesuffix(end) for name in names)}}}{end}".removeprefix("/")


def _fold(path: str) -> list[str]:
    lines = [""]
    for part in path.split("/"):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(" ")
        lines[-1] += f"{part}/"
    return [*lines[:-1], lines[-1].removesuffix("/")] if path else []
