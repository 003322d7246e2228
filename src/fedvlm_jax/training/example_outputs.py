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
"""Examples are of at most so many clients; more would leave one example each."""
CANDIDATES = 32
"""Pictures of each client that are looked at."""
SIDE, COLOURS = 176, 128
"""Pixels and colours that pictures are brought to: at most some 25 KiB each, sharp on a phone."""


def write_examples(experiment: Experiment, scored: ScoredModels) -> None:
    """Write what the models said to a few test examples of a few clients.

    Nothing is written where no examples are asked for, or where the test split is left alone or empty.
    """
    examples = experiment.examples
    candidates = _list_candidates(experiment) if experiment.run.evaluation.test else {}
    if not candidates:
        return
    column = find_question_column(experiment.data.table, experiment.run.data)
    chosen = _choose(experiment, scored, candidates)
    entries: list[dict[str, Any]] = []
    for number, place in ((number, place) for number, places in chosen.items() for place in places):
        name, row = examples.clients[number].name, int(examples.clients[number].test[place])
        gold, picture = [experiment.evaluator.gold[row]], f"{PICTURES}/{len(entries):02d}.png"
        texts = {model: scored[model]["test"].texts[name][place] for model in EXAMPLE_MODELS if scored.get(model)}
        entries.append(
            {
                "client": name,
                "row": int(examples.rows[row]),
                "picture": picture,
                "question": experiment.data.table.read_stripped(column, examples.rows[[row]])[0],
                "answer": examples.answers[row],
                "answers": {
                    model: {
                        "text": text,
                        "exact_match": float(exact_match([text], gold)[0]),
                        "token_f1": float(token_f1([text], gold)[0]),
                    }
                    for model, text in texts.items()
                },
            }
        )
        save_picture(examples.images, int(examples.image[row]), experiment.folder / picture)
    looked = {examples.clients[number].name: len(places) for number, places in candidates.items()}
    write_json(experiment.folder / EXAMPLES, {"looked_at": looked, "examples": entries})


def _list_candidates(experiment: Experiment) -> dict[int, list[int]]:
    """List client -> places among its test examples of the first with distinct pictures."""
    examples, wanted = experiment.examples, experiment.run.evaluation.examples
    having = [number for number in experiment.judged if len(examples.clients[number].test)]
    count = min(CLIENTS, wanted, len(having))
    spaced = [having[place] for place in np.linspace(0, len(having) - 1, count).round().astype(int)] if count else []
    candidates = {}
    for number in spaced:
        asked: dict[int, list[int]] = {}  # picture -> the places that ask about it
        for place, row in enumerate(examples.clients[number].test.tolist()):
            asked.setdefault(int(examples.image[row]), []).append(place)
        # One question about each picture, the next one about the next, so that all kinds are seen.
        candidates[number] = [places[turn % len(places)] for turn, places in enumerate(asked.values())][:CANDIDATES]
    return candidates


def _choose(experiment: Experiment, scored: ScoredModels, candidates: dict[int, list[int]]) -> dict[int, list[int]]:
    """Choose of each client's candidates those to show."""
    clients, count = experiment.examples.clients, experiment.run.evaluation.examples
    gold, texts = experiment.evaluator.gold, scored["personal"]["test"].texts
    right: dict[int, np.ndarray] = {}  # client -> of each test example, whether its personal model is right
    for number in experiment.judged:
        if len(rows := clients[number].test):
            right[number] = exact_match(texts[clients[number].name], [gold[row] for row in rows.tolist()])
    # The share is that of all scored clients, not of the few that are shown.
    share = float(np.mean([np.mean(of_client) for of_client in right.values()]))
    flags = [right[number][places] == 1 for number, places in candidates.items()]
    wanted = [count // len(flags) + (turn < count % len(flags)) for turn in range(len(flags))]
    shown = share_out_right(flags, wanted, share)
    return {
        number: [places[at] for at in _first_of_each(flag, some, most)]
        for (number, places), flag, some, most in zip(candidates.items(), flags, shown, wanted, strict=True)
    }


def share_out_right(right: Sequence[Bool[np.ndarray, " some"]], wanted: Sequence[int], share: float) -> list[int]:
    """Decide how many right answers each client shows, so that of all that is shown about `share` are right.

    >>> share_out_right([np.array([True, True, False]), np.array([False, True, False])], [2, 2], 0.5)
    [2, 0]

    They are given one by one to the clients in turn that have more; a client without enough wrong ones shows more right
    ones. `right` says which of each client's candidates are, `wanted` how many examples each shows.
    """
    most = [min(count, int(flags.sum())) for flags, count in zip(right, wanted, strict=True)]
    least = [max(0, count - int((~flags).sum())) for flags, count in zip(right, wanted, strict=True)]
    shown = [min(low, top) for low, top in zip(least, most, strict=True)]
    left = round(share * sum(wanted)) - sum(shown)
    while left > 0 and shown != most:
        for client, top in enumerate(most):
            if left > 0 and shown[client] < top:
                shown[client], left = shown[client] + 1, left - 1
    return shown


def _first_of_each(right: Bool[np.ndarray, " some"], some: int, count: int) -> list[int]:
    """Find the first `some` that are right and the first others, `count` in all, in their order.

    >>> _first_of_each(np.array([False, True, False, True, True]), some=2, count=3)
    [0, 1, 3]
    """
    return sorted([*np.flatnonzero(right)[:some].tolist(), *np.flatnonzero(~right)[: count - some].tolist()])


def save_picture(images: Images, index: int, file: Path) -> None:
    """Write an image as a PNG of at most `SIDE` pixels a side."""
    picture = images.decode(index)
    picture.thumbnail((SIDE, SIDE))
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file):
        picture.quantize(COLOURS).save(file, optimize=True)
