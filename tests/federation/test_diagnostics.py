"""The health of an aggregation against dense NumPy: products formed, angles from SVDs, pairs one by one."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest

from fedvlm_jax.federation.diagnostics import _draw_few, examine

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
    examine_halves = partial(examine, component=lambda path: path.split("/")[1])
    found = jax.jit(examine_halves)(adapters, np.asarray(weights, np.float32))
    expected = expect(sites, np.asarray(weights))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name


def test_pairs_of_many_clients_are_those_of_some_that_count():
    """420 places, of which 280 count: what averaging loses is of all, pairs are of 64."""
    adapters, sites = make_adapters(clients=420)
    weights = np.where(np.arange(420) % 3 == 0, 0, 1 / 280).astype(np.float32)
    few = np.asarray(_draw_few(weights))
    assert len({*few.tolist()}) == 64
    assert np.all(weights[few] > 0)
    some = {path: {name: leaf[few] for name, leaf in site.items()} for path, site in sites.items()}
    found = jax.jit(examine)(adapters, weights)
    of_few = expect(some, np.full(64, 1 / 64))
    for name in ("angle_a", "update_dissimilarity"):
        assert float(found[name]) == pytest.approx(of_few[name], rel=1e-4), name
    means = {path: [np.tensordot(weights, site[x], 1) for x in "ab"] for path, site in sites.items()}
    whole = {path: np.einsum("k,klir,klro->lio", weights, site["a"], site["b"]) for path, site in sites.items()}
    lost = sum(np.sum((whole[path] - a @ b) ** 2) for path, (a, b) in means.items())
    assert float(found["aggregation_error"]) == pytest.approx(
        np.sqrt(lost / sum(np.sum(each**2) for each in whole.values())), rel=1e-3
    )


def test_the_numbers_of_thousands_of_clients_need_no_memory_of_their_square():
    """4,000 clients of rank 8: Gram matrices over all of them would take 4 GB a layer."""
    site = {"a": (4000, 32, 8), "b": (4000, 8, 32), "scale": (4000,)}
    adapters = {"fc1": {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in site.items()}}
    program = jax.jit(examine).lower(adapters, jax.ShapeDtypeStruct((4000,), np.float32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**28


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


def put_beside(first, second):
    """Adapters of two pairs each, with the form of `lora.concatenate`."""

    def join(path, one, other):
        name = path[-1].key
        if name == "scale":
            return np.ones_like(one)
        return np.concatenate([one, other], axis=-1 if name == "a" else -2)

    return jax.tree_util.tree_map_with_path(join, first, second)


def test_adapters_side_by_side_are_compared_like_with_like():
    """By hand: the first pairs' A are alike, the second ones' lie on axes that are at right angles or the same.

    Clients 0 and 1 share an axis, 2 and 3 another one: of six pairs two have cosine 1 and four have 0, so that the mean
    is (1 + 1/3) / 2. Not told of the two pairs, columns of one are compared with those of the other.
    """
    adapters, _ = make_adapters()
    same = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), adapters)

    def place(path, leaf):
        if path[-1].key != "a":
            return leaf
        axes = np.zeros_like(leaf)
        for client, axis in enumerate((0, 0, 3, 3)):
            axes[client, :, axis, 0] = 2.0
        return axes

    second = jax.tree_util.tree_map_with_path(place, same)
    weights = np.full(4, 0.25, np.float32)
    found = jax.jit(examine, static_argnums=2)(put_beside(same, second), weights, 2)
    assert float(found["angle_a"]) == pytest.approx(np.degrees(np.arccos(2 / 3)), abs=0.05)


def test_an_adapter_that_is_not_there_yet_is_at_no_angle():
    """A mixture of nobody's is zero, as are the columns beyond a client's rank."""
    adapters, _ = make_adapters()
    same = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), adapters)
    nothing = jax.tree.map(np.zeros_like, same)
    weights = np.full(4, 0.25, np.float32)
    beside = jax.jit(examine, static_argnums=2)(put_beside(same, nothing), weights, 2)
    assert float(beside["angle_a"]) < 0.1
    low = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf * (np.arange(3) < np.asarray([1, 2, 3, 3])[:, None, None, None]) if path[-1].key == "a" else leaf
        ),
        same,
    )
    assert float(jax.jit(examine)(low, weights)["angle_a"]) < 0.1


def test_an_adapter_that_adds_nothing_yet_is_in_no_pair():
    """Second pairs that nobody trained, all alike and at weight 0, must not make the first ones look alike."""
    (first, _), (second, _) = make_adapters(), make_adapters(seed=1)
    weights = np.full(4, 0.25, np.float32)
    alone = jax.jit(examine)(first, weights)["angle_a"]
    untrained = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "b" else np.repeat(leaf[:1], 4, axis=0), second
    )
    found = jax.jit(examine, static_argnums=2)(put_beside(first, untrained), weights, 2)
    assert float(found["angle_a"]) == pytest.approx(float(alone), rel=1e-5)
    assert float(alone) > 10
