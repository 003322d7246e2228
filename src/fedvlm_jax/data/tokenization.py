"""Rows as token arrays: prompts and answers tokenised, unusable rows skipped, counted and named.

Prompts go to the model's encoder and answers to its decoder, so labels are the answers' tokens and nothing else: there
is no part of a prompt to be masked. Pixels are not here: an `Examples` holds the index of each row's image, because
images are shared and, with a frozen vision tower, read only once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.config import SPLITS, DataOptions
from fedvlm_jax.data.distinct import number_distinct
from fedvlm_jax.data.federated_dataset import ClientRows, Federation
from fedvlm_jax.data.skipped_rows import (
    Skipped,
    count_reasons,
    describe_lost,
    find_pair_fault,
    find_text_fault,
    skip_rows,
)
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.unique_images import Images, unique_images
from fedvlm_jax.errors import UserError

# Columns of the question that all clients are asked alike, and of that in the client's language.
QUESTION, CLIENT_QUESTION = "question", "question_client"

IGNORED = -100  # label of a position that no loss counts, Hugging Face's convention
LABELS = ("labels", "rejected_labels")  # the chosen answer's in a batch, and the rejected one's
MULTIPLE = 4  # token axes are padded to multiples of this: few shapes, little waste
CHUNK = 1024  # texts that are tokenised at a time

# More characters per token than any text has on average. A text of megabytes would make every array as wide as itself,
# so what must be too long is not even tokenised.
CHARACTERS = 16

TOO_LONG = "prompt too long"

UNRELATED = (KeyboardInterrupt, SystemExit, MemoryError)  # exceptions of a processor that no text is to blame for


class TextProcessor(Protocol):
    """The part of a model's processor that `encode` calls."""

    def prompts(self, texts: list[str], /) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise prompts: (input_ids, attention_mask), [B, T], padded to the longest, image tokens included."""
        ...

    def answers(self, texts: list[str], max_tokens: int, /) -> np.ndarray:
        """Tokenise answers: labels [B, U], cut to `max_tokens` and padded with -100."""
        ...


@dataclass(frozen=True, eq=False)
class Examples:
    """Every usable row of a federation, as arrays on the host.

    Attributes:
        image: [N] int32, index into `images`.
        input_ids: [N, T] int32, image tokens included; T is a multiple of 4.
        attention_mask: [N, T] int32, 1 where `input_ids` counts.
        labels: [N, U] int32, -100 where nothing is to be learnt; U is a multiple of 4.
        answers: N gold answers as text, of several the most frequent one, which is trained on.
        rows: [N] int64, the table's row numbers.
        clients: the federation's clients with rows renumbered to 0 … N-1.
        images: the unique images.
        skipped: rows that were left out, with reasons; for the run's folder.
        truncated: how many of the N answers were cut to `max_answer_tokens`.
        rejected: [N, U'] int32, labels of the rejected answers, as `labels` are; all -100 where a row has no rejected
            answer that differs from the chosen one. None where the data has no column `rejected`.
        rejected_answers: N rejected answers as they stand in the data; None where it has no such column.
        rejected_truncated: how many of them were cut.
        all_answers: N rows' answers, equal ones as often as they were given; None where the data has one each.
    """

    image: Int[np.ndarray, " examples"]
    input_ids: Int[np.ndarray, "examples tokens"]
    attention_mask: Int[np.ndarray, "examples tokens"]
    labels: Int[np.ndarray, "examples labels"]
    answers: list[str]
    rows: Int[np.ndarray, " examples"]
    clients: tuple[ClientRows, ...]
    images: Images
    skipped: tuple[Skipped, ...]
    truncated: int
    rejected: Int[np.ndarray, "examples labels"] | None = None
    rejected_answers: list[str] | None = None
    rejected_truncated: int = 0
    all_answers: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.rows)


def require_pairs(table: Table) -> None:
    """Refuse a table without rejected answers.

    Raises:
        UserError: it has no column `rejected`.
    """
    if "rejected" not in table.columns:
        raise UserError(
            f"{table.name} has no column 'rejected', only {', '.join(table.columns)}: there is no preference to learn "
            "from. Use --objective sft, or data with a chosen and a rejected answer in every row."
        )


def find_question_column(table: Table, options: DataOptions) -> str:
    """Find the column whose questions are asked: the client's own, where the options do not say and the table has it.

    Raises:
        UserError: the options say so, and the table does not have it.
    """
    if options.prompt == "neutral" or (options.prompt is None and CLIENT_QUESTION not in table.columns):
        return QUESTION
    if CLIENT_QUESTION not in table.columns:
        raise UserError(
            f"--data.prompt {options.prompt} needs the column {CLIENT_QUESTION!r}, which {table.name} does not have; "
            "use --data.prompt neutral, or add the column."
        )
    return CLIENT_QUESTION


def encode(
    table: Table, federation: Federation, processor: TextProcessor, options: DataOptions, *, pairs: bool = False
) -> Examples:
    """Tokenise and check all rows of a federation. Every distinct text is tokenised once, every image decoded once.

    Args:
        table, federation: which rows.
        processor: of the model.
        options: how they are asked, and what is too long.
        pairs: skip also rows without a rejected answer, or whose two answers are the same tokens.

    Raises:
        UserError: the prompt's column is not there, `pairs` and there are no rejected answers, or more than
            `options.max_bad_share` of the rows are unusable.
    """
    if pairs:
        require_pairs(table)
    column = find_question_column(table, options)
    rows = federation.rows
    questions = [(text or "").strip() for text in table.read_text(column, rows)]
    answers = _read_answers(table, rows, processor, options.max_answer_tokens)
    images, image, missing = unique_images(table, rows)
    broken = images.find_broken()

    reasons: dict[int, str] = {}
    for place, (row, index) in enumerate(zip(rows.tolist(), image.tolist(), strict=True)):
        reason = missing.get(row) if index < 0 else broken.get(index)
        reason = reason or find_text_fault(questions[place], answers.chosen[place]) or answers.refused.get(place)
        if reason is None and pairs and not answers.is_pair[place]:
            fault = find_pair_fault(answers.chosen[place], answers.rejected[place])
            reason = fault or "chosen equals rejected once cut"
        if reason is not None:
            reasons[place] = reason
    prompts = _tokenise_prompts(processor, questions, options.max_prompt_tokens)
    for place, reason in prompts.unfit.items():
        reasons.setdefault(place, reason)
    skipped = federation.skipped + skip_rows(table, rows[list(reasons)], list(reasons.values()))
    _check_share(table, skipped, len(rows) + len(federation.skipped), options)

    kept = np.asarray([place for place in range(len(rows)) if place not in reasons], np.int64)
    used, image = np.unique(image[kept], return_inverse=True)  # images of skipped rows alone are dropped
    has_rejected = "rejected" in table.columns
    asked, lengths = prompts.which[kept], prompts.mask.sum(axis=1)
    return Examples(
        image=image.astype(np.int32),
        input_ids=_take(prompts.ids, asked, lengths, prompts.pad),
        attention_mask=_take(prompts.mask, asked, lengths, 0),
        labels=_take_labels(answers.labels, kept),
        answers=[answers.chosen[place] for place in kept],
        rows=rows[kept],
        clients=_renumber(federation.clients, kept, len(rows)),
        images=images.select(used),
        skipped=skipped,
        truncated=int(answers.cut[kept].sum()),
        rejected=_take_labels(answers.rejected_labels, kept) if has_rejected else None,
        rejected_answers=[answers.rejected[place] for place in kept] if has_rejected else None,
        rejected_truncated=int(answers.rejected_cut[kept].sum()),
        all_answers=table.read_answers(rows[kept]) if table.has_several_answers else None,
    )


def _check_share(table: Table, skipped: tuple[Skipped, ...], total: int, options: "DataOptions") -> None:
    if len(skipped) > options.max_bad_share * total:
        counted = ", ".join(f"{count} × {reason}" for reason, count in count_reasons(skipped).items())
        shown = "; ".join(f"row {s.row}{f' (idx {s.idx})' if s.idx else ''}: {s.reason}" for s in skipped[:5])
        raise UserError(
            f"{table.name}: {len(skipped)} of {total} rows cannot be used ({counted}), more than --data.max-bad-share "
            f"{options.max_bad_share:g} allows. The first are {shown}. {describe_lost(table, skipped)}Mend them, or "
            "raise the share."
        )
    if len(skipped) == total:
        raise UserError(f"{table.name}: none of the {total} rows can be used.")


def _renumber(clients: tuple[ClientRows, ...], kept: np.ndarray, total: int) -> tuple[ClientRows, ...]:
    """Give every client its rows' places among the kept rows; `Federation.rows` fixes the order of all."""
    place = np.full(total, -1, np.int64)
    place[kept] = np.arange(len(kept))
    edges = np.cumsum([len(client.rows_of(split)) for client in clients for split in SPLITS])
    parts = iter(part[part >= 0] for part in np.split(place, edges[:-1]))
    return tuple(
        dataclasses.replace(client, train=next(parts), validation=next(parts), test=next(parts)) for client in clients
    )


class _Answers(NamedTuple):
    """Both answers of N rows: as text, as labels [N, U], which were cut [N], and which are a pair [N].

    A row without a pair has no rejected labels. `refused` has rows of which the processor refuses an answer, and why.
    """

    chosen: list[str]
    rejected: list[str]
    labels: np.ndarray
    rejected_labels: np.ndarray
    cut: np.ndarray
    rejected_cut: np.ndarray
    is_pair: np.ndarray
    refused: dict[int, str]


def _read_answers(table: Table, rows: np.ndarray, processor: TextProcessor, most: int) -> _Answers:
    chosen = [(text or "").strip() for text in table.read_text("chosen", rows)]
    rejected = [""] * len(rows)
    if "rejected" in table.columns:
        rejected = [(text or "").strip() for text in table.read_text("rejected", rows)]
    both, cut, unfit = _tokenise_answers(processor, [*chosen, *rejected], most)
    refused = {place % len(rows): reason for place, reason in unfit.items()}
    labels, rejected_labels = both[: len(rows)], both[len(rows) :]
    states = [find_pair_fault(*pair) is None for pair in zip(chosen, rejected, strict=True)]
    is_pair = (labels != rejected_labels).any(axis=1) & np.asarray(states, bool)
    rejected_labels[~is_pair] = IGNORED  # so that a loss over pairs sees none
    rejected_cut = cut[len(rows) :] & is_pair
    return _Answers(chosen, rejected, labels, rejected_labels, cut[: len(rows)], rejected_cut, is_pair, refused)


def _tokenise_answers(
    processor: TextProcessor, texts: Sequence[str], most: int
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Tokenise answers: labels [N, U] of at most `most` tokens, which of the N were longer, place -> why refused.

    A text of more than `most` tokens is tokenised again to `most`, so that the processor decides how a cut answer ends.
    """
    distinct, which = number_distinct(texts)  # clients share questions and answers
    chunks = []
    long = np.zeros(len(distinct), bool)
    unfit: dict[int, str] = {}
    for start in range(0, len(distinct), CHUNK):
        part = [text[: CHARACTERS * (most + 1)] for text in distinct[start : start + CHUNK]]
        asked, refused = ask_processor(lambda texts: processor.answers(texts, most + 1), part, "answer")
        unfit |= {start + n: reason for n, reason in refused.items()}
        labels = np.array(asked, np.int32)
        over = (labels != IGNORED).sum(axis=1) > most
        labels = _widen(labels, most + 1, IGNORED)[:, :most]
        if over.any():
            cut = np.asarray(processor.answers([text for text, o in zip(part, over, strict=True) if o], most), np.int32)
            labels[over] = _widen(cut, most, IGNORED)
        long[start : start + CHUNK] = over
        used = int((labels != IGNORED).sum(axis=1).max())
        chunks.append(labels[:, :used])
    return _stack(chunks, IGNORED)[which], long[which], _list_unfit(unfit, which)


class _Prompts(NamedTuple):
    """Tokens of D distinct prompts: ids and mask [D, T], every row's place among them [N], the padding id.

    T is the longest prompt that is not too long. `unfit` has rows whose prompt is, or is refused, and why.
    """

    ids: np.ndarray
    mask: np.ndarray
    which: np.ndarray
    pad: int
    unfit: dict[int, str]


def _tokenise_prompts(processor: TextProcessor, texts: Sequence[str], most: int) -> _Prompts:
    distinct, which = number_distinct(texts)
    unfit = {place: TOO_LONG for place, text in enumerate(distinct) if len(text) > CHARACTERS * most}
    chunks, pad = [], None
    for start in range(0, len(distinct), CHUNK):
        part = ["" if start + n in unfit else text for n, text in enumerate(distinct[start : start + CHUNK])]
        asked, refused = ask_processor(processor.prompts, part, "prompt")
        ids, mask = (np.asarray(found, np.int32) for found in asked)
        unfit |= {start + n: reason for n, reason in refused.items()}
        if pad is None and (mask == 0).any():
            pad = int(ids[mask == 0][0])  # the processor's padding id, where it shows one
        lengths = mask.sum(axis=1)
        unfit |= {start + int(n): TOO_LONG for n in np.flatnonzero(lengths > most) if start + int(n) not in unfit}
        width = int(lengths[lengths <= most].max(initial=0))
        chunks.append((ids[:, :width], mask[:, :width]))
    ids, masks = _stack([ids for ids, _ in chunks], pad or 0), _stack([mask for _, mask in chunks], 0)
    # Padding was cut off on the right.
    assert (np.diff(masks, axis=1) <= 0).all(), "prompts must be padded on the right"
    return _Prompts(ids, masks, which, pad or 0, _list_unfit(unfit, which))


def _list_unfit(unfit: dict[int, str], which: np.ndarray) -> dict[int, str]:
    """Turn places among distinct texts into those of the rows [N] that have them.

    >>> _list_unfit({1: "too long"}, np.asarray([0, 1, 1]))
    {1: 'too long', 2: 'too long'}
    """
    return {row: unfit[place] for row, place in enumerate(which.tolist()) if place in unfit}


def ask_processor(ask: Callable[[list[str]], Any], texts: list[str], what: str) -> tuple[Any, dict[int, str]]:
    """Have a processor tokenise texts; also return place -> reason for those that it refuses.

    Whatever it raises is a text's fault; a refused text is tokenised as an empty one. `what` names the texts in a
    reason.
    """
    try:
        return ask(texts), {}
    except UNRELATED:
        raise
    except BaseException:  # what ends a tokenizer written in Rust is no Exception
        refused = dict[int, str]()
    for place, text in enumerate(texts):
        try:
            ask([text])
        except UNRELATED:
            raise
        except BaseException as error:
            refused[place] = f"{what} refused: {error}"[:120]
    return ask(["" if place in refused else text for place, text in enumerate(texts)]), refused


def _take(array: np.ndarray, kept: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray:
    """Take rows, as wide as the longest of them, rounded up.

    >>> _take(np.asarray([[5, 6, 0, 0], [7, 0, 0, 0]]), np.asarray([1, 0, 1]), np.asarray([2, 1]), 0).tolist()
    [[7, 0, 0, 0], [5, 6, 0, 0], [7, 0, 0, 0]]
    """
    width = -(-max(1, int(lengths[kept].max(initial=0))) // MULTIPLE) * MULTIPLE
    return _widen(array, width, fill)[kept, :width]


def _take_labels(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return _take(labels, kept, (labels != IGNORED).sum(axis=1), IGNORED)


def _stack(parts: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Lay arrays [n, T] of different widths T below each other."""
    width = max((part.shape[1] for part in parts), default=0)
    return np.concatenate([np.empty((0, width), np.int32), *(_widen(part, width, fill) for part in parts)])


def _widen(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    missing = max(0, width - array.shape[1])
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill)
