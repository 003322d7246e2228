"""Random adapters."""

import numpy as np

from fedvlm_jax.utils import tree


def draw(sites, rank=2, seed=0):
    """A random adapter on these sites, each layer with a scale of its own."""
    random = np.random.default_rng(seed)
    flat = {}
    for site in sites:
        flat[f"{site.path}/a"] = random.standard_normal((*site.stack, site.d_in, rank)).astype(np.float32)
        flat[f"{site.path}/b"] = random.standard_normal((*site.stack, rank, site.d_out)).astype(np.float32)
        flat[f"{site.path}/scale"] = random.uniform(0.5, 2, site.stack).astype(np.float32)
    return tree.unflatten(flat)
