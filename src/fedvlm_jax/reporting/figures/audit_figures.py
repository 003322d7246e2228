"""The figure of an audit: how many members each test finds at which share of false alarms, on logarithmic axes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedvlm_jax.reporting.figures import theme

NAMES = {"loss": "loss", "projection": "projection", "span": "span of inputs"}
SHARES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Where the axes have ticks."""
DASHES = {"start": "-", "others": (0, (5, 2)), "own": (0, (1, 1.5))}
WHO = {"start": "server", "others": "with the others", "own": "with the factor"}


def draw_audit(found: Mapping[str, Any], target: Path) -> list[theme.Picture]:
    """Draw and save the curves of an audit's tests; nothing where there are none."""
    if not any(one["test"] in NAMES for one in found["membership"]):
        return []
    return [theme.save_picture(draw_roc(found), target, "audit", theme.CAPTIONS["run"]["audit"])]


@theme.style()
def draw_roc(found: Mapping[str, Any]) -> Figure:
    """Draw a panel for each test, a line for each attacker, and what guessing does."""
    tests = [name for name in NAMES if any(one["test"] == name for one in found["membership"])]
    figure, axes = theme.make_figure(theme.WIDE, 3.4, len(tests), sharex=True, sharey=True)
    least = min(0.5 / max(one["others"], 1) for one in found["membership"])
    for number, (ax, test) in enumerate(zip(axes, tests, strict=True)):
        for one in found["membership"]:
            if one["test"] != test:
                continue
            false, true = np.asarray(one["curve"], float).T
            ax.step(
                np.maximum(false, least),
                np.maximum(true, least),
                where="post",
                color=theme.SERIES[number],
                linestyle=DASHES.get(one["knows"], "-"),
                label=f"{WHO.get(one['knows'], one['knows'])} {one['auroc'][0]:.2f}",
            )
        ax.plot([least, 1], [least, 1], color=theme.MUTED, linewidth=1, linestyle=theme.DOTTED)
        ax.axvline(0.01, color=theme.GRID, linewidth=1, zorder=0)
        ax.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.1), title=f"by {NAMES[test]}")
        shares = [share for share in SHARES if share >= least]
        ax.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
        ax.set_yticks(shares, [f"{100 * share:g} %" for share in shares])
        ax.minorticks_off()
        ax.set_xlabel("others that pass")
        ax.legend(loc="lower right", fontsize=7, title="AUROC", title_fontsize=7).set_in_layout(False)
    axes[0].set_ylabel("members that are found")
    return figure
