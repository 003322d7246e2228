"""Whole runs with noise: stopped and resumed bit for bit with all that a mechanism remembers, and what a line tells."""

import dataclasses

import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import federated_run

pytestmark = pytest.mark.broad

MECHANISMS = {
    "adaptive": (3, PrivacyOptions(noise=0.25, clip=0.05, quantile=0.5, delta=1e-3)),
    "banded": (1, PrivacyOptions(noise=1.0, clip=0.05, mechanism="banded", bands=2, delta=1e-3)),
}
SEED = 3  # with which a round of `banded` has nobody in it


@pytest.mark.parametrize("name", [pytest.param("adaptive", marks=pytest.mark.slow), "banded"])
def test_stopped_and_resumed_is_never_stopped(name, model, loaded, tmp_path):
    cohort, privacy = MECHANISMS[name]
    whole, halved = (
        dataclasses.replace(tiny_run(model, tmp_path / part), cohort=cohort, privacy=privacy, seed=SEED)
        for part in ("whole", "halved")
    )
    federated_run.train(whole, model=loaded)
    with pytest.raises(StopError):
        federated_run.train(halved, StopAfter(2), loaded)
    federated_run.resume(halved.out, model=loaded)
    assert_same_adapters(whole.out, halved.out)
    timing = {"seconds", "clients_per_second"}
    lines, again = (
        [{name: value for name, value in line.items() if name not in timing} for line in read_metrics(folder)]
        for folder in (whole.out, halved.out)
    )
    assert lines == again
    assert all(line["noise_norm"] > 0 for line in lines)
    assert all(line["sampled"] == line["clients"] for line in lines)
    empty = [line for line in lines if not line["clients"]]
    assert all(
        "loss" not in line and "noise_to_update" not in line and line["bytes_up_per_client"] == 0 for line in empty
    )
    if name == "adaptive":
        assert len({line["clip"] for line in lines}) == 4, "the clipping norm adapts"
    else:
        assert 0 < len(empty) < 4
