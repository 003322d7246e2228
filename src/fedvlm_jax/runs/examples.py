"""A few test examples with what the models that a run ends with answer: `examples.json` and pictures in `examples/`.

They are chosen without chance: clients evenly spaced in the federation's order, and of each one's first test pictures
those first where zero-shot and personal model answer differently. So they show what training changed, and measure
nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fedvlm_jax.data.encode import find_question_column
from fedvlm_jax.data.images import Images
from fedvlm_jax.errors import naming
from fedvlm_jax.evaluation.texts import exact_match, token_f1
from fedvlm_jax.evaluation.tokens import normalise
from fedvlm_jax.runs.cards import FILE, MODELS
from fedvlm_jax.runs.prepare import Prepared
from fedvlm_jax.runs.scoring import ScoredModels
from fedvlm_jax.runs.storage import write_json

__all__ = ["write_examples"]

PICTURES = "examples"

CLIENTS = 6
"""Of at most so many clients; more would leave one example each."""

CANDIDATES = 32
"""Of each as many pictures are looked at: those are shown whose answers changed."""

SIDE, COLOURS = 176, 128
"""Pictures are brought to this many pixels and colours: at most some 25 KiB each, sharp on a phone."""


def write_examples(prepared: Prepared, scored: ScoredModels, folder: Path) -> None:
    """Write what the models said to a few test examples of a few clients.

    Nothing is written where no examples are asked for, or where the test split is left alone or empty.

    Args:
        prepared: the run.
        scored: how its models did, with what they said.
        folder: the run's.
    """
    examples, options = prepared.examples, prepared.run.evaluation
    places = _list_candidates(prepared) if options.test else {}
    if not places:
        return
    told: list[dict[str, Any]] = []
    for number, (client, own) in enumerate(places.items()):
        name, test = examples.clients[client].name, examples.clients[client].test
        answers = {
            model: [by_split["test"].texts[name][place] for place in own]
            for model in MODELS
            if (by_split := scored.get(model))
        }
        wanted = options.examples // len(places) + (number < options.examples % len(places))
        for chosen in _choose(answers["zero_shot"], answers["personal"], wanted):
            row = int(test[own[chosen]])
            said = {model: texts[chosen] for model, texts in answers.items()}
            told.append(_describe(prepared, client, row, said, f"{PICTURES}/{len(told):02d}.png"))
            _save_picture(examples.images, int(examples.image[row]), folder / told[-1]["picture"])
    looked = {examples.clients[client].name: len(own) for client, own in places.items()}
    write_json(folder / FILE, {"looked_at": looked, "examples": told})


def _list_candidates(prepared: Prepared) -> dict[int, list[int]]:
    """client -> places among its test examples of the first with pictures of their own."""
    examples, wanted = prepared.examples, prepared.run.evaluation.examples
    having = [number for number in prepared.scored if len(examples.clients[number].test)]
    count = min(CLIENTS, wanted, len(having))
    spaced = [having[place] for place in np.linspace(0, len(having) - 1, count).round().astype(int)] if count else []
    places = {}
    for number in spaced:
        asked: dict[int, list[int]] = {}  # picture -> the places that ask about it
        for place, row in enumerate(examples.clients[number].test.tolist()):
            asked.setdefault(int(examples.image[row]), []).append(place)
        # One question about each picture, the next one about the next, so that all kinds are seen.
        places[number] = [own[turn % len(own)] for turn, own in enumerate(asked.values())][:CANDIDATES]
    return places


def _choose(before: list[str], after: list[str], count: int) -> list[int]:
    """Places of the examples to show: changed answers first, then the others; in the order of the rows."""
    alike = [normalise(old) == normalise(new) for old, new in zip(before, after, strict=True)]
    return sorted(sorted(range(len(alike)), key=alike.__getitem__)[:count])


def _describe(prepared: Prepared, client: int, row: int, answers: dict[str, str], picture: str) -> dict[str, Any]:
    examples, table = prepared.examples, prepared.session.table
    column = find_question_column(table, prepared.run.data)
    gold = [[prepared.evaluator.gold[row]]]
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
    with naming(file):
        picture.quantize(COLOURS).save(file, optimize=True)
