"""Cards of examples: a test picture, its question and right answer, and what each model answers."""

from dataclasses import dataclass
from pathlib import Path

from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.validated_files import EXAMPLE_MODELS, EXAMPLES, EXAMPLES_FILE, read_json
from fedvlm_jax.utils.safe_paths import OutsideError, read_below

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a PNG
MOST_BYTES = 2**20  # bytes of a picture at most; ours have some 25 KiB


@dataclass(frozen=True)
class Answer:
    """A model's answer, its verdict, and the verdict's sign, which needs no colour."""

    model: str
    text: str
    verdict: str
    sign: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """A test example of a client: the file of its picture, a PNG, and that file's content; the texts are the data's."""

    client: str
    picture: Path
    content: bytes
    question: str
    answer: str
    answers: tuple[Answer, ...]


def read_cards(folder: Path) -> tuple[list[Card], dict[str, int]]:
    """Read a run's examples, and client -> among how many test examples they were chosen; nothing where it has none.

    Raises:
        UserError: the file is damaged, or names a picture that lies elsewhere.
    """
    path = folder / EXAMPLES
    if not path.is_file():
        return [], {}
    stored = read_json(path, EXAMPLES_FILE)
    cards = []
    for entry in stored["examples"]:
        content = _read_picture(folder, entry["picture"], path)
        if content is None:
            continue
        answers = []
        for model, name in EXAMPLE_MODELS.items():
            if model in entry["answers"]:
                answer = entry["answers"][model]
                answers.append(Answer(name, answer["text"], *judge(answer["exact_match"], answer["token_f1"])))
        texts = {name: entry[name] for name in ("client", "question", "answer")}
        cards.append(Card(picture=folder / entry["picture"], content=content, answers=tuple(answers), **texts))
    return cards, dict(stored["looked_at"])


def _read_picture(folder: Path, name: str, listed: Path) -> bytes | None:
    """Read the PNG `name` below a run's folder; None where it is gone.

    Files elsewhere and what is no PNG are refused: a report would pass them on to whoever reads the page.
    """
    try:
        content = read_below(name, [folder], MOST_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, OutsideError, ValueError):  # ValueError: a name with NUL
        content = b""
    if not content.startswith(PNG):
        raise UserError(
            f"{listed}: picture {name!r} is no PNG of at most {MOST_BYTES >> 20} MiB below {folder}; only such are put "
            "into a report. Remove the file, or the entry, if the folder is yours."
        )
    return content


def judge(exact_match: float, token_f1: float) -> tuple[str, str]:
    """Return the verdict on an answer and its sign.

    >>> judge(1.0, 1.0), judge(0.0, 0.5), judge(0.0, 0.0)
    (('right', '✓'), ('token F1 50 %', '≈'), ('wrong', '✗'))
    """
    if exact_match == 1:
        return "right", "✓"
    return (f"token F1 {100 * token_f1:.0f} %", "≈") if token_f1 else ("wrong", "✗")
