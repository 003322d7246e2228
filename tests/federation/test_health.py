"""The health of an aggregation against dense NumPy: products formed, angles from SVDs, pairs one by one."""

import itertools

import jax
import numpy as np
import pytest

from fedvlm_jax.federation.health import examine

SHAPES = {"language_model/encoder/fc1": (2, 7, 3, 5), "language_model/decoder/fc2": (2, 5, 3, 6)}
"""Site -> layers, d_in, rank, d_out."""


def make_adapters(clients=4, seed=0):
    rng = np.random.default_rng(seed)
    sites = {}
    for path, (layers, d_in, rank, d_out) in SHAPES.items():
        sites[path] = {
            "a": rng.normal(size=(clients, layers, d_in, rank)).astype(np.float32),
            "b": rng.normal(size=(clients, layers, rank, d_out)).astype(np.float32),
            "scale": np.full((clients, layers), 0.5, np.float32),
        }
    return {"language_model": {path.split("/")[1]: {path.split("/")[2]: site} for path, site in sites.items()}}, sites


def expect(sites, weights):
    who = np.flatnonzero(weights)
    lost, whole, cosines = {}, {}, []
    flat = {k: [] for k in who}
    for path, site in sites.items():
        a, b = site["a"].astype(np.float64), 0.5 * site["b"].astype(np.float64)
        product = sum(weights[k] * a[k] @ b[k] for k in who)
        means = [sum(weights[k] * x[k] for k in who) for x in (a, b)]
        lost[path] = np.sum((product - means[0] @ means[1]) ** 2)
        whole[path] = np.sum(product**2)
        for k in who:
            flat[k].append((a[k] @ b[k]).ravel())
        for i, j in itertools.permutations(who, 2):
            for layer in range(a.shape[1]):
                basis = [np.linalg.qr(a[k, layer])[0] for k in (i, j)]
                cosines.append(np.sqrt(np.mean(np.linalg.svd(basis[0].T @ basis[1], compute_uv=False) ** 2)))
    updates = {k: np.concatenate(parts) for k, parts in flat.items()}
    alike = [
        updates[i] @ updates[j] / np.linalg.norm(updates[i]) / np.linalg.norm(updates[j])
        for i, j in itertools.permutations(who, 2)
    ]
    return {
        "aggregation_error": np.sqrt(sum(lost.values()) / sum(whole.values())),
        **{f"aggregation_error/{path.split('/')[1]}": np.sqrt(lost[path] / whole[path]) for path in sites},
        "angle_a": np.degrees(np.arccos(np.mean(cosines))),
        "update_dissimilarity": 1 - np.mean(alike),
    }


@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.0, 0.25, 0.25)])
def test_the_numbers_are_those_of_dense_matrices(weights):
    adapters, sites = make_adapters()
    for site in sites.values():
        site["a"][weights.index(0.0) if 0.0 in weights else 0] *= 3  # lengths mean nothing to an angle
    found = jax.jit(examine)(adapters, np.asarray(weights, np.float32))
    expected = expect(sites, np.asarray(weights))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name


def test_equal_clients_are_at_no_angle_and_lose_nothing():
    adapters, _ = make_adapters()
    same = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), adapters)
    found = jax.jit(examine)(same, np.full(4, 0.25, np.float32))
    assert float(found["aggregation_error"]) < 1e-5
    assert float(found["angle_a"]) < 0.1
    assert abs(float(found["update_dissimilarity"])) < 1e-5


def test_a_gate_makes_no_matrix():
    adapters, _ = make_adapters()
    adapters["language_model"]["encoder"]["fc1"]["gate"] = np.zeros((4, 2, 7, 2), np.float32)
    assert examine(adapters, np.full(4, 0.25, np.float32)) == {}
