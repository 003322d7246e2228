"""What a client of each method has after rounds of training, made up: for all that takes adapters out of a run."""

import jax
import jax.numpy as jnp
import numpy as np

from fedvlm_jax import lora
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.methods import Setup, load_method

REFUSED = {
    **dict.fromkeys(("fedalt", "fedlease"), "depends on the token"),
    "pftt": "nonlinearity is no matrix",
    **dict.fromkeys(("promptfl", "fedotp", "fedpgp", "pfedmoap", "pfedmma"), "nor written as a folder of PEFT's"),
}
"""Methods whose adapters are no LoRA -> why."""


def make_client_adapter(name, vlm, targets):
    """The adapter of a method's client, of rank 2, on the sites of a model that writes its answers."""
    spec = lora.LoRA(rank=2, alpha=3, targets=targets)
    setup = Setup(
        sites=vlm.sites, spec=spec, start_optimizer=lambda *_: {}, population=3, cohort=3, places=3,
        components=vlm.components,
    )  # fmt: skip
    return move_client(load_method(name, setup), lora.init(jax.random.key(0), vlm.sites, spec))


def move_client(method, adapter):
    """What a client of a method uses that began with an adapter."""
    server = noise(method.init(adapter=adapter))
    personal = noise(start_personal(method, jax.random.key(1), server, jnp.int32(0)), 1)
    return method.personalise(server=server, personal=personal)


def noise(state, seed=0):
    """The same state with numbers as training leaves them."""
    random = np.random.default_rng(seed)

    def move(path, leaf):
        learned = jnp.issubdtype(leaf.dtype, jnp.floating) and not jax.tree_util.keystr(path).endswith("'scale']")
        return leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32) if learned else leaf

    return jax.tree_util.tree_map_with_path(move, state)
