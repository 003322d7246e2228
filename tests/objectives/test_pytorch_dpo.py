"""Preference losses and their gradients on a tiny Florence-2, against transformers + PEFT from the same weights.

Ordinary: their numbers come from golden_dpo.npz (see pytorch_dpo.py). Marked `parity`: PyTorch runs here, on other
weights, which it reads from a folder that we wrote.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federation.round_case import ALPHA, BASE, RANK, TARGETS, draw_start
from objectives.dpo_case import CASES, FILE, make_batch

from fedvlm_jax import lora
from fedvlm_jax.models import load_vlm, save_checkpoint
from fedvlm_jax.objectives import PreferenceOptions, load_objective
from fedvlm_jax.objectives.log_probs import score_pairs
from fedvlm_jax.utils import tree


@pytest.fixture(scope="module", params=["golden", pytest.param("live", marks=pytest.mark.parity)])
def base(request, tmp_path_factory):
    """-> our model and weights, the adapter, the batch with the base's log-probabilities, what PyTorch found."""
    vlm, params = load_vlm(BASE)
    if request.param == "golden":
        with np.load(FILE) as file:
            answers = dict(file)
    else:
        if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
            pytest.skip("needs the extra `parity`: pip install -e '.[parity]'")
        from objectives.pytorch_dpo import answer

        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(4), len(leaves))
        spread = [x + 0.2 * jnp.std(x) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        params = jax.tree.unflatten(structure, spread)
        folder = tmp_path_factory.mktemp("base")
        save_checkpoint(vlm, params, folder)
        answers = answer(folder)

    sites = {site.path: site for site in lora.select(vlm.sites, TARGETS)}
    start = draw_start("trained", {path: (site.stack[0], site.d_in, site.d_out) for path, site in sites.items()})
    fresh = lora.init(jax.random.key(0), vlm.sites, lora.LoRA(rank=RANK, alpha=ALPHA, targets=TARGETS))
    adapter = tree.unflatten(tree.flatten(fresh) | {path: jnp.asarray(x) for path, x in start.items()})
    batch = make_batch()
    pixels = batch.pop("pixel_values")
    batch["image_features"] = jax.jit(lambda params, x: vlm.image_features(params, None, x))(params, pixels)
    scores = jax.jit(lambda params, batch: score_pairs(vlm, params, None, batch))(params, batch)
    batch |= {f"reference_{name}": scores[f"{name}_log_prob"] for name in ("chosen", "rejected")}
    return vlm, params, adapter, batch, answers


def test_the_base_s_log_probabilities_are_pytorch_s(base):
    _, _, _, batch, answers = base
    np.testing.assert_allclose(batch["reference_chosen"], answers["reference/labels"], rtol=1e-5)
    np.testing.assert_allclose(batch["reference_rejected"], answers["reference/rejected_labels"], rtol=1e-5)


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


BY_HAND = ("smoothed", "length-normalised")
"""Variants that test_dpo.py holds against values and gradients worked out by hand; here they are slow."""


def mark(base, case):
    golden = pytest.mark.slow if case in BY_HAND else pytest.mark.broad
    return pytest.param(base, case, marks=pytest.mark.parity if base == "live" else golden)


@pytest.mark.parametrize(
    ("base", "case"), [mark(base, case) for base in ("golden", "live") for case in CASES], indirect=["base"]
)
def test_loss_and_gradients_are_pytorch_s(base, case):
    vlm, params, adapter, batch, answers = base
    name, variant, beta, smoothing, weight = CASES[case]
    weighted = {"sft_weight": weight} if weight else {}
    options = PreferenceOptions(beta=beta, variant=variant, label_smoothing=smoothing, **weighted)
    objective = load_objective(name, options)
    step = jax.jit(jax.value_and_grad(lambda adapter: objective.loss(vlm, params, adapter, batch)[0]))
    loss, gradient = step(adapter)
    assert float(loss) == pytest.approx(float(answers[f"{case}/loss"]), rel=1e-4)
    gradient = tree.flatten(gradient)
    for factor in "ab":
        paths = [path for path in gradient if path.endswith(f"/{factor}")]
        theirs = {path: answers[f"{case}/{path}"] for path in paths}
        error = norm(gradient[path] - theirs[path] for path in paths) / norm(theirs.values())
        print(f"{case} {factor}: gradient {norm(theirs.values()):.3g}, error {error:.1e} of that")  # noqa: T201
        assert error <= 1e-4
