"""FedMosaic's download (arXiv 2506.11024): an adapter mixed for each client from the others', by how alike they are.

The client's own adapter is trained with the mixed one frozen beside it. Similarity is the cosine of how far the
clients' adapters went; the paper compares gradients of a small model, learns the weight between the two adapters, and
carries Co-LoRA across architectures, none of which is here. The others are those in the server's pool, see
`components/personalized_download.py`; a client that never sent anything is equally like all of them. Where clients draw
an A each (`--lora.private-a per-client`) the similarity is largely that of the draws.
"""

from dataclasses import dataclass

from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.components.factors import cosines, mix, softmax_among
from fedvlm_jax.methods.components.personalized_download import make_delivering_method
from fedvlm_jax.utils.option_ranges import Positive, Share


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of fedmosaic"""

    temperature: Positive = 0.5
    """Temperature of the softmax over the clients' similarities."""
    weight: Share = 0.5
    """Weight of the adapter that is mixed from the others' (the paper learns it)."""


def make(setup: Setup) -> Method:
    """Make fedmosaic: the client's and the mixed adapter at a fixed weight."""
    options = setup.own(Options)

    def weigh(moved: PyTree, pool: PyTree, others: Bool[Array, " P"], sent: Bool[Array, ""]) -> Float[Array, " P"]:
        del sent
        return softmax_among(cosines(moved, pool) / options.temperature, others)

    source = "arXiv 2506.11024: client k receives Σ_j w_kj (A_j, B_j), w_k = softmax of similarity over the others"
    return make_delivering_method(
        "fedmosaic", source, setup,
        assemble=lambda own, mixed, scales: mix(own, mixed, scales, options.weight),
        weigh=weigh, pairs=2,
    )  # fmt: skip
