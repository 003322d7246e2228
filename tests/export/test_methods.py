"""Every method's adapters as PEFT has them: the same products, or a reason against it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import WRITING

from fedvlm_jax import lora
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.methods import Setup, load_method
from fedvlm_jax.models import read_vlm
from fedvlm_jax.peft.folder import list_factors, make_uniform, place_factors

GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "single"
TARGETS = "language_model/(en|de)coder/layers/(self_attn/q_proj|fc1)|image_projection"
REFUSED = {
    **dict.fromkeys(("fedalt", "fedlease"), "depends on the token"),
    "pftt": "nonlinearity is no matrix",
}


@pytest.fixture(scope="module")
def vlm():
    return read_vlm(GOLDEN)


def noise(state, seed=0):
    """The same state with numbers as training leaves them."""
    random = np.random.default_rng(seed)

    def move(path, leaf):
        learned = jnp.issubdtype(leaf.dtype, jnp.floating) and not jax.tree_util.keystr(path).endswith("'scale']")
        return leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32) if learned else leaf

    return jax.tree_util.tree_map_with_path(move, state)


@pytest.mark.parametrize("name", WRITING)
def test_the_adapter_of_a_client_goes_out_whole_or_is_refused(name, vlm):
    spec = lora.LoRA(rank=2, alpha=3, targets=TARGETS)
    setup = Setup(
        sites=vlm.sites, spec=spec, start_optimizer=lambda *_: {}, population=3, cohort=3, places=3,
        components=vlm.components,
    )  # fmt: skip
    method = load_method(name, setup)
    server = noise(method.init(adapter=lora.init(jax.random.key(0), vlm.sites, spec)))
    personal = noise(start_personal(method, jax.random.key(1), server, jnp.int32(0)), 1)
    adapter = method.personalise(server=server, personal=personal)
    if name in REFUSED:
        with pytest.raises(lora.LoraError, match=REFUSED[name]):
            list_factors(vlm, adapter)
        return
    modules = list_factors(vlm, adapter)
    assert len(modules) == 5
    for exact, back in ((True, modules), (False, make_uniform(modules))):
        found = dict(lora.sites_of(place_factors(vlm, back)[0]))
        for path, (a, b, scale) in lora.sites_of(adapter):
            left, right, factor = found[path]
            if exact and a.shape == left.shape:
                np.testing.assert_array_equal(left, a)
                np.testing.assert_array_equal(right, b)
            product = np.asarray(scale)[..., None, None] * np.asarray(a @ b)
            again = factor[..., None, None] * (left @ right)
            np.testing.assert_allclose(again, product, atol=2e-6 * max(1.0, np.abs(product).max()))
            assert np.abs(product).max() > 0.01
