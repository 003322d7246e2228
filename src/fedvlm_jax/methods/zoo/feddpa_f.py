"""FedDPA-F (arXiv 2403.19211): the global adapter is federated first, in the last rounds clients train local ones."""

from dataclasses import dataclass

from fedvlm_jax.methods.base import Client, Method, Setup
from fedvlm_jax.methods.components.dual_adapter import make_dual_method
from fedvlm_jax.methods.config import MethodOptions
from fedvlm_jax.utils.option_ranges import Share

SOURCE = "arXiv 2403.19211: (A_g, B_g) averaged, then (A_l, B_l) trained alone; y = W_0 x + (1−α) g + α l"


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of feddpa-f"""

    alpha: Share = 0.5
    """Weight of the local adapter; the global one has the rest."""
    local: Share = 0.25
    """Share of the rounds, the last ones, in which the local adapter alone is trained."""


def make(setup: Setup) -> Method:
    """feddpa-f: the rounds are those of any other method; `--method.local` says how many are the local adapter's."""
    options = setup.own(Options)
    first_local = setup.rounds - max(1, round(options.local * setup.rounds)) + 1

    def stages(phase: int, client: Client) -> tuple[Client | None, Client | None]:
        return (client, None) if phase else (None, client)

    return make_dual_method(
        "feddpa-f", SOURCE, setup, options.alpha,
        stages=stages, phase=lambda round_: int(round_ >= max(first_local, 2)),
    )  # fmt: skip
