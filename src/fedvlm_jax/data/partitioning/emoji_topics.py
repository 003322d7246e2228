"""The clients of the emoji set that ships: drawing styles and languages, topics drawn from a Dirichlet per client.

Further clients share styles and languages, each with topics and images drawn for it: two may have a picture in common.
Topics as in Hsu, Qi and Brown (arXiv 1909.06335): a client's mix over groups is Dirichlet(alpha · G · p), p being the
share of each of the G groups in the set; at alpha = inf all clients have p. Deviation: images are drawn without
replacement, so a group can run dry; its share then falls to the groups that are left, in proportion. The set itself
fixes which concepts train, validate and test, for every seed and client.

Another `--data.partition` cuts anew what these clients have together, drawn at alpha = inf. A picture is then with one
client in all its languages: ask in the client's, because the neutral prompt does not say which is wanted.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fedvlm_jax.data.config import SPLITS, Dirichlet, Pathological
from fedvlm_jax.data.federated_dataset import ClientRows, Federation
from fedvlm_jax.data.partitioning.algorithms import ALIKE
from fedvlm_jax.data.partitioning.table_clients import federate_rows
from fedvlm_jax.data.sources.emoji import Options, Topics
from fedvlm_jax.data.table import Table
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.utils.digests import digest_files
from fedvlm_jax.utils.random_streams import Stream

FILE = Path(__file__).parents[2] / "assets" / "emoji" / "emoji.parquet"
COLUMNS = ("client", "split", "language", "concept", "task", "group", "question_client")
SPLITS_FROM = "the set's own concepts"
Mix = Float[np.ndarray, " groups"]  # shares that sum to 1


def read_file(file: Path) -> Table:
    """Open a file of the set's form. It is small but unfolds to many rows that share images: dictionaries stay so.

    Raises:
        UserError: the file is not there or lacks columns.
    """
    import pyarrow.parquet as pq

    if not file.is_file():
        raise UserError(f"the shipped data set {file} is missing; install fedvlm-jax again (tools/assets makes it).")
    names = pq.read_schema(file).names
    if missing := [column for column in COLUMNS if column not in names]:
        raise UserError(f"{file} lacks {', '.join(missing)}; it has {', '.join(names)}. Install fedvlm-jax again.")
    repeated = [name for name in names if name not in ("image", "idx")]  # idx is new in every row
    # Not `read_table`: that imports pandas, a third of a second.
    with pq.ParquetFile(file, read_dictionary=[*repeated, "image.bytes", "image.path"]) as opened:
        return Table("emoji", opened.read(), file.parent, digest=digest_files([file]))


def federate_topics(table: Table, options: Options, seed: int) -> Federation:
    """Sample the clients that the set has, or cut anew what they have together.

    Raises:
        UserError: a vendor, language or task that the set does not have, a concept in two splits, or no partition has
            what the options ask for.
    """
    partition = options.partition
    if isinstance(partition, Topics) and partition.by is None:
        return _sample_clients(table, options, partition.alpha, seed, partition.clients)
    pool = _sample_clients(table, options, np.inf, seed)
    parts = [np.concatenate([client.rows_of(split) for client in pool.clients]) for split in SPLITS]
    splits = np.repeat(np.arange(len(SPLITS)), [len(part) for part in parts])
    if isinstance(partition, Dirichlet | Pathological):
        options = options.replace(partition=dataclasses.replace(partition, by=partition.by or "group"))
    federation = federate_rows(table, np.concatenate(parts), splits, options, seed)
    return federation.note(splits_from=SPLITS_FROM, cut_from=list(pool.names))


def _sample_clients(table: Table, options: Options, alpha: float, seed: int, count: int | None = None) -> Federation:
    """Sample the images of so many clients, by default one per style and language, each asked all `options.tasks`.

    Random numbers come from (seed, place of the style and language in the set, which client of them, split), so a
    client keeps its images whatever other clients there are, and fewer images are a prefix of more.
    """
    columns = [table.read_text(column) for column in ("client", "concept", "task")]
    everyone = sorted({client for client in columns[0] if client})
    chosen = _choose_clients(table, options, everyone)
    count = len(chosen) if count is None else count
    if count < len(chosen):
        raise UserError(
            f"--data.clients is {count}, and the {format_count(len(options.vendors), 'style')} and "
            f"{format_count(len(options.languages), 'language')} "
            f"make {format_count(len(chosen), 'client')} at least: choose fewer --data.vendors or "
            "--data.languages, or more clients."
        )

    group_of, split_of = _read_concepts(table)
    groups = sorted(set(group_of.values()))
    prior = np.asarray([list(group_of.values()).count(group) for group in groups], float) / len(group_of)
    rows: dict[tuple[str, str, str], int] = {}
    wanted = set(chosen)
    for row, (name, concept, task) in enumerate(zip(*columns, strict=True)):
        if name in wanted and task in options.tasks:
            rows[str(name), str(concept), str(task)] = row
    pools = defaultdict[tuple[str, str, str], list[str]](list)
    for name, concept in sorted({(name, concept) for name, concept, _ in rows}):
        if all((name, concept, task) in rows for task in options.tasks):
            pools[name, split_of[concept], group_of[concept]].append(concept)
    sizes = (options.images_per_client, options.validation_per_client, options.test_per_client)
    federated, topics = [], {}
    for number in range(count):
        name, again = chosen[number % len(chosen)], number // len(chosen)
        # By the place among all clients of the set: the choice of other vendors or languages changes nothing here.
        stream = [seed, everyone.index(name), *([again] if again else [])]
        mix = draw_mix(np.random.default_rng([Stream.TOPICS, *stream]), alpha, prior)
        parts, realised = [], {}
        for place, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
            rng = np.random.default_rng([Stream.CONCEPTS, *stream, place])
            drawn = draw_concepts(rng, mix, [pools[name, split, group] for group in groups], size)
            parts.append([rows[name, concept, task] for concept in drawn for task in options.tasks])
            seen = [group_of[concept] for concept in drawn]
            realised[split] = {group: round(seen.count(group) / len(seen), 4) for group in groups} if seen else {}
        client = f"{name}-{again + 1}" if again else name
        federated.append(ClientRows(client, *(np.asarray(part, np.int64) for part in parts)))
        mix_drawn = dict(zip(groups, mix.round(4).tolist(), strict=True))
        topics[client] = {"mix_drawn": mix_drawn, "mix_realised": realised}
    about = {"kind": "natural", "by": "group", "alpha": alpha if np.isfinite(alpha) else "inf", "seed": seed}
    federation = Federation(tuple(federated), {"clients_from": "vendor and language", "partition": about})
    return federation.note(splits_from=SPLITS_FROM, topics=topics)


def _choose_clients(table: Table, options: Options, everyone: Sequence[str]) -> list[str]:
    chosen = [f"{vendor}-{language}" for vendor in options.vendors for language in options.languages]
    for flag, names, known in (
        ("vendors", options.vendors, {name.rpartition("-")[0] for name in everyone}),
        ("languages", options.languages, {name.rpartition("-")[2] for name in everyone}),
        ("tasks", options.tasks, set(map(str, table.read_text("task")))),
        ("vendors and languages", chosen, set(everyone)),
    ):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--data.{flag} has {', '.join(unknown)}; the emoji set has {', '.join(sorted(known))}.")
    return chosen


def _read_concepts(table: Table) -> tuple[dict[str, str], dict[str, str]]:
    """Read concept -> group and concept -> split, in sorted order; a concept must have one of each."""
    concepts, groups, splits = (table.read_text(column) for column in ("concept", "group", "split"))
    group_of, split_of = {}, {}
    for concept, group, split in sorted(set(zip(concepts, groups, splits, strict=True)), key=str):
        if concept in group_of or split not in SPLITS or not group or not concept:
            raise UserError(
                f"{table.name}: the concept {concept!r} has split {split!r} and group {group!r}"
                f"{' and another of them' if concept in group_of else ''}; expected one group and one split of "
                f"{', '.join(SPLITS)} per concept. Install fedvlm-jax again."
            )
        group_of[concept], split_of[concept] = group, split
    return group_of, split_of


def draw_mix(rng: np.random.Generator, alpha: float, prior: Mix) -> Mix:
    """Draw a client's mix over groups: Dirichlet(alpha · G · prior), or the prior itself at alpha = inf.

    >>> float(draw_mix(np.random.default_rng(0), np.inf, np.asarray([0.75, 0.25])).max())
    0.75
    """
    if alpha >= ALIKE:
        return prior
    # numpy refuses concentrations of 0; near 0 all draws may underflow, and then a single group takes all.
    mix = rng.dirichlet(np.maximum(alpha * len(prior) * prior, 1e-6))
    return mix if np.isfinite(mix).all() else np.eye(len(prior))[rng.choice(len(prior), p=prior)]


def draw_concepts(rng: np.random.Generator, mix: Mix, pools: Sequence[Sequence[str]], count: int) -> list[str]:
    """Draw up to `count` concepts without replacement, group by group after `mix`.

    The generator is used up in one fixed order, a permutation per group, then one number per draw: a shorter draw is a
    prefix of a longer one.

    >>> sorted(draw_concepts(np.random.default_rng(0), np.asarray([1.0, 0.0]), [["cat", "dog"], ["bus"]], 2))
    ['cat', 'dog']
    """
    queues: list[list[str]] = [[pool[int(place)] for place in rng.permutation(len(pool))[::-1]] for pool in pools]
    drawn: list[str] = []
    while len(drawn) < count and any(queues):
        weights = np.where([bool(queue) for queue in queues], mix, 0.0)
        if weights.sum() <= 0:  # all that the mix asks for is used up
            weights = np.asarray([len(queue) for queue in queues], float)
        edges = np.cumsum(weights / weights.sum())
        group = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
        drawn.append(queues[group].pop())
    return drawn
