"""FedDPA-F (arXiv 2403.19211): the global adapter is federated first, in the last rounds clients train local ones.

See `feddpa_t.py` for the two adapters.
"""

from dataclasses import dataclass

from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.components.dual_adapters import make_dual_method
from fedvlm_jax.methods.zoo.feddpa_t import train_in_turn
from fedvlm_jax.utils.option_ranges import Share


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of feddpa-f"""

    alpha: Share = 0.5
    """Weight of the local adapter; the global one has the rest."""
    local: Share = 0.25
    """Share of the rounds, the last ones, in which the local adapter alone is trained."""


def make(setup: Setup) -> Method:
    """Make feddpa-f: as many rounds as any other method's, of which the last train the local adapter."""
    options = setup.own(Options)
    first_local = setup.rounds - max(1, round(options.local * setup.rounds)) + 1
    train = train_in_turn(options.alpha, lambda phase, client: (client, None) if phase else (None, client))
    unreached = "in 1 round feddpa-f trains no local adapter: round 1 is the global one's" if setup.rounds < 2 else ""
    return make_dual_method(
        "feddpa-f", "arXiv 2403.19211: (A_g, B_g) averaged, then (A_l, B_l) trained alone; y = W_0 x + (1−α) g + α l",
        setup, options.alpha, train=train,
        phase=lambda round_: int(round_ >= max(first_local, 2)), unreached=unreached,
    )  # fmt: skip
