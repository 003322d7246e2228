"""From options to a method's setup."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from fedvlm_jax.config.run_options import Run, TrainOptions
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import choose_layout
from fedvlm_jax.methods import load_method
from fedvlm_jax.methods.components.personalized_download import start_pool
from fedvlm_jax.training import round_setup


@pytest.mark.parametrize(("wave", "places"), [(20, 20), (12, 24), (8, 24)])
def test_a_pool_has_room_for_the_cohort_however_it_is_laid_out(monkeypatch, wave, places):
    """Of 40 clients 20 a round: places beyond them are nobody's, and depend on the devices."""
    made = []
    monkeypatch.setattr(round_setup, "load_method", lambda name, setup: made.append(setup) or load_method(name, setup))
    layout = choose_layout([9] * 40, cohort=20, wave=wave, devices=1, steps=2, batch=2)
    run, vlm = Run(method="fedalt"), SimpleNamespace(sites={}, targets="x", components={}, component=lambda path: None)
    round_setup.build_programs(vlm, make_mesh(1), run, 40, layout.cohort, layout.places, layout.steps)
    (setup,) = made
    assert (setup.cohort, setup.places) == (20, places)
    assert len(start_pool({"b": jnp.zeros(1)}, setup)["number"]) == 20


@pytest.mark.parametrize("train", [{"local_steps": 2**31 - 1}, {"batch_size": 2**31 - 1}, {"local_epochs": 1e9}])
def test_a_round_of_more_rows_than_can_be_listed_is_refused(train):
    run = Run(train=TrainOptions(**train))
    with pytest.raises(UserError, match=r"a round would take [\d,]+ rows \(2 clients"):
        round_setup.lay_out_sizes(run, [9, 9], make_mesh(1), None, None)
