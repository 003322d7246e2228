"""A few test examples with what the models that a run ends with answer: `examples.json` and pictures in `examples/`.

They are chosen without chance: clients evenly spaced in the federation's order, and of each one's first test pictures
those first where zero-shot and personal model answer differently. So they show what training changed, and measure
nothing. The evaluator's own program answers, in its own shapes.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree

from fedvlm_jax.data.images import Images
from fedvlm_jax.evaluation.clients import Adapters
from fedvlm_jax.evaluation.texts import exact_match, token_f1
from fedvlm_jax.evaluation.tokens import normalise
from fedvlm_jax.federation.driver import Driver
from fedvlm_jax.runs.cards import FILE
from fedvlm_jax.runs.config import without_extras
from fedvlm_jax.runs.prepare import Prepared
from fedvlm_jax.runs.scoring import is_same
from fedvlm_jax.runs.storage import write_json

__all__ = ["write_examples"]

PICTURES = "examples"

CLIENTS = 6
"""Of at most so many clients; more would leave one example each."""

SIDE, COLOURS = 176, 128
"""Pictures are brought to this many pixels and colours: at most some 25 KiB each, sharp on a phone."""

Answers = dict[str, dict[int, list[str]]]
"""model -> client -> texts."""


def write_examples(
    prepared: Prepared, params: PyTree, adapters: PyTree, federation: Driver | None, folder: Path
) -> None:
    """Ask the models about a few test examples of a few clients, and write what they say.

    Nothing is written where no examples are asked for, or where the test split is left alone or empty.

    Args:
        prepared: the run.
        params: the base, with what the method added to it.
        adapters: every client's own [C, …].
        federation: with the server's state that belongs to them; None where nothing is shared.
        folder: the run's.
    """
    options = prepared.run.evaluation
    rows = _list_candidates(prepared) if options.test else {}
    if not rows:
        return
    answers = _ask(prepared, params, adapters, federation, rows)
    told: list[dict[str, Any]] = []
    for place, client in enumerate(rows):
        wanted = options.examples // len(rows) + (place < options.examples % len(rows))
        before, after = answers["zero_shot"][client], answers["personal"][client]
        for chosen in _choose(before, after, wanted):
            row = int(rows[client][chosen])
            own = {model: by_client[client][chosen] for model, by_client in answers.items()}
            told.append(_describe(prepared, client, row, own, f"{PICTURES}/{len(told):02d}.png"))
            _save_picture(prepared.examples.images, int(prepared.examples.image[row]), folder / told[-1]["picture"])
    looked = {prepared.examples.clients[client].name: len(own) for client, own in rows.items()}
    write_json(folder / FILE, {"looked_at": looked, "examples": told})


def _list_candidates(prepared: Prepared) -> dict[int, Int[np.ndarray, " rows"]]:
    """client -> its first test rows with pictures of their own: as many as a batch holds, which cost no more."""
    examples, wanted = prepared.examples, prepared.run.evaluation.examples
    having = [number for number in prepared.participants if len(examples.clients[number].test)]
    count = min(CLIENTS, wanted, len(having))
    spaced = [having[place] for place in np.linspace(0, len(having) - 1, count).round().astype(int)] if count else []
    rows = {}
    for number in spaced:
        asked: dict[int, list[int]] = {}  # picture -> the rows that ask about it
        for row in examples.clients[number].test.tolist():
            asked.setdefault(int(examples.image[row]), []).append(row)
        # One question about each picture, the next one about the next, so that all kinds are seen.
        each = [questions[place % len(questions)] for place, questions in enumerate(asked.values())]
        rows[number] = np.asarray(each[: prepared.evaluator.batch])
    return rows


def _ask(
    prepared: Prepared,
    params: PyTree,
    adapters: PyTree,
    federation: Driver | None,
    rows: dict[int, Int[np.ndarray, " rows"]],
) -> Answers:
    run, session, evaluator = prepared.run, prepared.session, prepared.evaluator

    def personal(numbers: np.ndarray) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[numbers], adapters)

    models: dict[str, Adapters | None] = {"personal": personal}
    general = federation if run.evaluation.global_model else None
    same = general is not None and is_same(personal, general.global_adapters, prepared.participants[:1])
    if general is not None and not same:
        models["global"] = general.global_adapters
    zero_shot: Answers = session.remember(
        ("examples of the base", run.data, run.seed, without_extras(run).evaluation, prepared.objective.pairs),
        lambda: evaluator.ask(session.params, {"zero_shot": None}, rows),
    )
    found = evaluator.ask(params, models, rows)
    if same:
        found["global"] = found["personal"]
    return {
        model: answers for model in ("zero_shot", "global", "personal") if (answers := (zero_shot | found).get(model))
    }


def _choose(before: list[str], after: list[str], count: int) -> list[int]:
    """Places of the examples to show: changed answers first, then the others; in the order of the rows."""
    alike = [normalise(old) == normalise(new) for old, new in zip(before, after, strict=True)]
    return sorted(sorted(range(len(alike)), key=alike.__getitem__)[:count])


def _describe(prepared: Prepared, client: int, row: int, answers: dict[str, str], picture: str) -> dict[str, Any]:
    examples, table = prepared.examples, prepared.session.table
    column = "question" if prepared.run.data.prompt == "neutral" else "question_client"
    gold = [[examples.answers[row]]]
    return {
        "client": examples.clients[client].name,
        "row": int(examples.rows[row]),
        "picture": picture,
        "question": (table.read_text(column, examples.rows[[row]])[0] or "").strip(),
        "answer": examples.answers[row],
        "answers": {
            model: {
                "text": text,
                "exact_match": float(exact_match([text], gold)[0]),
                "token_f1": float(token_f1([text], gold)[0]),
            }
            for model, text in answers.items()
        },
    }


def _save_picture(images: Images, index: int, file: Path) -> None:
    picture = images.decode(index)
    picture.thumbnail((SIDE, SIDE))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS).save(file, optimize=True)
