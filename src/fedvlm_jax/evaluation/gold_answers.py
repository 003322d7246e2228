"""Gold answers as a model could write them, the room that they take, and those that no model could ever give.

Generated answers reach the metrics as decoded tokens. So gold answers go through the same tokens: both sides then
write spaces beside location tokens and the like alike. A gold answer that tokens cannot write stays as the data have
it, and is counted, because a metric that nothing can reach looks like a bad model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.token_arrays import ask_processor
from fedvlm_jax.data.tokenization import CHARACTERS, CHUNK
from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.metrics.answer_tokens import normalise
from fedvlm_jax.models import Processor
from fedvlm_jax.models.beam_search import Settings

STEP = 16
"""Answers get room for a multiple of so many tokens, so that data sets of short answers share one program."""

UNWRITABLE = "with text that the tokenizer cannot write"


class Gold(NamedTuple):
    """Gold answers, ready to be compared with generated ones."""

    texts: list[str]  # [N] as tokens write them; as given where they are not scored or no tokens write them
    all: list[list[str]]  # [N] all that a prediction is compared with: the text alone, or every person's answer
    longest: int  # tokens of the longest scored answer, with BOS and EOS; one more than the bound if one exceeds it
    budget: int  # tokens that are generated at most
    scored: int
    unreachable: dict[str, int]  # why a scored answer cannot be given -> how many


def read_gold(
    answers: Sequence[str],
    rows: Iterable[int],
    processor: Processor,
    most: int,
    settings: Settings,
    several: Sequence[Sequence[str]] | None = None,
) -> Gold:
    """Write the gold answers of the scored rows as a model could, and find those that it cannot.

    Args:
        answers: [N] as the data have them.
        rows: places among them of those that are scored, each once.
        processor: tokenises and decodes.
        most: no answer gets more tokens than this, BOS and EOS included.
        settings: how answers are searched for.
        several: [N] what all people answered, where several did; room and faults are of `answers` alone.
    """
    rows = list(rows)
    scored = [answers[row] for row in rows]
    written, faults, longest = _write(scored, processor, most, settings)
    texts = [written.get(text, text) for text in answers]
    compared = [[text] for text in texts]
    if several is not None:
        others, _, _ = _write([text for row in rows for text in several[row]], processor, most, settings)
        compared = [[others.get(text, text) for text in of_row] for of_row in several]
    unreachable = dict(Counter(faults[text] for text in scored if text in faults))
    budget = min(most, -(-longest // STEP) * STEP)
    return Gold(texts, compared, longest, budget, len(scored), unreachable)


def _write(
    texts: Sequence[str], processor: Processor, most: int, settings: Settings
) -> tuple[dict[str, str], dict[str, str], int]:
    """Return texts as tokens write them, why others cannot be given, and the tokens of the longest."""
    written: dict[str, str] = {}
    faults: dict[str, str] = {}
    longest = 1
    distinct = list(dict.fromkeys(texts))
    for start in range(0, len(distinct), CHUNK):
        part = distinct[start : start + CHUNK]
        # Of a text of megabytes only the beginning is tokenised: it is too long in any case.
        begun = [text[: CHARACTERS * (most + 1)] for text in part]
        labels, refused = ask_processor(lambda texts: processor.answers(texts, most + 1), begun, "answer")
        faults |= {part[place]: UNWRITABLE for place in refused}
        longest = max(longest, int((labels != IGNORED).sum(axis=1).max()))
        for text, ids, decoded in zip(part, labels, processor.decode(labels), strict=True):
            tokens = ids[ids != IGNORED]
            if text in faults:
                continue
            if len(tokens) > most:
                faults[text] = f"longer than {format_count(most, 'token')}"
            elif not _is_same(decoded, text):
                faults[text] = UNWRITABLE
            else:
                written[text] = decoded
                if ban := _find_ban(tokens, settings):
                    faults[text] = ban
    return written, faults, longest


def _find_ban(ids: Int[np.ndarray, " tokens"], settings: Settings) -> str:
    """Say why the search never gives these tokens; empty if it may.

    The bans are those of `models.beam_search.process_scores`, whose history begins with the decoder's start token.
    """
    if len(ids) < settings.min_length or len(ids) - 1 < settings.min_new_tokens:
        return "shorter than min_length or min_new_tokens"
    size = settings.no_repeat_ngram_size
    history = [settings.decoder_start_token_id, *ids.tolist()]
    grams = [tuple(history[start : start + size]) for start in range(len(history) - size + 1)] if size else []
    repeats = len(set(grams)) < len(grams)
    return f"repeating {format_count(size, 'token')}, which no_repeat_ngram_size bans" if repeats else ""


def _is_same(decoded: str, text: str) -> bool:
    """Compare but for spaces, which tokens write in their way."""
    return "".join(normalise(decoded).split()) == "".join(normalise(text).split())
