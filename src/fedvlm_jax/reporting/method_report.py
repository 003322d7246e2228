"""The tables of `fedvlm explain`: what a method does to which tensors, what that comes to, and all methods."""

from collections.abc import Sequence
from itertools import groupby, pairwise, zip_longest

from fedvlm_jax.analysis.explain import Explanation
from fedvlm_jax.analysis.trace_method import Held, Stage, Tensor
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import SHARE, Run, methods_available
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.lora import PROMPT
from fedvlm_jax.methods.base import AVERAGING
from fedvlm_jax.methods.config import list_method_flags
from fedvlm_jax.reporting.tables import Table, format_bytes

WIDTH = 22  # longer paths are folded at their slashes, so that a table fits a terminal of 80 columns
NOTHING = "–"


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


def tabulate_explanation(explained: Explanation) -> list[Table]:
    """Tabulate the tensors, phase by phase, and the totals."""
    tables = [_tabulate_stage(explained, stage) for stage in explained.stages]
    return [*tables, _tabulate_totals(explained)]


def _tabulate_stage(explained: Explanation, stage: Stage) -> Table:
    # Sites below one parent that are treated alike share their lines.
    alike: dict[tuple[str, tuple[tuple[str, ...], ...]], list[str]] = {}
    for group, tensors in groupby(stage.tensors, key=lambda tensor: tensor.group):
        parent, _, last = group.rpartition("/")
        alike.setdefault((parent, tuple(map(_describe, tensors))), []).append(last)
    groups = [tensor.group for tensor in stage.tensors if tensor.group]
    tops = {group.partition("/")[0] for group in groups}
    top = tops.pop() if len(tops) == 1 and all("/" in group for group in groups) else ""
    cells: list[tuple[str, ...]] = []
    for (parent, leaves), names in alike.items():
        path = fold_path(join_path(parent, names).removeprefix(f"{top}/")) or ["(one of all)"]
        cells += [(part or "", *(leaf or [""] * 6)) for part, leaf in zip_longest(path, leaves)]
    note = ""
    if stage is explained.stages[-1]:
        note = "Kept: from round to round, by the client, and as what the method calls it."
        if times := {held.times for tensor in stage.tensors for held in tensor.received} - {1}:
            note += f" {max(times)}×: so many of them, of other clients or of clusters."
        if explained.layer:
            note += f" A single layer is, for --share, {explained.layer}."
    heading = f"tensors in {top}" if top else "tensors"
    return Table(
        f"{explained.name} on {explained.model}, {_write_rounds(stage.rounds, explained)}",
        (heading, "leaf", "shape", "training", "sent", "received", "kept"),
        tuple(cells),
        note=note,
        prose=frozenset(range(1, 7)),
    )


def _describe(tensor: Tensor) -> tuple[str, ...]:
    trained = "trained" if tensor.trained == 1 else f"{tensor.trained} trained"
    one = "vector" if tensor.name == PROMPT else "layer"
    held = (_write_held(places, one) for places in (tensor.sent, tensor.received, tensor.kept))
    shape = "×".join(map(str, tensor.shape)) or "number"
    return (tensor.name, shape, trained if tensor.trained else "frozen", *held)


def _write_held(places: Sequence[Held], one: str) -> str:
    words = []
    for held in places:
        layers = f"{one}{'s'[: len(held.layers) > 1]} {write_layers(held.layers)}" if held.layers else ""
        times = f"{held.times}×" if held.times > 1 else ""
        words.append(" ".join(word for word in (times, held.place, layers) if word) or "yes")
    return ", ".join(words) or NOTHING


def _tabulate_totals(explained: Explanation) -> Table:
    stages = explained.stages
    rows = [
        (
            "trained by a client",
            *(f"{stage.trained:,} ({100 * stage.trained / explained.base:.2g} % of the base)" for stage in stages),
        ),
        ("sent by a client", *(_write_sent(stage) for stage in stages)),
        ("received by a client", *(_write_bytes(stage.down) for stage in stages)),
    ]
    for rank in stages[0].by_rank:
        sizes = [stage.by_rank[rank] for stage in stages]
        written = [f"{format_bytes(up)} sent, {format_bytes(down)} received" for up, down in sizes]
        rows.append((f"  of rank {rank}", *written))
    every = [""] * (len(stages) - 1)
    same = "all the same" if any(stage.down for stage in stages) else "nothing"
    kept = f"{format_bytes(explained.state)}, {format_bytes(explained.optimizer)} of it optimiser"
    rows += [
        ("kept by a client", kept, *every),
        ("the base", "is added to in every round" if explained.moves_base else "stays as it is", *every),
        ("clients receive", "something of their own" if explained.own_download else same, *every),
    ]
    ranks = " (bytes: mean over the clients, whose ranks differ)" if stages[0].by_rank else ""
    return Table(
        "Per client and round",
        ("", *(_write_rounds(stage.rounds, explained) for stage in stages)) if len(stages) > 1 else ("", ""),
        tuple(rows),
        note=f"{explained.cohort} of {format_count(explained.population, 'client')} in a round{ranks}; the base has "
        f"{explained.base:,} parameters.",
        prose=frozenset(range(1, 1 + len(stages))),
    )


def _write_rounds(rounds: tuple[int, ...], explained: Explanation) -> str:
    if len(explained.stages) == 1:
        return "every round"
    steps = {after - before for before, after in pairwise(rounds)}
    if steps <= {1}:
        return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}–{rounds[-1]}"
    return f"rounds {', '.join(map(str, rounds[:3]))}{', …' if len(rounds) > 3 else ''}"


def _write_sent(stage: Stage) -> str:
    return _write_bytes(stage.up) + (f" in place of {format_bytes(stage.whole)}" if stage.whole != stage.up else "")


def _write_bytes(count: int) -> str:
    return format_bytes(count) if count < 1024 else f"{format_bytes(count)} ({count:,} bytes)"


def write_layers(layers: Sequence[str]) -> str:
    """Write the indices of layers, neighbours as a range; those of several axes stay as they are.

    >>> write_layers(["0", "1", "2", "5"])
    '0–2, 5'
    """
    if not all(name.isdigit() for name in layers):
        return ", ".join(layers)
    numbers = sorted(map(int, layers))
    # Within a range, a number and its place in the list rise together.
    runs = [[n for _, n in part] for _, part in groupby(enumerate(numbers), key=lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def join_path(parent: str, names: Sequence[str]) -> str:
    """Write one path for sites that are alike.

    >>> join_path("self_attn", ["k_proj", "q_proj"])
    'self_attn/{k,q}_proj'
    """
    if len(names) == 1:
        return f"{parent}/{names[0]}".removeprefix("/")
    ends = {name.rpartition("_")[2] for name in names if "_" in name}
    end = f"_{ends.pop()}" if len(ends) == 1 and all("_" in name for name in names) else ""
    return f"{parent}/{{{','.join(name.removesuffix(end) for name in names)}}}{end}".removeprefix("/")


def fold_path(path: str) -> list[str]:
    """Fold a path at its slashes, into lines of about `WIDTH`; none of an empty path."""
    lines = [""]
    for part in path.split("/"):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(" ")
        lines[-1] += f"{part}/"
    return [*lines[:-1], lines[-1].removesuffix("/")] if path else []
