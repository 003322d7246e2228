"""Answers as a terminal's table and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedvlm_jax.asking.asker import Answer, Answers, list_models
from fedvlm_jax.asking.question import Shown
from fedvlm_jax.reporting.tables import Table
from fedvlm_jax.utils.untrusted_text import cut

LIKELIEST = 3
"""Classes whose probabilities a table shows."""

LONG = 60
"""Characters of a picture's name that a table shows."""


def write_answer(answer: Answer) -> str:
    """Write an answer on one line; of classes the likeliest.

    >>> write_answer(Answer("cat", (("cat", 0.75), ("dog", 0.25)))), write_answer(Answer(""))
    ('cat 75 %, dog 25 %', '(nothing)')
    """
    likeliest = [f"{name} {100 * share:.0f} %" for name, share in answer.classes[:LIKELIEST]]
    return ", ".join(likeliest) or " ".join(answer.text.split()) or "(nothing)"


def tabulate_answers(client: str, question: str, shown: Shown, answers: Sequence[Answers | str]) -> list[Table]:
    """Tabulate answers: a row for each model; or of several questions a row for each, and a column for each model."""
    models, title = list_models(answers), f"{client}: {cut(' '.join(question.split()), 200)}"
    if len(answers) == 1 and not isinstance(answers[0], str):
        rows = tuple((name, write_answer(answers[0][model])) for model, name in models.items())
        return [Table(title, ("model", "answer"), rows, prose=frozenset({1}))]
    found = list[tuple[str, ...]]()
    for names, each in zip(shown.rows, answers, strict=True):
        refused = [f"not asked: {each}"] * len(models)
        told = refused if isinstance(each, str) else [write_answer(each[model]) for model in models]
        found.append((cut(", ".join(Path(name).name for name in names), LONG), *told))
    columns = ("picture", *models.values())
    return [Table(title, columns, tuple(found), prose=frozenset(range(1, len(columns))))]


def write_answers(
    run: Path, client: str, question: str, shown: Shown, answers: Sequence[Answers | str], notes: Sequence[str]
) -> str:
    """Write answers as JSON: for each question its pictures, and each model's `answer` or why it was not asked."""
    entries = [
        {"images": [str(Path(shown.folder or "", name)) for name in names], **_describe(each)}
        for names, each in zip(shown.rows, answers, strict=True)
    ]
    whole = {"run": str(run), "client": client, "question": question, "asked": entries, "notes": list(notes)}
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _describe(answers: Answers | str) -> dict[str, object]:
    if isinstance(answers, str):
        return {"refused": answers}
    return {"answers": {model: describe_answer(answer) for model, answer in answers.items()}}


def describe_answer(answer: Answer) -> dict[str, object]:
    """Describe an answer as JSON has it.

    >>> describe_answer(Answer("cat", (("cat", 0.75),)))
    {'answer': 'cat', 'classes': [{'name': 'cat', 'probability': 0.75}]}
    """
    classes = [{"name": name, "probability": share} for name, share in answer.classes]
    return {"answer": answer.text, **({"classes": classes} if classes else {})}
