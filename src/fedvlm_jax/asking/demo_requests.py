"""Requests of the demo's page and what it is sent, as JSON: bounded, read as a stranger's, and cleaned."""

import base64
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from fedvlm_jax.asking.answers_shown import describe_answer
from fedvlm_jax.asking.asker import Answer, Answers, Sample
from fedvlm_jax.asking.question import MOST_CHARACTERS, Shown, check_picture
from fedvlm_jax.data.config import MOST_PICTURES
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.untrusted_text import clean

MOST_UPLOAD = 2**25
"""Bytes of all pictures of a question at most: 32 MiB."""

MOST_BODY = MOST_UPLOAD * 4 // 3 + 2**17
"""Bytes of a request at most: the pictures in base64, and the question."""

MOST_PARTS = 2 * MOST_CHARACTERS
"""Lists, objects and commas in a request at most: of JSON that is nothing else, each takes 30 times its bytes."""

NUMBER = re.compile(r"[0-9]{1,12}")


class Models(Protocol):
    """The models that answer, as `asker.Asker` has them."""

    @property
    def clients(self) -> Sequence[str]:
        """The clients' names."""
        ...

    @property
    def most_pictures(self) -> int:
        """Most pictures of a question."""
        ...

    @property
    def chooses(self) -> bool:
        """Whether no question is read."""
        ...

    @property
    def max_pixels(self) -> int:
        """Most pixels of a picture."""
        ...

    def ask(self, client: str, question: str, shown: Shown) -> Sequence[Answers | str]:
        """Answer a question; raises `UserError` for one that cannot be asked."""
        ...

    def list_samples(self, client: str, most: int) -> Sequence[Sample]:
        """List rows that can be asked about; raises `UserError` for an unknown client."""
        ...

    def read_sample(self, number: int) -> Shown:
        """Read a row's pictures; raises `UserError` where one has gone."""
        ...


class RefusedError(Exception):
    """A request that is not answered: the status, and the line that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def describe_sample(sample: Sample) -> dict[str, Any]:
    """Describe a sample for the page."""
    texts = {"question": sample.question, "answer": sample.answer}
    return {"number": sample.number, **{name: clean(text, "\n") for name, text in texts.items()}}


def write_answer(model: str, answer: Answer) -> dict[str, Any]:
    """Describe a model's answer for the page."""
    classes = [(clean(name), share) for name, share in answer.classes]
    return {"model": model, **describe_answer(Answer(clean(answer.text, "\n"), tuple(classes)))}


def read_form(body: bytes) -> dict[str, Any]:
    """Read what the page sent: `client` and `question`, and `pictures` in base64 or the number of a `sample`.

    Raises:
        RefusedError: it is something else.
    """
    try:
        if sum(map(body.count, (b"[", b"{", b","))) > MOST_PARTS:
            raise ValueError
        sent = json.loads(body)
        if not isinstance(sent, dict):
            raise TypeError
        wanted = {"client": str, "question": str, "pictures": list, "sample": int | None}
        form = {"client": "", "question": "", "pictures": [], "sample": None} | sent
        if any(not isinstance(form[name], kind) for name, kind in wanted.items()):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise RefusedError(400, "the request is not as this server's page sends it") from None
    return form


def read_pictures(given: Sequence[Any], models: Models) -> Shown:
    """Read the pictures of a question, in base64.

    Raises:
        UserError: there are none or too many, or one cannot be decoded.
    """
    if not given:
        raise UserError("choose a picture first")
    if len(given) > MOST_PICTURES:
        raise UserError(f"{len(given)} pictures of one question; {MOST_PICTURES} are the most")
    contents = list[bytes]()
    for number, text in enumerate(given, start=1):
        name = "the picture" if len(given) == 1 else f"picture {number}"
        try:
            contents.append(base64.b64decode(text, validate=True))
        except (ValueError, TypeError):
            raise UserError(f"{name} did not arrive whole: try again") from None
        check_picture(contents[-1], name, models.max_pixels)
    if sum(map(len, contents)) > MOST_UPLOAD:
        raise UserError(f"pictures of more than {MOST_UPLOAD >> 20} MiB are not taken")
    return Shown((tuple(f"picture {number}" for number in range(1, len(contents) + 1)),), contents=tuple(contents))
