"""Clusters inside a compiled round, against SciPy, definitions and what was planted; a router's choice of outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import paper_clusters as papers
import pytest
from flax import linen as nn
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedvlm_jax import lora
from fedvlm_jax.lora import LoraError
from fedvlm_jax.methods.components.clusters import (
    choose_clusters,
    link_averages,
    mean_by_cluster,
    measure_distances,
    score_silhouette,
)
from fedvlm_jax.methods.components.layer_clusters import cut_tree
from fedvlm_jax.methods.components.spectral_clusters import cluster_spectrally, measure_subspace_distances


def draw(places, there, seed=0):
    """Euclidean distances of random points, and which `there` of the places are somebody's."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(places, 3))
    present = np.zeros(places, bool)
    present[np.sort(rng.choice(places, there, replace=False))] = True
    return np.linalg.norm(points[:, None] - points, axis=-1), present


def together(labels):
    return np.asarray(labels)[:, None] == np.asarray(labels)


LINK, CHOOSE = jax.jit(link_averages), jax.jit(choose_clusters, static_argnums=2)


@pytest.mark.parametrize(("places", "there"), [(6, 6), (12, 7), (3, 1), (3, 2)])
def test_average_linkage_is_that_of_scipy(places, there):
    apart, present = draw(places, there)
    partitions, who = np.asarray(LINK(jnp.asarray(apart, jnp.float32), present)), np.flatnonzero(present)
    whole = linkage(squareform(apart[np.ix_(who, who)]), "average") if there > 1 else None
    for number in range(1, there + 1):
        want = [1] if whole is None else fcluster(whole, number, "maxclust")
        assert (together(partitions[number - 1][who]) == together(want)).all()
        assert len(set(partitions[number - 1][who])) == number


@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_clusters_has_the_best_silhouette(seed):
    apart, present = draw(9, 7, seed)
    who = np.flatnonzero(present).tolist()
    labels, many = CHOOSE(jnp.asarray(apart, jnp.float32), present, 5)
    partitions = papers.average_linkage(who, lambda i, j: apart[i, j])
    scores = {c: papers.silhouette(partitions[c], lambda i, j: apart[i, j]) for c in range(2, 6)}
    for c, score in scores.items():
        found = score_silhouette(jnp.asarray(apart, jnp.float32), LINK(jnp.asarray(apart), present)[c - 1], present)
        np.testing.assert_allclose(found, score, atol=1e-5)
    assert many == max(scores, key=scores.__getitem__)
    assert sorted(set(np.asarray(labels)[who])) == list(range(int(many)))
    assert (np.asarray(labels)[~present] == 5).all()


def test_few_clients_are_one_cluster():
    for there in (1, 2):
        apart, present = draw(4, there)
        assert CHOOSE(jnp.asarray(apart), present, 3)[1] == 1
        assert cluster_spectrally(jnp.asarray(apart), jnp.asarray(present), 3)[1] == 1


@pytest.mark.broad
def test_planted_clusters_are_found():
    """B's of two directions with noise, in two layers of a stack: both rules, each with its distance."""
    rng = np.random.default_rng(1)
    kinds = np.asarray([0, 1, 1, 0, 2, 2, 0])
    planted = rng.normal(size=(3, 2, 2, 9))
    b = {"fc": {"b": jnp.asarray(planted[kinds] + 0.2 * rng.normal(size=(7, 2, 2, 9)), jnp.float32)}}
    for labels, many in (
        choose_clusters(measure_distances(b, b), jnp.ones(7, bool), 5),
        cluster_spectrally(measure_subspace_distances(b, b), jnp.ones(7, bool), 5),
    ):
        assert many == 3
        assert (together(labels) == together(kinds)).all()


def test_subspaces_are_compared_by_their_principal_angles():
    """45° in one of two directions: the mean of the squared sines is ¼; another basis of one span changes nothing."""
    turned = np.asarray([[1, 1, 0, 0], [0, 0, 2, 0]], np.float32)
    b = jnp.asarray(np.stack([np.eye(4)[[0, 2]], turned, [turned[0] + turned[1], turned[0] - turned[1]]]), jnp.float32)
    found = measure_subspace_distances({"b": b}, {"b": b})
    np.testing.assert_allclose(found, [[0, 0.25, 0.25], [0.25, 0, 0], [0.25, 0, 0]], atol=1e-6)


def test_a_mean_looks_at_nobody_who_does_not_count():
    stacked = {"b": jnp.asarray([2.0, jnp.nan, 4.0, 8.0])}
    found = mean_by_cluster(stacked, jnp.asarray([1, 1, 1, 0]), jnp.asarray([1.0, 0.0, 3.0, 0.0]), 2)
    np.testing.assert_allclose(found["b"], [0.0, 3.5])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="fc")(x)


def route(gate, slots, x):
    """What a layer adds whose groups of ranks each answer with a number of their own."""
    groups = slots.shape[1]
    site = {"a": jnp.ones((3, groups)), "b": jnp.eye(groups, 4), "scale": jnp.ones(()), "gate": gate, "slots": slots}
    adapter, params = {"fc": site}, {"fc": {"kernel": jnp.zeros((3, 4))}}
    return lora.inject(Layer().apply)(params, adapter, x)[:, :groups] / x.sum(axis=1, keepdims=True)


def test_a_token_keeps_as_many_outputs_as_there_are_groups():
    """Three groups, the third of which nothing leads to; so of three open outputs the two best, by hand."""
    slots = jnp.asarray([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]], jnp.float32)
    gate = jnp.zeros((3, 5)).at[0].set(jnp.log(jnp.asarray([2.0, 3.0, 9.0, 1.0, 9.0])))
    found = route(gate, slots, jnp.asarray([[1.0, 1.0, 1.0], [-1.0, 1.0, 2.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(found, [[2 / 5, 3 / 5, 0], [1 / 3, 2 / 3, 0], [0.5, 0.5, 0]], rtol=1e-5)


def test_the_choice_has_no_gradient_and_the_slots_none():
    slots = jnp.asarray([[1, 0], [0, 1], [0, 1]], jnp.float32)
    x = jnp.asarray([[1.0, 0.5, 0.25]])
    gate = jnp.zeros((3, 3)).at[0].set(jnp.asarray([0.3, 0.2, 0.1]))
    slopes = jax.grad(lambda gate, slots: route(gate, slots, x)[0, 0], argnums=(0, 1))(gate, slots)
    p = np.exp(0.3) / (np.exp(0.3) + np.exp(0.2))
    np.testing.assert_allclose(slopes[0][0], [p * (1 - p), -p * (1 - p), 0], rtol=1e-5)
    assert not slopes[1].any()
    assert not lora.trainable({"fc": {"slots": slots, "gate": gate}})["fc"]["slots"]


def test_slots_of_another_shape_are_refused():
    with pytest.raises(LoraError, match="slots"):
        route(jnp.zeros((3, 4)), jnp.zeros((3, 2)), jnp.ones((1, 3)))


def test_a_layer_may_choose_among_any_number_of_clusters():
    """A window as wide as integers go is one of all clusters."""
    apart = jnp.asarray(np.abs(np.subtract.outer([0, 1, 10, 11, 30, 31], [0, 1, 10, 11, 30, 31])), jnp.float32)
    found = jax.jit(cut_tree, static_argnums=(2, 3, 4))(apart[None], jnp.ones(6, bool), 4, 2**31 - 1, 0.1)
    assert found.tolist() == [[0, 0, 1, 1, 2, 2]]
