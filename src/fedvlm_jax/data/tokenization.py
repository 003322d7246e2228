"""Rows as token arrays: prompts and answers tokenised, unusable rows skipped, counted and named.

Prompts go to the model's encoder and answers to its decoder, so labels are the answers' tokens and nothing else. Pixels
are not here: images are shared and, with a frozen vision tower, read only once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data import federated_dataset as federated
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.config import SPLITS, TURNS, DataOptions
from fedvlm_jax.data.picture_views import Views, list_views, number_views
from fedvlm_jax.data.prompts import Grid, Prompt, Tiles, to_prompt
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.token_arrays import ask_processor, list_unfit, stack, take, widen
from fedvlm_jax.data.unique_images import Images, number_distinct, unique_images
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.records.conversations import UnusableError, count_places, parse_turns, place_pictures

CLIENT_QUESTION = "question_client"  # the column of the question in the client's language
CHUNK = 1024  # texts that are tokenised at a time

# More characters per token than any text has on average. A text of megabytes would make every array as wide as itself,
# so what must be too long is not even tokenised.
CHARACTERS = 16


class TextProcessor(Protocol):
    """The part of a model's processor that `encode` calls."""

    @property
    def most_pictures(self) -> int:
        """Pictures that a prompt may have."""
        ...

    @property
    def reads_turns(self) -> bool:
        """Whether it reads the turns of a conversation, or their text."""
        ...

    @property
    def cut(self) -> Callable[[int, int], Tiles | Grid] | None:
        """Height and width of a picture -> its tiles or its grid; None where all stay whole and have one size."""
        ...

    def prompts(self, asked: Sequence[str | Prompt], /) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise prompts: (input_ids, attention_mask), [B, T], padded to the longest, image tokens included."""
        ...

    def answers(self, texts: list[str], max_tokens: int, /) -> np.ndarray:
        """Tokenise answers: labels [B, U], cut to `max_tokens` and padded with -100."""
        ...


@dataclass(frozen=True, eq=False)
class Examples:
    """Every usable row of a federation, as arrays on the host.

    The first axis of all arrays is the usable rows N, in the order of `clients`, whose rows are renumbered to 0 … N-1.
    Token axes are multiples of 4. Of several answers the most frequent is the one that is trained on.
    """

    pictures: Int[np.ndarray, "examples pictures"]  # int32, a row's into `images`, -1 where it has no more
    view: Int[np.ndarray, "examples views"]  # int32, into `views`: all that the tower sees of them, -1 after the last
    input_ids: Int[np.ndarray, "examples tokens"]  # int32, image tokens included
    attention_mask: Int[np.ndarray, "examples tokens"]  # int32, 1 where `input_ids` counts
    labels: Int[np.ndarray, "examples labels"]  # int32, -100 where nothing is to be learnt
    answers: list[str]  # gold answers as text
    rows: Int[np.ndarray, " examples"]  # int64, the table's row numbers
    clients: tuple[federated.ClientRows, ...]
    images: Images
    views: Views
    skipped: tuple[federated.Skipped, ...]  # for the run's folder
    truncated: int  # answers that were cut to `max_answer_tokens`
    # As `labels`; all -100 where a row has no rejected answer that differs from the chosen one. None, as the rejected
    # answers, where the data has no column `rejected`.
    rejected: Int[np.ndarray, "examples labels"] | None = None
    rejected_answers: list[str] | None = None  # as they stand in the data
    rejected_truncated: int = 0
    all_answers: list[tuple[str, ...]] | None = None  # every person's, where the data has several
    image_tokens: int | None = None  # of the row with most, where pictures have grids of their own

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image(self) -> Int[np.ndarray, " examples"]:
        """A row's first picture, into `images`."""
        return self.pictures[:, 0]


def require_pairs(table: Table) -> None:
    """Refuse a table without rejected answers, by a `UserError`."""
    if "rejected" not in table.columns:
        raise UserError(
            f"{table.name} has no column 'rejected', only {', '.join(table.columns)}: there is no preference to learn "
            "from. Use --objective sft, or data with a chosen and a rejected answer in every row."
        )


def find_question_column(table: Table, options: DataOptions) -> str:
    """Find the column whose questions are asked, by default those in the client's language where the table has them.

    Raises:
        UserError: the options say so, and the table does not have it.
    """
    has_it = CLIENT_QUESTION in table.columns
    if options.prompt == "client-language" and not has_it:
        raise UserError(
            f"--data.prompt {options.prompt} needs the column {CLIENT_QUESTION!r}, which {table.name} does not have; "
            "use --data.prompt neutral, or add the column."
        )
    return CLIENT_QUESTION if has_it and options.prompt != "neutral" else "question"


def encode(
    table: Table,
    federation: federated.Federation,
    processor: TextProcessor,
    options: DataOptions,
    *,
    pairs: bool = False,
) -> Examples:
    """Tokenise and check all rows of a federation. Every distinct text is tokenised once, every image decoded once.

    With `pairs`, rows without a rejected answer, or whose two answers are the same tokens, are skipped, too.

    Raises:
        UserError: a column is missing, or more than `options.max_bad_share` of the rows are unusable.
    """
    examples = encode_usable(table, federation, processor, options, pairs=pairs)
    federated.check_share(table, examples.skipped, len(federation.rows) + len(federation.skipped), options)
    return examples


def encode_usable(
    table: Table,
    federation: federated.Federation,
    processor: TextProcessor,
    options: DataOptions,
    *,
    pairs: bool = False,
) -> Examples:
    """Tokenise and check rows as `encode` does, however many of them are unusable: the reasons are in `skipped`.

    Raises:
        UserError: a column is missing.
    """
    if pairs:
        require_pairs(table)
    rows, column = federation.rows, find_question_column(table, options)
    questions = table.read_stripped(column, rows)
    has_turns = TURNS in table.columns and column == "question" and processor.reads_turns
    turns = table.read_text(TURNS, rows) if has_turns else [None] * len(rows)
    chosen, rejected, is_pair, refused = _read_answers(table, rows, processor, options.max_answer_tokens)
    images, pictures, missing = unique_images(table, rows)
    tiles, refused_pictures = _cut(images, processor.cut)
    broken = refused_pictures | images.find_broken()

    reasons: dict[int, str] = {}
    for place, (row, held) in enumerate(zip(rows.tolist(), pictures.tolist(), strict=True)):
        reason = missing.get(row) or next((broken[index] for index in held if index in broken), None)
        if not reason and (count := sum(index >= 0 for index in held)) > processor.most_pictures:
            reason = f"{format_count(count, 'picture')}, the model takes {processor.most_pictures}"
        reason = reason or federated.find_text_fault(questions[place], chosen.texts[place]) or refused.get(place)
        if not reason and pairs and not is_pair[place]:
            reason = federated.find_pair_fault(chosen.texts[place], rejected.texts[place])
            reason = reason or "chosen equals rejected once cut"
        if reason:
            reasons[place] = reason
    asked, refused = _ask(questions, turns, pictures, tiles, set(reasons))
    ids, mask, which, pad, unfit = _tokenise_prompts(processor, asked, options.max_prompt_tokens)
    for place, reason in (refused | unfit).items():
        reasons.setdefault(place, reason)
    skipped = federation.skipped + federated.skip_rows(table, rows[list(reasons)], list(reasons.values()))
    kept = np.asarray([place for place in range(len(rows)) if place not in reasons], np.int64)
    cut = dict(zip(images.keys, tiles, strict=True))
    images, pictures = images.narrow(pictures[kept])  # images of skipped rows alone are dropped
    tiles = [cut[key] for key in images.keys]
    has_rejected = "rejected" in table.columns
    views, view = list_views(images, tiles), number_views(pictures, tiles)
    return Examples(
        pictures=pictures,
        view=view,
        input_ids=take(ids, which[kept], mask, pad),
        attention_mask=take(mask, which[kept], mask, 0),
        labels=take(chosen.labels, kept, chosen.labels != IGNORED, IGNORED),
        answers=[chosen.texts[place] for place in kept],
        rows=rows[kept],
        clients=_renumber(federation.clients, kept),
        images=images,
        views=views,
        skipped=skipped,
        truncated=int(chosen.cut[kept].sum()),
        rejected=take(rejected.labels, kept, rejected.labels != IGNORED, IGNORED) if has_rejected else None,
        rejected_answers=[rejected.texts[place] for place in kept] if has_rejected else None,
        rejected_truncated=int(rejected.cut[kept].sum()),
        all_answers=table.read_answers(rows[kept]) if table.has_several_answers else None,
        image_tokens=None if views.grids is None else int(views.count_tokens(view).max(initial=1)),
    )


def _cut(images: Images, cut: Callable[[int, int], Tiles | Grid] | None) -> tuple[list[Tiles | Grid], dict[int, str]]:
    """Cut every image; also index -> why one cannot be, which then counts as whole."""
    if cut is None:
        return [Tiles()] * len(images), {}
    found, refused = list[Tiles | Grid](), dict[int, str]()
    for index, size in enumerate(images.read_sizes()):
        try:
            found.append(cut(*size))
        except UserError as error:
            found.append(cut(1, 1))
            refused[index] = str(error)
    return found, refused


def _ask(
    questions: list[str], turns: Sequence[str | None], pictures: np.ndarray, tiles: list[Tiles | Grid], lost: set[int]
) -> tuple[list[str | Prompt], dict[int, str]]:
    """List what each row asks, a text where it is one question about a whole picture; also place -> why it cannot.

    Rows at the places `lost` are not looked at.
    """
    asked, refused = list[str | Prompt](), dict[int, str]()
    for place, (question, said, row) in enumerate(zip(questions, turns, pictures.tolist(), strict=True)):
        prompt = Prompt(question)
        if place not in lost:
            cut = tuple(tiles[picture] for picture in row if picture >= 0)
            try:
                held = place_pictures(parse_turns(said), len(cut)) if said else ()
                prompt = Prompt(question, tuple(held), cut)
            except UnusableError as error:
                refused[place] = str(error)
            if prompt.turns and (places := count_places(prompt.turns)) != len(cut):
                refused[place] = (
                    f"turns with places for {format_count(places, 'picture')}, and {format_count(len(cut), 'picture')}"
                )
        asked.append(question if prompt == Prompt(question) else prompt)
    return asked, refused


def _renumber(clients: tuple[federated.ClientRows, ...], kept: np.ndarray) -> tuple[federated.ClientRows, ...]:
    """Give every client its rows' places among the kept rows; `Federation.rows` fixes the order of all."""
    sizes = [len(client.rows_of(split)) for client in clients for split in SPLITS]
    edges = np.searchsorted(kept, np.cumsum([0, *sizes])).tolist()
    parts = iter([np.arange(start, end) for start, end in itertools.pairwise(edges)])
    return tuple(
        dataclasses.replace(client, train=next(parts), validation=next(parts), test=next(parts)) for client in clients
    )


class _Side(NamedTuple):
    """One answer of each of N rows: as text, as labels [N, U], and which were cut [N]."""

    texts: list[str]
    labels: np.ndarray
    cut: np.ndarray


def _read_answers(
    table: Table, rows: np.ndarray, processor: TextProcessor, most: int
) -> tuple[_Side, _Side, np.ndarray, dict[int, str]]:
    """Read the chosen and the rejected answers, which rows are a pair [N], and those refused by the processor."""
    chosen = table.read_stripped("chosen", rows)
    rejected = table.read_stripped("rejected", rows) if "rejected" in table.columns else [""] * len(rows)
    both, cut, unfit = tokenise_answers(processor, [*chosen, *rejected], most)
    refused = {place % len(rows): reason for place, reason in unfit.items()}
    labels, rejected_labels = both[: len(rows)], both[len(rows) :]
    states = [federated.find_pair_fault(*pair) is None for pair in zip(chosen, rejected, strict=True)]
    is_pair = (labels != rejected_labels).any(axis=1) & np.asarray(states, bool)
    rejected_labels[~is_pair] = IGNORED  # so that a loss over pairs sees none
    right = _Side(rejected, rejected_labels, cut[len(rows) :] & is_pair)
    return _Side(chosen, labels, cut[: len(rows)]), right, is_pair, refused


def tokenise_answers(
    processor: TextProcessor, texts: Sequence[str], most: int
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Tokenise answers: labels [N, U] of at most `most` tokens, which of the N were longer, place -> why refused."""
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
        labels = widen(labels, most + 1, IGNORED)[:, :most]
        if over.any():  # tokenised again, so that the processor decides how a cut answer ends
            cut = np.asarray(processor.answers([text for text, o in zip(part, over, strict=True) if o], most), np.int32)
            labels[over] = widen(cut, most, IGNORED)
        long[start : start + CHUNK] = over
        used = int((labels != IGNORED).sum(axis=1).max())
        chunks.append(labels[:, :used])
    return stack(chunks, IGNORED)[which], long[which], list_unfit(unfit, which)


def _tokenise_prompts(
    processor: TextProcessor, asked: Sequence[str | Prompt], most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, dict[int, str]]:
    """Tokenise D distinct prompts: ids and mask [D, T], every text's place among them [N], the padding id, the unfit.

    T is the longest prompt that is not too long. The unfit are rows whose prompt is, or is refused, and why.
    """
    distinct, which = number_distinct(asked)
    unfit = {
        place: federated.TOO_LONG for place, one in enumerate(distinct) if to_prompt(one).characters > CHARACTERS * most
    }
    chunks, pad = [], None
    for start in range(0, len(distinct), CHUNK):
        part = ["" if start + n in unfit else one for n, one in enumerate(distinct[start : start + CHUNK])]
        made, refused = ask_processor(processor.prompts, part, "prompt")
        ids, mask = (np.asarray(found, np.int32) for found in made)
        unfit |= {start + n: reason for n, reason in refused.items()}
        if pad is None and (mask == 0).any():
            pad = int(ids[mask == 0][0])  # the processor's padding id, where it shows one
        lengths = mask.sum(axis=1)
        unfit |= {
            start + int(n): federated.TOO_LONG for n in np.flatnonzero(lengths > most) if start + int(n) not in unfit
        }
        width = int(lengths[lengths <= most].max(initial=0))
        chunks.append((ids[:, :width], mask[:, :width]))
    ids, masks = stack([ids for ids, _ in chunks], pad or 0), stack([mask for _, mask in chunks], 0)
    assert (np.diff(masks, axis=1) <= 0).all(), "prompts must be padded on the right"
    return ids, masks, which, pad or 0, list_unfit(unfit, which)
