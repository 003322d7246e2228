"""FedDPA-T (arXiv 2403.19211): in every round a client trains the global adapter, then its local one beside it."""

from fedvlm_jax.methods.parts.dual import make_dual_method
from fedvlm_jax.methods.record import Method, Setup

__all__ = ["make"]

SOURCE = "arXiv 2403.19211: (A_g, B_g) averaged and (A_l, B_l) private, trained in turn; y = W_0 x + (1−α) g + α l"


def make(setup: Setup) -> Method:
    """feddpa-t: the local steps of a round are halved, so that it takes as many as any other method."""

    def stages(phase: int, steps: int) -> tuple[slice | None, slice | None]:
        half = (steps + 1) // 2
        return slice(0, half), slice(half, steps) if half < steps else None

    return make_dual_method("feddpa-t", SOURCE, setup, stages=stages)
