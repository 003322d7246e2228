"""The private part of who never trained, of clients that were not drawn yet as of those that are held out."""

from types import SimpleNamespace

import numpy as np
import pytest
from federation.test_participation import Case, read_steps
from toy import RATES

from fedvlm_jax.runs.models import give_models
from fedvlm_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def driver():
    """plora with ranks 1, 2, 2, 2, after a round without client 2."""
    ranks = (1, 2, 2, 2)
    driver = Case("plora", ranks=ranks).start(ranks=ranks)
    driver.run_round(read_steps(driver, 1, [4, 4, 4], (0, 1, 3)), RATES)
    assert driver.population.known.tolist() == [True, True, False, True]
    return driver


def models_of(driver, kind):
    prepared = SimpleNamespace(
        run=SimpleNamespace(evaluation=SimpleNamespace(cold_start=kind)),
        session=SimpleNamespace(mesh=make_mesh(1)),
        layout=SimpleNamespace(wave=2),
    )
    site = give_models(prepared, driver, driver.now)(np.arange(4))["encoder"]["fc1"]
    return np.asarray(site["a"]), np.asarray(site["b"])


def test_a_client_that_was_not_drawn_yet_has_the_mean_of_the_others(driver):
    """And a rank of its own: ranks have no mean, which would be 1 and take half of the server's B away."""
    a, b = models_of(driver, "mean")
    np.testing.assert_allclose(a[2], a[[0, 1, 3]].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(b[2], np.asarray(driver.server["shared"]["encoder"]["fc1"]["b"]))
    assert np.abs(b[2][1]).max() > 0


def test_by_default_it_begins_as_everybody_did(driver):
    (a, b), (mean, _) = models_of(driver, "initial"), models_of(driver, "mean")
    np.testing.assert_array_equal(a[2], np.asarray(driver.server["start"]["encoder"]["fc1"]["a"]))
    assert np.abs(a[2] - mean[2]).max() > 1e-4
    assert np.abs(b[2]).max() > 0
