"""The arrays that a run's rewards read, made of its examples and its file before anything is trained.

Document frequencies are counted over the training answers of all clients that train: one count that, as it is, leaves
the clients, without noise and outside of what messages are counted as. No published federated method has it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.data.tokenization import Examples, TextProcessor, tokenise_answers
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.metrics.cider import weigh_documents
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.objectives.reward_tables import tabulate_answers, tabulate_rarity
from fedvlm_jax.records.reward_file import FLAG, read_rewards
from fedvlm_jax.utils.option_ranges import shorten


class RewardTables(NamedTuple):
    """What a run's rewards read.

    Attributes:
        arrays: by name, the same for all examples.
        questions: the number of every example's question [N]; None where no reward looks at it.
        note: what is told of a file.
    """

    arrays: dict[str, np.ndarray]
    questions: Int[np.ndarray, " examples"] | None = None
    note: str = ""


def make_reward_tables(
    options: PreferenceOptions,
    examples: Examples,
    questions: Sequence[str],
    processor: TextProcessor,
    frame: Sequence[int],
    most: int,
) -> RewardTables:
    """Make the arrays of the rewards that the options name.

    Args:
        options: of the objective.
        examples: of all clients.
        questions: what each of them asks, as text.
        processor: tokenises the file's answers.
        frame: tokens that begin and end an answer.
        most: tokens that an answer may have, with its frame.

    Raises:
        UserError: the file cannot be read, contradicts itself in tokens, or has no answer that can be given.
    """
    arrays = dict[str, np.ndarray]()
    if "cider" in options.rewards:
        training = [row for client in examples.clients if client.trains for row in client.train]
        arrays |= count_documents(examples.labels[training], frame)
    if options.reward_file is None:
        return RewardTables(arrays)
    rewards, numbers = read_rewards(options.reward_file), dict[str, int]()
    for judged in rewards.listed:
        if judged.question is not None:
            numbers.setdefault(judged.question, len(numbers) + 1)
    asked, clients = {*questions}, {client.name: place + 1 for place, client in enumerate(examples.clients)}
    labels, long, refused = tokenise_answers(processor, [judged.answer for judged in rewards.listed], most)
    found, texts, lost = dict[tuple[int, int, tuple[int, ...]], float](), {}, [0, 0, 0]
    for place, ((answer, question, client), reward) in enumerate(rewards.listed.items()):
        faults = (question is not None and question not in asked, client is not None and client not in clients)
        unsaid = bool(long[place]) or place in refused
        if any(kinds := (*faults, unsaid)):
            lost[kinds.index(True)] += 1
            continue
        number, who = numbers[question] if question is not None else 0, clients[client] if client is not None else 0
        key = (number, who, _strip(labels[place], frame))
        if found.setdefault(key, reward) != reward:
            raise UserError(
                f"{FLAG} {options.reward_file}: the answers {shorten(repr(texts[key]))} and {shorten(repr(answer))} "
                f"are the same tokens of the model, and have the rewards {found[key]:g} and {reward:g}"
            )
        texts.setdefault(key, answer)
    reasons = (
        "for questions that no example asks", "for clients that there are not", f"of more than {most} tokens, or none",
    )  # fmt: skip
    told = ", ".join(f"{count:,} {reason}" for count, reason in zip(lost, reasons, strict=True) if count)
    left_out = f"; left out: {told}" if told else ""
    if not found:
        raise UserError(f"{FLAG} {options.reward_file} has no answer that can be given{left_out}")
    note = f"{FLAG}: {format_count(len(found), 'answer')}, {rewards.default:g} for every other{left_out}"
    of_examples = np.asarray([numbers.get(text, 0) for text in questions], np.int32)
    return RewardTables(arrays | tabulate_answers(found, rewards.default), of_examples, note)


def count_documents(labels: Iterable[np.ndarray], frame: Sequence[int]) -> dict[str, np.ndarray]:
    """Count in how many gold answers an n-gram of tokens is, as the reward `cider` reads it.

    Args:
        labels: of the answers, -100 behind their end.
        frame: tokens that do not count.
    """
    rarity = weigh_documents([[_strip(row, frame)] for row in labels])
    return tabulate_rarity(rarity.weights, rarity.most)


def _strip(tokens: np.ndarray, frame: Sequence[int]) -> tuple[int, ...]:
    return tuple(token for token in tokens.tolist() if token != IGNORED and token not in frame)
