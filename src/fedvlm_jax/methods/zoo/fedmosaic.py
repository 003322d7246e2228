"""FedMosaic's download (arXiv 2506.11024): an adapter mixed for each client from the others', by how alike they are.

The client's own adapter is trained with the mixed one frozen beside it. Similarity is the cosine of how far the
clients' adapters went; the paper compares gradients of a small model, learns the weight between the two adapters, and
carries Co-LoRA across architectures, none of which is here. The others are those in the server's pool, see
`parts/delivered.py`; a client that never sent anything is equally like all of them. Where clients draw an A each
(`--lora.private-a per-client`) the similarity is largely that of the draws.
"""

from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax.methods.base import Method, Setup
from fedvlm_jax.methods.components import mixing
from fedvlm_jax.methods.components.personalized_download import make_delivering_method

__all__ = ["make"]

SOURCE = "arXiv 2506.11024: client k receives Σ_j w_kj (A_j, B_j), w_k = softmax of similarity over the others"


def make(setup: Setup) -> Method:
    """fedmosaic: own and mixed adapter at a fixed weight."""
    hyper = setup.hyper

    def weigh(moved: PyTree, pool: PyTree, others: Bool[Array, " P"], sent: Bool[Array, ""]) -> Float[Array, " P"]:
        del sent
        return mixing.softmax_among(mixing.cosines(moved, pool) / hyper.mix_temperature, others)

    return make_delivering_method(
        "fedmosaic", SOURCE, setup,
        assemble=lambda own, mixed, scales: mixing.mix(own, mixed, scales, hyper.mosaic_weight),
        weigh=weigh, reads=("hyper.mix_temperature", "hyper.mosaic_weight"), pairs=2,
    )  # fmt: skip
