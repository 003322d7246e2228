"""Labels of a run's metrics, the order in which they are shown, whether more is better, and how values are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Measure:
    """A metric: its key in `results.json`, its label, whether it is a share (0 to 1, written in per cent)."""

    name: str
    label: str
    share: bool = True
    higher: bool = True  # whether more is better
    partial: bool = False  # whether it is of some of a client's examples, so that a client may have none of it

    def write(self, value: float) -> str:
        """Write a value, or a dash where there is none.

        >>> find_measure("reward_margin").write(-0.0001), find_measure("rouge_l").write(math.nan)
        ('0.000', '–')
        """
        if self.share:
            return percent(value)
        return "–" if math.isnan(value) else f"{value:z.3f}"


_LISTED = (
    Measure("exact_match", "exact match"),
    Measure("exact_match_own", "exact match, own classes", partial=True),
    Measure("exact_match_base", "exact match, base classes", partial=True),
    Measure("exact_match_novel", "exact match, novel classes", partial=True),
    Measure("exact_match_harmonic", "exact match, harmonic mean of base and novel", partial=True),
    Measure("preference_accuracy", "preference accuracy"),
    Measure("preference_accuracy_per_token", "preference accuracy per token"),
    Measure("reward_margin", "reward margin", share=False),
    Measure("reward", "reward"),
    Measure("token_f1", "token F1"),
    Measure("rouge_l", "ROUGE-L"),
    Measure("cider", "CIDEr", share=False),
    Measure("vqa_accuracy", "VQA accuracy"),
    Measure("token_accuracy", "token accuracy"),
    Measure("loss", "loss", share=False, higher=False),
    Measure("perplexity", "perplexity", share=False, higher=False),
)
MEASURES = MappingProxyType({measure.name: measure for measure in _LISTED})
"""Metrics by name, in the order of tables."""

SELECTING = tuple(
    name for name, measure in MEASURES.items() if measure.share and measure.higher and not measure.partial
)
"""The metrics by which the best round may be chosen: shares of all examples, of which more is better."""


def find_measure(name: str) -> Measure:
    """Find the measure of this name; an unknown one is shown under it."""
    return MEASURES.get(name, Measure(name, name.replace("_", " "), share=False))


def order_measures(names: Iterable[str]) -> list[Measure]:
    """List measures of these names in the order of tables, unknown ones last."""
    wanted = set(names)
    return [find_measure(name) for name in [*(n for n in MEASURES if n in wanted), *sorted(wanted - MEASURES.keys())]]


def percent(share: float) -> str:
    """Write a share as a percentage with one decimal.

    >>> percent(0.4567)
    '45.7 %'
    """
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"
