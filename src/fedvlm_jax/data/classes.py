"""Classes of a federation: the different answers of its rows, for a model that chooses among them.

Base classes are the answers of somebody's training rows, novel ones those of validation and test rows alone: a model
trains without having heard of a novel class, and is asked to tell it from all others.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.federated_dataset import Federation
from fedvlm_jax.data.table import UNREADABLE, Table
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.utils.untrusted_text import clean, cut


class Classes(NamedTuple):
    """Different answers, sorted: what models train among, and what they are asked about besides."""

    trained: tuple[str, ...]
    others: tuple[str, ...]


def list_classes(table: Table, federation: Federation, options: DataOptions, *, pairs: bool) -> Classes:
    """List the answers of all rows of a federation, or the classes that `options` has in their place.

    Those that are trained among are the chosen ones of training rows and, where `pairs` are, their rejected ones. The
    others are all that rows hold besides, rejected ones too, which are only scored.

    Raises:
        UserError: a row has an answer that is none of the classes agreed on, or is trained on and novel there.
    """
    train = np.concatenate([np.empty(0, np.int64), *(client.train for client in federation.clients)])
    columns = [column for column in ("chosen", "rejected") if column in table.columns]
    trained = {text for column in columns[: 1 + pairs] for text in table.read_stripped(column, train)}
    every = {text for column in columns for text in table.read_stripped(column, federation.rows)}
    found = Classes(_order(trained), _order(every - trained))
    return _check_agreed(found, options) if options.agreed_classes else found


def _check_agreed(found: Classes, options: DataOptions) -> Classes:
    """Return the classes agreed on, if the answers found in the data are among them."""
    agreed = Classes(_order(options.agreed_classes), _order(options.agreed_novel))
    rows, what = "rows", "which is none of the classes agreed on: mend these rows, or leave them out"
    unfit = {*found.trained, *found.others}.difference(*agreed)
    if not unfit and (unfit := {*found.trained}.intersection(agreed.others)):
        rows, what = "training rows", "a novel class, which nobody trains on: make them test rows"
    if unfit:
        raise UserError(
            f"{rows} of {clean(options.source)} have the answer {clean(cut(min(unfit), _LONG))!r}, {what}; or have a "
            "new deployment made with it among its --classes"
        )
    return agreed


def _order(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(texts) - {"", UNREADABLE}))


def find_novel(examples: Examples, agreed: Collection[str] = ()) -> Bool[np.ndarray, " examples"]:
    """Find the examples whose answer is that of no training example.

    Where clients are elsewhere, `agreed` are the classes that all of them train among.
    """
    trained = set(agreed) or {examples.answers[row] for client in examples.clients for row in client.train}
    return np.asarray([answer not in trained for answer in examples.answers], bool)


def find_own(examples: Examples) -> Bool[np.ndarray, " examples"]:
    """Find the examples whose answer is that of a training example of the same client."""
    own = np.zeros(len(examples.answers), bool)
    for client in examples.clients:
        trained = {examples.answers[row] for row in client.train}
        for split in SPLITS:
            rows = client.rows_of(split)
            own[rows] = [examples.answers[row] in trained for row in rows]
    return own


def count_ambiguous(examples: Examples) -> int:
    """Count the pictures of which some client has rows with different answers, over all clients."""
    found = 0
    for client in examples.clients:
        answers: dict[int, set[str]] = {}
        for row in np.concatenate([client.rows_of(split) for split in SPLITS]).tolist():
            answers.setdefault(int(examples.image[row]), set()).add(examples.answers[row])
        found += sum(len(different) > 1 for different in answers.values())
    return found


def describe_ambiguous(pictures: int) -> str:
    """Say in a line what a model that reads no question makes of pictures with several answers.

    >>> describe_ambiguous(2)
    '2 pictures have rows with different answers, and one can be given, for no question is read: take one ...'
    """
    have = "has" if pictures == 1 else "have"
    told = f"{format_count(pictures, 'picture')} {have} rows with different answers"
    return (
        f"{told}, and one can be given, for no question is read: take one (--data.tasks subgroup of the shipped data)"
    )


def describe_classes(trained: Sequence[str], every: Sequence[str]) -> str:
    """Say in a line what a model chooses among, of which it trains among the first.

    >>> describe_classes(("cat", "dog"), ("cat", "dog", "emu"))
    'answers are chosen among 3 classes, of which 1 is in no training example: cat, dog, emu'
    """
    others = len(every) - len(trained)
    unseen = f", of which {others} {'is' if others == 1 else 'are'} in no training example" if others else ""
    shown = [clean(cut(name, _LONG)) for name in every[:_SHOWN]]
    more = ", …" if len(every) > _SHOWN else ""
    return f"answers are chosen among {format_count(len(every), 'class', 'classes')}{unseen}: {', '.join(shown)}{more}"


_SHOWN, _LONG = 8, 40  # classes that are named, and their characters
