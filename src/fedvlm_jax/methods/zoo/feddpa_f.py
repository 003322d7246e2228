"""FedDPA-F (arXiv 2403.19211): the global adapter is federated first, in the last rounds clients train local ones."""

from fedvlm_jax.methods.base import Client, Method, Setup
from fedvlm_jax.methods.components.dual_adapter import make_dual_method

__all__ = ["make"]

SOURCE = "arXiv 2403.19211: (A_g, B_g) averaged, then (A_l, B_l) trained alone; y = W_0 x + (1−α) g + α l"


def make(setup: Setup) -> Method:
    """feddpa-f: the rounds are those of any other method; `--hyper.dpa-local` says how many are the local adapter's."""
    first_local = setup.rounds - max(1, round(setup.hyper.dpa_local * setup.rounds)) + 1

    def stages(phase: int, client: Client) -> tuple[Client | None, Client | None]:
        return (client, None) if phase else (None, client)

    return make_dual_method(
        "feddpa-f", SOURCE, setup,
        stages=stages, phase=lambda round_: int(round_ >= max(first_local, 2)), reads=("hyper.dpa_local",),
    )  # fmt: skip
