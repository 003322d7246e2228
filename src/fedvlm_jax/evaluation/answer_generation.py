"""Generation of a run's answers: by which search, in how many tokens, and what of the gold no search can give."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.evaluator import GREEDY
from fedvlm_jax.evaluation.gold_answers import Gold
from fedvlm_jax.models.beam_search import Settings

SEARCHES: Mapping[str, Mapping[str, int]] = {"greedy": GREEDY, "folder": {}}
"""Decoding -> options of `Vlm.generate`, in place of what the model's folder says."""


@dataclass(frozen=True)
class Answering:
    """The gold answers, which bound the tokens of generated ones, and the settings of the search."""

    gold: Gold
    settings: Settings

    def describe(self) -> dict[str, Any]:
        """Return what `results.json` has of it."""
        beams = ("num_beams", "no_repeat_ngram_size", "min_length", "min_new_tokens", "length_penalty")
        return {
            "max_answer_tokens": self.gold.budget,
            "longest_gold_answer": self.gold.longest,
            "gold_answers": self.gold.scored,
            "unreachable": self.gold.unreachable,
            **{name: getattr(self.settings, name) for name in beams},
            **({"ignored": list(self.settings.ignored)} if self.settings.ignored else {}),
        }

    def explain(self, *, chosen: bool = False) -> list[str]:
        """Say how answers are generated, if not `chosen` among classes, and which gold answers none can reach."""
        gold, settings = self.gold, self.settings
        search = "greedily" if settings.num_beams == 1 else f"by {settings.num_beams} beams"
        banned = settings.no_repeat_ngram_size
        ban = f", no {format_count(banned, 'token')} twice" if banned else ""
        lines = []
        if not chosen:
            lines.append(
                f"answers are generated {search}{ban}, in at most {format_count(gold.budget, 'token')}; the "
                f"gold ones take {gold.longest}"
            )
        if settings.ignored:
            lines.append(
                f"the model's generation_config.json draws tokens ({', '.join(settings.ignored)}): that is ignored, "
                "evaluation takes the likeliest"
            )
        if gold.unreachable:
            reasons = ", ".join(f"{count} {reason}" for reason, count in gold.unreachable.items())
            lines.append(
                f"whatever a model says, exact_match is 0 and no metric is full on {sum(gold.unreachable.values())} of "
                f"{format_count(gold.scored, 'gold answer')}: {reasons} (--evaluation.max-answer-tokens "
                "and --evaluation.decoding "
                "decide that)"
            )
        return lines
