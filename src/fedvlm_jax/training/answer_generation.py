"""How a run's answers are generated: by which search, in how many tokens, and what of the gold no search can give."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.evaluator import GREEDY
from fedvlm_jax.evaluation.gold_answers import Gold, read_gold
from fedvlm_jax.models import Processor, Vlm
from fedvlm_jax.models.search import Settings
from fedvlm_jax.training.session import Note


@dataclass(frozen=True)
class Answering:
    """How answers are generated.

    Attributes:
        gold: what they are compared with, and how many tokens they get.
        options: of `Vlm.generate`, in place of what the model's folder says.
        settings: all that decides the search.
    """

    gold: Gold
    options: Mapping[str, int]
    settings: Settings

    def describe(self) -> dict[str, Any]:
        """What `results.json` tells of it."""
        beams = ("num_beams", "no_repeat_ngram_size", "min_length", "min_new_tokens", "length_penalty")
        return {
            "max_answer_tokens": self.gold.budget,
            "longest_gold_answer": self.gold.longest,
            "gold_answers": self.gold.scored,
            "unreachable": self.gold.unreachable,
            **{name: getattr(self.settings, name) for name in beams},
        }

    def tell(self, note: Note) -> None:
        """Say how answers are generated and, in one line, what no answer can reach."""
        gold, settings = self.gold, self.settings
        search = "greedily" if settings.num_beams == 1 else f"by {settings.num_beams} beams"
        banned = settings.no_repeat_ngram_size
        ban = f", no {banned} tokens twice" if banned else ""
        note(f"answers are generated {search}{ban}, in at most {gold.budget} tokens; the gold ones take {gold.longest}")
        if gold.unreachable:
            reasons = ", ".join(f"{count} {reason}" for reason, count in gold.unreachable.items())
            note(
                f"whatever a model says, exact_match is 0 and no metric is full on {sum(gold.unreachable.values())} of "
                f"{gold.scored} gold answers: {reasons} (--evaluation.max-answer-tokens and --evaluation.decoding "
                "decide that)"
            )


def check_room(run: Run, vlm: Vlm) -> None:
    """Refuse a bound that the model's positions do not hold.

    Raises:
        UserError: there are fewer positions than answer tokens asked for.
    """
    asked, positions = run.evaluation.max_answer_tokens, vlm.positions
    if asked is not None and asked > positions:
        raise UserError(
            f"--evaluation.max-answer-tokens is {asked}: {run.model} has {positions} positions, ask for fewer"
        )


def plan_answers(run: Run, vlm: Vlm, examples: Examples, processor: Processor, labels: int) -> Answering:
    """Decide how answers are generated.

    Args:
        run: the options.
        vlm: the model.
        examples: whose gold answers of validation and test are to be reached.
        processor: of the model.
        labels: most tokens of an answer in training, which bounds generated ones unless the run has a bound.
    """
    options: Mapping[str, int] = GREEDY if run.evaluation.decoding == "greedy" else {}
    settings = dataclasses.replace(vlm.settings(), **options)
    most = run.evaluation.max_answer_tokens or labels
    rows = [row for client in examples.clients for split in run.evaluation.splits for row in client.rows_of(split)]
    gold = read_gold(examples.answers, rows, processor, most, settings, examples.all_answers)
    return Answering(gold, options, settings)
