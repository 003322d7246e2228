"""pFedMMA (arXiv 2507.05394): adapters beside the top layers of both towers, of which the middle is shared by all.

    layer(x) + α W_u relu(W_s relu(W_d norm(x))),    W_s (r × r, with its bias) is one for both towers, and averaged;
                                                     W_d and W_u of each tower stay with their client

See `lora.parallel` for the form. As in the authors' configurations there are 8 layers from the top, r is 32 there
(`--lora.rank` here), α is 0.001 and does not scale gradients: it is made for SGD, and AdamW may want a larger one. W_u
starts at zero, theirs at random. Towers of unlike depth share from the top; theirs are numbered from the bottom.

The authors' code keeps the text features of its first test for all later clients and rounds; nothing here is kept.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax import lora
from fedvlm_jax.lora.adapter import BESIDE
from fedvlm_jax.methods.base import Method, MethodOptions, Setup
from fedvlm_jax.methods.components.factors import only
from fedvlm_jax.methods.rule_based import Parts, make_share_method
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Count, Positive

SHARED = "shared/middle"


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of pfedmma"""

    layers: Count = 8
    """Layers of each tower that have an adapter, from the top; all where there are fewer."""
    scale: Positive = 0.001
    """Factor (alpha) of what an adapter adds to its layer."""


def make(setup: Setup) -> Method:
    """Make pfedmma: a share rule for the matrix between two private ones, which all towers have in common."""
    options, towers = setup.own(Options), setup.spec.parallel_at
    source = "arXiv 2507.05394: layer + α W_u δ(W_s δ(W_d z)); W̄_s = Σ p_k W_s,k is shared, W_d and W_u are private"
    depths = {tower: setup.sites[f"{tower}/mlp/fc2"].stack[0] for tower in towers} if setup.sites else {}
    top = min(options.layers, *depths.values()) if depths else 0

    def extend(adapter: lora.Adapter) -> PyTree:
        flat = tree.flatten(adapter)
        own = {
            f"{tower}/{BESIDE}/{name}": flat[f"{tower}/{BESIDE}/{name}"][-top:]
            for tower in towers
            for name in ("into", "back")
        }
        return tree.unflatten({**own, SHARED: flat[f"{towers[0]}/{BESIDE}/middle"][-top:]})

    def assemble(factors: PyTree) -> lora.Adapter:
        flat = tree.flatten(factors)

        def fill(leaf: Array, depth: int) -> Array:
            # Layers below the top ones have matrices of zeros, which add nothing.
            return jnp.pad(leaf, ((depth - top, 0), (0, 0), (0, 0)))

        made: dict[str, Array] = {}
        for tower, depth in depths.items():
            place = f"{tower}/{BESIDE}"
            made |= {f"{place}/{name}": fill(flat[f"{place}/{name}"], depth) for name in ("into", "back")}
            # Of scale 0 they have no gradient either, in a fine-tuning of the whole adapter.
            scale = jnp.where(jnp.arange(depth) < depth - top, 0.0, options.scale)
            made |= {f"{place}/middle": fill(flat[SHARED], depth), f"{place}/scale": scale}
        return tree.unflatten(made)

    refuses = {
        "lora.targets": "its adapters stand beside whole layers",
        "lora.ranks": "the shared matrix is one square matrix that all clients average whole",
        "start": "a folder of PEFT's has no adapter beside whole layers",
    }
    parts = Parts(
        extend=extend, assemble=assemble, trained=(only("into", "middle", "back"),), refuses=refuses, parallel=True
    )
    return make_share_method("pfedmma", source, lora.Rule(r"(^|/)middle$"), setup, parts)
