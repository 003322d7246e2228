"""A run's differential privacy as its report tells it: ε, what it covers and what it does not, and its way there."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fedvlm_jax.privacy.budget import describe_sampling, read_coverage
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.figures.round_lines import pick
from fedvlm_jax.reporting.pages import Section
from fedvlm_jax.run_dir.reader import RunRecord

TITLE = "Differential privacy"
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
    asked = record.options.get("train", {}).get("rounds", 0)
    if budget.limit and budget.rounds < asked:
        sentences.append(f"It was to have {asked} rounds, and stopped where ε {budget.limit:g} was spent.")
    if budget.clients < FEW:
        sentences.append(
            f"{budget.clients:,} clients are few: noise that hides one of them is large beside the sum of a round's "
            "updates. An ε above 10 promises little."
        )
    return sentences


@theme.style()
def draw_epsilon(record: RunRecord) -> Figure:
    """Draw ε over the rounds, as it is and as it is bounded, below the most that it may be."""
    figure, (ax,) = theme.make_figure(theme.WIDE / 2, 2.6)
    colour = theme.SERIES[theme.choose_series([record.method])[record.method]]
    ax.plot(*pick(record.rounds, "epsilon_bound"), color=theme.MUTED, linewidth=1.2, linestyle=theme.BEFORE)
    ax.plot(*pick(record.rounds, "epsilon"), color=colour, marker="o", markersize=4, linewidth=1.8)
    if limit := record.results["privacy"]["limit"]:
        ax.axhline(limit, color=theme.MUTED, linewidth=1, linestyle=theme.DOTTED)
    ax.set_title("ε so far")
    ax.grid(axis="y")
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("round")
    ax.set_ylim(bottom=0)
    theme.use_whole_numbers(ax)
    return figure
