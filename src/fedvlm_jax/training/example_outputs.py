"""A few test examples with what the models that a run ends with answer: `examples.json` and pictures in `examples/`.

They are chosen without chance: clients evenly spaced in the federation's order, and of each one's first test pictures
the first that the personal model gets right and the first that it gets wrong, in such numbers that the share of right
ones is the test accuracy of all personal models, as near as whole examples come to it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from fedvlm_jax.data.tokenization import find_question_column
from fedvlm_jax.data.unique_images import Images
from fedvlm_jax.errors import naming
from fedvlm_jax.evaluation.metrics.text_metrics import exact_match, token_f1
from fedvlm_jax.run_dir.validated_files import EXAMPLE_MODELS, EXAMPLES
from fedvlm_jax.training.experiment import Experiment
from fedvlm_jax.training.final_evaluation import ScoredModels
from fedvlm_jax.utils.files import write_json

PICTURES = "examples"

CLIENTS = 6
"""Of at most so many clients; more would leave one example each."""

CANDIDATES = 32
"""Of each, so many pictures are looked at."""

SIDE, COLOURS = 176, 128
"""Pictures are brought to this many pixels and colours: at most some 25 KiB each, sharp on a phone."""


def write_examples(experiment: Experiment, scored: ScoredModels, folder: Path) -> None:
    """Write what the models said to a few test examples of a few clients.

    Nothing is written where no examples are asked for, or where the test split is left alone or empty.

    Args:
        experiment: the run.
        scored: how its models did, with what they said.
        folder: the run's.
    """
    examples, options = experiment.examples, experiment.run.evaluation
    places = _list_candidates(experiment) if options.test else {}
    if not places:
        return
    told: list[dict[str, Any]] = []
    for client, chosen in _choose_places(experiment, scored, places).items():
        name, test = examples.clients[client].name, examples.clients[client].test
        for place in chosen:
            row = int(test[place])
            said = {
                model: by_split["test"].texts[name][place]
                for model in EXAMPLE_MODELS
                if (by_split := scored.get(model))
            }
            told.append(_describe(experiment, client, row, said, f"{PICTURES}/{len(told):02d}.png"))
            _save_picture(examples.images, int(examples.image[row]), folder / told[-1]["picture"])
    looked = {examples.clients[client].name: len(own) for client, own in places.items()}
    write_json(folder / EXAMPLES, {"looked_at": looked, "examples": told})


def _list_candidates(experiment: Experiment) -> dict[int, list[int]]:
    """client -> places among its test examples of the first with pictures of their own."""
    examples, wanted = experiment.examples, experiment.run.evaluation.examples
    having = [number for number in experiment.scored if len(examples.clients[number].test)]
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


def _choose_places(experiment: Experiment, scored: ScoredModels, places: dict[int, list[int]]) -> dict[int, list[int]]:
    """client -> places among its test examples of those to show."""
    examples, count = experiment.examples, experiment.run.evaluation.examples
    gold = experiment.evaluator.gold
    personal = scored["personal"]["test"].texts
    right = {}
    for client, own in places.items():
        who = examples.clients[client]
        golden = [gold[int(who.test[place])] for place in own]
        right[client] = exact_match([personal[who.name][place] for place in own], golden) == 1
    shares = [
        np.mean(exact_match(personal[who.name], [gold[row] for row in who.test.tolist()]))
        for who in (examples.clients[number] for number in experiment.scored)
        if len(who.test)
    ]
    wanted = [count // len(places) + (number < count % len(places)) for number in range(len(places))]
    numbers = share_out_right(list(right.values()), wanted, float(np.mean(shares)))
    return {
        client: [own[at] for at in _first_of_each(right[client], some, most)]
        for (client, own), some, most in zip(places.items(), numbers, wanted, strict=True)
    }


def share_out_right(right: Sequence[Bool[np.ndarray, " some"]], wanted: Sequence[int], share: float) -> list[int]:
    """Decide how many right answers each client shows, so that of all that is shown about `share` are right.

    Args:
        right: of each client's candidates, which are right.
        wanted: how many examples each client shows.
        share: of right answers.

    Returns:
        Numbers of right ones, one after another given to the clients in turn that have more; a client without enough
        wrong ones shows more right ones.

    Examples:
        >>> share_out_right([np.array([True, True, False]), np.array([False, True, False])], [2, 2], 0.5)
        [2, 0]
    """
    most = [min(count, int(own.sum())) for own, count in zip(right, wanted, strict=True)]
    shown = [min(top, max(0, count - int((~own).sum()))) for own, count, top in zip(right, wanted, most, strict=True)]
    left = round(share * sum(wanted)) - sum(shown)
    while left > 0 and any(some < top for some, top in zip(shown, most, strict=True)):
        for client, top in enumerate(most):
            if left > 0 and shown[client] < top:
                shown[client], left = shown[client] + 1, left - 1
    return shown


def _first_of_each(right: Bool[np.ndarray, " some"], some: int, count: int) -> list[int]:
    """The first `some` that are right and the first others, `count` in all, in their order."""
    return sorted([*np.flatnonzero(right)[:some].tolist(), *np.flatnonzero(~right)[: count - some].tolist()])


def _describe(experiment: Experiment, client: int, row: int, answers: dict[str, str], picture: str) -> dict[str, Any]:
    examples, table = experiment.examples, experiment.data.table
    column = find_question_column(table, experiment.run.data)
    gold = [experiment.evaluator.gold[row]]
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
