"""One round of two clients × three SGD steps on a tiny Florence-2, against transformers + PEFT from the same weights.

Ordinary: their numbers come from golden_round.npz (see pytorch_round.py). Marked `parity`: PyTorch runs here, on other
weights, which it reads from a folder that we wrote.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federation.round_case import ALPHA, BASE, CASES, FILE, GOLDEN_CASES, RANK, STEPS, TARGETS, draw_start, make_clients

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round import from_waves, make_round, to_waves
from fedvlm_jax.methods import Client, Setup, load_method
from fedvlm_jax.models import load_vlm, save_checkpoint
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils import tree


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """-> our model, its weights, what PyTorch found on the same weights."""
    vlm, params = load_vlm(BASE)
    if request.param == "golden":
        with np.load(FILE) as file:
            return vlm, params, dict(file)
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
        pytest.skip("needs the extra `parity`: pip install -e '.[parity]'")
    from federation.pytorch_round import answer

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    spread = [x + 0.2 * jnp.std(x) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(structure, spread)
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(vlm, params, folder)
    return vlm, params, answer(folder, tuple(CASES))


def make_cohort(vlm, params, clients, frozen=True):
    """The ragged clients in one shape: rows and batches padded, padding masked; pictures as their frozen features."""
    clients = [dict(client) for client in clients]
    if frozen:
        features = jax.jit(lambda params, pixels: vlm.image_features(params, None, pixels))
        pixels = [c.pop("pixel_values") for c in clients]
        computed = np.split(features(params, np.concatenate(pixels)), np.cumsum([len(p) for p in pixels])[:-1])
        clients = [c | {"image_features": np.asarray(f)} for c, f in zip(clients, computed, strict=True)]
    rows, batch = (max(map(len, (c["labels"] for c in clients))), max(len(step) for s in STEPS for step in s))
    examples = {
        name: np.stack([np.pad(c[name], [(0, rows - len(c[name]))] + [(0, 0)] * (c[name].ndim - 1)) for c in clients])
        for name in clients[0]
    }
    indices = np.zeros((len(STEPS), len(STEPS[0]), batch), np.int32)
    mask = np.zeros(indices.shape, bool)
    for client, steps in enumerate(STEPS):
        for step, chosen in enumerate(steps):
            indices[client, step, : len(chosen)], mask[client, step, : len(chosen)] = chosen, True
    counts = np.asarray([len(c["labels"]) for c in clients])
    weights = (counts / counts.sum()).astype(np.float32)
    return Client(examples, indices, mask, weights, np.arange(2, dtype=np.int32), np.ones(2, bool), weights)


def run_ours(vlm, params, clients, targets, name, clip, kind, rates, frozen=True):
    """-> the start, the server's factors, the clients' own, norms of the gradients as the engine reports them."""
    sites = {site.path: site for site in lora.select(vlm.sites, targets)}
    start = draw_start(kind, {path: (*site.stack, site.d_in, site.d_out) for path, site in sites.items()})
    spec = lora.LoRA(rank=RANK, alpha=ALPHA, targets=targets)
    fresh = lora.init(jax.random.key(0), vlm.sites, spec)
    adapter = tree.unflatten(tree.flatten(fresh) | {path: jnp.asarray(x) for path, x in start.items()})
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, fresh)

    trainer = make_local_trainer(vlm, load_objective("sft"), optimizer="sgd", clip_norm=clip)
    method = load_method(name, Setup(sites=vlm.sites, spec=spec, start_optimizer=trainer.start))
    server, cohort = method.init(adapter=adapter), make_cohort(vlm, params, clients, frozen)
    blank = jax.eval_shape(lambda: method.init_client(key=jax.random.key(0), server=server, number=jnp.int32(0)))
    states = jax.tree.map(lambda x: np.zeros((2, *x.shape), x.dtype), blank)
    out = make_round(method, trainer, make_mesh(1))(
        params,
        replicate(make_mesh(1), server),
        to_waves(states, 1),
        to_waves(cohort, 1),
        jnp.asarray(cohort.weight),
        {"a": jnp.float32(rates[0]), "b": jnp.float32(rates[1])},
        jnp.int32(1),
        jax.random.key(1),
    )
    own = from_waves(out.personal)["own"]
    factors = {"server": tree.flatten(out.server["shared"])}
    factors |= {str(k): tree.flatten(jax.tree.map(lambda x, k=k: x[k], own)) for k in range(2)}
    for part in factors.values():
        for path in [path for path in part if path.endswith("scale")]:
            del part[path]
    return start, factors, out.metrics["gradient_norm"]


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


@pytest.mark.parametrize(
    ("base", "case"),
    [("golden", case) for case in GOLDEN_CASES]
    + [pytest.param("live", case, marks=pytest.mark.parity) for case in CASES],
    indirect=["base"],
)
def test_a_round_is_pytorch_s(base, case):
    vlm, params, answers = base
    clip = CASES[case][1]
    start, ours, norms = run_ours(vlm, params, make_clients(), TARGETS, *CASES[case])
    theirs = {}
    for key, value in answers.items():
        owner, _, path = key.removeprefix(f"{case}/").partition("/")
        if key.startswith(f"{case}/") and path:
            theirs.setdefault(owner, {})[path] = value
    assert {owner for owner, part in ours.items() if part} == theirs.keys()

    for owner, factors in theirs.items():
        assert ours[owner].keys() == factors.keys()
        for factor in "ab":
            paths = [path for path in factors if path.endswith(f"/{factor}")]
            if not paths:
                continue
            moved = norm(factors[path] - start[path] for path in paths)
            error = norm(ours[owner][path] - factors[path] for path in paths)
            print(f"{case} {owner} {factor}: moved {moved:.3g}, error {error / moved:.1e} of that")  # noqa: T201
            assert moved > max(0.05, 0.005 * norm(start[path] for path in paths)), "the round did too little to compare"
            assert error <= 1e-3 * moved
    np.testing.assert_allclose(norms, answers[f"{case}/norms"].mean(axis=1), rtol=1e-3)
    if clip is not None:
        assert answers[f"{case}/norms"].min() > clip, "nothing was clipped"
