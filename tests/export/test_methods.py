"""Every method's adapters as PEFT has them: the same products, or a reason against it."""

from pathlib import Path

import numpy as np
import pytest
from method_adapters import REFUSED, make_client_adapter, move_client
from toy import WRITING, make_method

from fedvlm_jax import lora
from fedvlm_jax.config.run_options import methods_available
from fedvlm_jax.models import read_vlm
from fedvlm_jax.peft.folder import list_factors, make_uniform, place_factors

GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "single"
TARGETS = "language_model/(en|de)coder/layers/(self_attn/q_proj|fc1)|image_projection"


@pytest.fixture(scope="module")
def vlm():
    return read_vlm(GOLDEN)


@pytest.mark.parametrize("name", WRITING)
def test_the_adapter_of_a_client_goes_out_whole_or_is_refused(name, vlm):
    adapter = make_client_adapter(name, vlm, TARGETS)
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


@pytest.mark.broad
@pytest.mark.parametrize("name", sorted({*methods_available()} - {*WRITING}))
def test_what_is_no_matrix_beside_a_weight_is_neither_merged_nor_written(name):
    """Soft prompts, heads, and adapters beside whole layers, of models that choose among classes."""
    vlm, params, _, method, adapter = make_method(name)
    used = move_client(method, adapter)
    for write in (lambda: list_factors(vlm, used), lambda: lora.merge(params, used)):
        with pytest.raises(lora.LoraError, match=REFUSED[name]):
            write()
