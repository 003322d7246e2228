"""A file of answers and their rewards, which somebody wrote or a model of theirs did: JSON lines, a JSON list, or CSV.

A record has `answer`, `reward` from 0 to 1, and where it is not for all `question` and `client`. A record without an
answer, of which there is one at most, has the reward of every answer that is in no other. Nothing is guessed: a file
with a record that means nothing is refused.
"""

import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from fedvlm_jax.errors import UserError
from fedvlm_jax.records.files import read_start
from fedvlm_jax.records.text_files import read_csv, read_json
from fedvlm_jax.utils.option_ranges import shorten

FLAG = "--preference.reward-file"
NAMES = ("answer", "reward", "question", "client")
MOST = 2**17  # records
LONGEST = 2**14  # characters of an answer, a question or a client's name
BREAKS = "\n\r\t"


class Judged(NamedTuple):
    """An answer that has a reward, of one question and one client, or of all where these are None."""

    answer: str
    question: str | None = None
    client: str | None = None


class Rewards(NamedTuple):
    """What a file says: the rewards of answers, and that of every other one."""

    listed: dict[Judged, float]
    default: float


def read_rewards(path: Path) -> Rewards:
    """Read a file of rewards, CSV by its name and else JSON.

    Raises:
        UserError: it cannot be read, has no answer or too many, or a record means nothing or contradicts another.
    """
    listed, defaults = dict[Judged, float](), list[float]()
    path = path.expanduser()
    if not path.is_file():  # a pipe would be read for ever
        raise UserError(f"{FLAG} {path}: there is no such file")
    read_start(path, 0)  # for what it says of one that cannot be read
    is_csv = path.suffix.lower() in (".csv", ".tsv")
    for number, record in enumerate((read_csv if is_csv else read_json)(path), 1):
        where = f"{FLAG} {path}: record {number}"
        if number > MOST:
            raise UserError(f"{FLAG} {path} has more than {MOST:,} records: leave out those that are seldom drawn")
        if isinstance(record, str):
            raise UserError(f"{where}: {record}")
        if strangers := [name for name in record if name not in NAMES]:
            raise UserError(f"{where} has {shorten(repr(strangers[0]))}: expected {', '.join(NAMES)}")
        reward = _read_reward(where, record.get("reward"), is_csv)
        answer, question, client = (_read_text(where, name, record.get(name)) for name in ("answer", *NAMES[2:]))
        if answer is None:
            if question is not None or client is not None:
                raise UserError(f"{where} has no answer, so it is for all, and names a question or a client")
            if any(reward != other for other in defaults):
                raise UserError(f"{where} has no answer, as one before it that has another reward: keep one")
            defaults.append(reward)
        elif (before := listed.setdefault(Judged(answer, question, client), reward)) != reward:
            raise UserError(
                f"{where} has the reward {reward:g} for the answer {shorten(repr(answer))}, and one before it has "
                f"{before:g}: keep one"
            )
    if not listed:
        raise UserError(f"{FLAG} {path} has no answer: expected records of {', '.join(NAMES)}")
    return Rewards(listed, defaults[0] if defaults else 0.0)


def _read_reward(where: str, value: Any, is_csv: bool) -> float:
    number = value
    if is_csv and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:  # nor is NaN
        raise UserError(f"{where} has the reward {shorten(repr(value))}: expected a number from 0 to 1")
    return float(number)


def _read_text(where: str, name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: the {name} is no text: {shorten(repr(value))}")
    if len(value) > LONGEST:
        raise UserError(f"{where}: the {name} has {len(value):,} characters: {LONGEST:,} are the most")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value if letter not in BREAKS):
        raise UserError(f"{where}: the {name} has characters that nobody sees, or is no UTF-8: {shorten(repr(value))}")
    return value.strip()
