"""Partitions as pure functions: what is drawn has its distribution, and every unit has one owner."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedvlm_jax.data.partitioning.algorithms import cut_dirichlet, cut_iid, cut_pathological, cut_quantity
from fedvlm_jax.errors import UserError

UNITS = 4000
"""Per label or in all, where moments are taken: rounding to whole units then moves a share by 1/4000 at most."""


def rng(*seed):
    return np.random.default_rng([77, *seed])


def check_dirichlet(shares, alpha):
    """Shares [N, C] of N independent draws against the moments of the symmetric Dirichlet and its Beta marginal.

    Means against 1/C, variances against (1/C)(1 - 1/C)/(C·alpha + 1) and covariances against -(1/C²)/(C·alpha + 1),
    each within five standard errors as the draws themselves show them; and Kolmogorov-Smirnov against
    Beta(alpha, (C - 1)·alpha). With a fixed seed this either always fails or never.
    """
    draws, clients = shares.shape
    centred = shares - 1 / clients
    spread = 1 / (clients * alpha + 1)

    def close(sample, expected):
        assert abs(sample.mean() - expected) < 5 * sample.std() / np.sqrt(draws)

    for one in range(clients):
        close(shares[:, one], 1 / clients)
        close(centred[:, one] ** 2, (1 / clients) * (1 - 1 / clients) * spread)
        close(centred[:, one] * centred[:, one - 1], -(1 / clients**2) * spread)
    smooth = shares[:, 0] + rng(5).uniform(-0.5, 0.5, draws) / UNITS  # whole units have ties, which the test forbids
    assert stats.kstest(smooth, stats.beta(alpha, (clients - 1) * alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.3, 1.0, 20.0])
def test_every_label_s_shares_have_the_moments_of_their_dirichlet(alpha):
    clients, labels, draws = 5, 4, 250
    units = np.repeat(np.arange(labels), UNITS)
    counts = np.stack(
        [
            np.bincount(cut_dirichlet(units, clients, alpha, rng(draw)) + clients * units, minlength=clients * labels)
            for draw in range(draws)
        ]
    ).reshape(draws, labels, clients)
    check_dirichlet(counts.reshape(-1, clients) / UNITS, alpha)
    across = np.corrcoef(counts[:, 0, 0], counts[:, 1, 0])[0, 1]  # labels are shared out independently
    assert abs(across) < 5 / np.sqrt(draws)


def test_quantities_have_the_moments_of_their_dirichlet():
    counts = [np.bincount(cut_quantity(UNITS, 5, 0.7, rng(draw)), minlength=5) for draw in range(1500)]
    check_dirichlet(np.stack(counts) / UNITS, 0.7)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 99))
def test_at_alpha_inf_every_client_has_its_even_share_of_every_label(labels, clients, seed):
    labels = np.asarray(labels)
    owners = cut_dirichlet(labels, clients, np.inf, rng(seed))
    for label in np.unique(labels):
        counts = np.bincount(owners[labels == label], minlength=clients)
        assert counts.max() - counts.min() <= 1
    sizes = np.bincount(cut_quantity(len(labels), clients, np.inf, rng(seed)), minlength=clients)
    assert sizes.max() - sizes.min() <= 1


def test_a_large_alpha_comes_close_to_iid():
    labels = np.repeat([0, 1], [9000, 1000])
    owners = cut_dirichlet(labels, 10, 1e6, rng())
    assert abs(np.bincount(owners[labels == 0]) - 900).max() <= 5
    assert abs(np.bincount(owners[labels == 1]) - 100).max() <= 2


@given(
    st.lists(st.integers(0, 6), max_size=120),
    st.integers(1, 12),
    st.sampled_from([1e-300, 1e-3, 0.3, 5.0, np.inf]),
    st.integers(0, 999),
)
def test_every_unit_has_one_owner_and_the_same_seed_the_same(labels, clients, alpha, seed):
    labels = np.asarray(labels, int)

    def cut_all():
        return (
            cut_iid(len(labels), clients),
            cut_quantity(len(labels), clients, alpha, rng(seed)),
            cut_dirichlet(labels, clients, alpha, rng(seed)),
        )

    for owners, again in zip(cut_all(), cut_all(), strict=True):
        assert owners.shape == labels.shape
        assert ((owners >= 0) & (owners < clients)).all()
        assert (owners == again).all()
    sizes = np.bincount(cut_iid(len(labels), clients), minlength=clients)
    assert sizes.max() - sizes.min() <= 1


@given(st.data())
def test_pathological_clients_have_k_labels_at_most_and_nothing_is_left(data):
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    classes = data.draw(st.integers(1, len(sizes)))
    least = -(-len(sizes) // classes)
    clients = data.draw(st.integers(least, least + 6).filter(lambda count: count * classes <= sum(sizes)))
    labels = rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    owners = cut_pathological(labels, clients, classes, rng(data.draw(st.integers(0, 99))))
    for client in range(clients):
        assert 1 <= len(np.unique(labels[owners == client])) <= classes
    assert ((owners >= 0) & (owners < clients)).all()


def test_equal_labels_are_cut_into_shards_of_one_size():
    """The case of McMahan et al.: ten digits, 100 clients, two shards of 300 each."""
    labels = np.repeat(np.arange(10), 6000)
    owners = cut_pathological(labels, 100, 2, rng())
    pairs = np.unique(np.stack([owners, labels]), axis=1, return_counts=True)[1]
    assert set(pairs.tolist()) <= {300, 600}
    assert (np.bincount(owners) == 600).all()


def test_a_label_of_ninety_per_cent_gets_most_shards_and_the_others_one_at_least():
    labels = np.repeat([0, 1, 2], [90, 5, 5])
    owners = cut_pathological(labels, 5, 2, rng())  # 10 shards: 8 of 90, one of each 5
    assert len(np.unique(owners[labels == 1])) == 1
    assert len(np.unique(owners[labels == 2])) == 1
    sizes = np.unique(np.stack([owners, labels]), axis=1, return_counts=True)
    assert set(sizes[1][sizes[0][1] == 0].tolist()) <= {11, 12, 22, 23, 24}


@pytest.mark.parametrize(
    ("labels", "clients", "classes", "message"),
    [
        ([0, 1], 4, 3, "--data.classes-per-client is 3, and the key has only 2 values"),
        (
            list(range(9)),
            2,
            2,
            "hold 4 values, and the key has 9.*--data.clients 5 or more.*--data.classes-per-client 5",
        ),
        ([0, 1, 1], 2, 2, "need 4 images, and there are 3"),
    ],
)
def test_what_pathological_cannot_do_is_told(labels, clients, classes, message):
    with pytest.raises(UserError, match=message):
        cut_pathological(np.asarray(labels), clients, classes, rng())
