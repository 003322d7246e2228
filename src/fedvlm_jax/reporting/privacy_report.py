"""A run's differential privacy as its report tells it: ε, what it covers and what it does not, and its way there."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fedvlm_jax.privacy.budget import describe_sampling, read_coverage
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.round_lines import pick
from fedvlm_jax.reporting.pages import Section
from fedvlm_jax.run_dir.reader import RunRecord

TITLE = "Differential privacy"
RATIO = "noise_to_update"
"""Name of a round's number: the norm of the noise over that of the sum that it hides."""
FEW = 1000
"""Clients below which ε and use are hardly to be had together (docs/how-to/differential-privacy.md)."""


def show_privacy(records: Sequence[RunRecord], target: Path, prefix: str = "") -> Section:
    """Describe the privacy of a run, or of the runs of a comparison, which have the same; nothing where there is none.

    Of several runs the first is drawn.
    """
    private = [record for record in records if record.results.get("privacy")]
    if not private:
        return Section(title=TITLE)
    sentences = describe_privacy(private[0])
    if others := sorted({record.method for record in records} - {record.method for record in private}):
        sentences.append(f"It does not concern {', '.join(others)}, where nothing is released.")
    if len(private) > 1:
        sentences.append(
            "Every run spends its own ε: to release several, or the best of them, costs their sum at least."
        )
    pictures: list[theme.Picture] = []
    if any(pick(private[0].rounds, name)[0] for name in ("epsilon", "epsilon_bound")):
        figure = draw_epsilon(private[0])
        pictures = [theme.save_picture(figure, target, f"{prefix}epsilon", theme.CAPTIONS["run"]["epsilon"])]
    return Section(title=TITLE, sentences=sentences, pictures=pictures)


def describe_privacy(record: RunRecord) -> list[str]:
    """Describe ε of a finished run: its size, what came to it, and what it says nothing of."""
    stored = record.results["privacy"]
    budget = read_coverage(stored)
    other = "one client another" if budget.sampling == "fixed" else "one client more or less"
    noise = "new in every round" if budget.mechanism == "gaussian" else f"correlated over {budget.groups} rounds"
    clip = f"clipping norm {budget.clip:g}"
    if budget.quantile is not None:
        clip = f"a clipping norm that begins at {budget.clip:g} and follows the {budget.quantile:g} quantile of norms"
    sentences = [
        f"ε is {budget.epsilon:.3g} at δ {budget.delta:g} after {budget.rounds} rounds: so far apart, at most, is what "
        f"is released of two populations of which one has {other}, with all of that client's examples.",
        f"A round has {describe_sampling(budget)}. Their updates are clipped, added up and given Gaussian noise, "
        f"{noise}: noise multiplier {budget.noise:g}, {clip}.",
        f"ε covers {stored['covers']}. It does not cover {stored['does_not_cover']}.",
        "The last round's adapters are taken, for a choice on validation data would not be covered.",
    ]
    sentences += describe_noise(record)
    asked = record.options.get("train", {}).get("rounds", 0)
    if budget.limit and budget.rounds < asked:
        sentences.append(f"It was to have {asked} rounds, and stopped where ε {budget.limit:g} was spent.")
    if budget.clients < FEW:
        sentences.append(
            f"{budget.clients:,} clients are few: noise that hides one of them is large beside the sum of a round's "
            "updates. An ε above 10 promises little."
        )
    return sentences


def describe_noise(record: RunRecord) -> list[str]:
    """Say how long the noise of a run's rounds was beside what it hides; nothing where no round has a number."""
    _, ratios = pick(record.rounds, RATIO)
    if not ratios:
        return []
    middle = statistics.median(ratios)
    advice = ": what is shared is mostly noise" if middle > 1 else ""
    return [f"In the median round the noise was {middle:.3g} times as long as the sum of the updates{advice}."]


@theme.style()
def draw_epsilon(record: RunRecord) -> Figure:
    """Draw ε over the rounds, as it is and as it is bounded, below the most that it may be; and noise over updates."""
    figure, (ax, beside) = theme.make_figure(theme.WIDE, 2.6, 2)
    rounds, ratios = pick(record.rounds, RATIO)
    beside.plot(rounds, ratios, color=theme.SERIES[0], marker="o", markersize=4, linewidth=1.8)
    beside.axhline(1, color=theme.MUTED, linewidth=1, linestyle=theme.DOTTED)
    beside.set_title("Noise over the sum of updates")
    beside.set_ylim(bottom=0)
    colour = theme.SERIES[theme.choose_series([record.method])[record.method]]
    ax.plot(*pick(record.rounds, "epsilon_bound"), color=theme.MUTED, linewidth=1.2, linestyle=theme.BEFORE)
    ax.plot(*pick(record.rounds, "epsilon"), color=colour, marker="o", markersize=4, linewidth=1.8)
    if limit := record.results["privacy"]["limit"]:
        ax.axhline(limit, color=theme.MUTED, linewidth=1, linestyle=theme.DOTTED)
    ax.set_title("ε so far")
    ax.set_ylim(bottom=0)
    for each in (ax, beside):
        each.grid(axis="y")
        each.grid(visible=False, axis="x")
        each.set_xlabel("round")
        theme.use_whole_numbers(each)
    return figure
