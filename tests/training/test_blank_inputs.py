"""What a round is compiled from before any picture is looked at has the shapes of what it then reads."""

import jax
import numpy as np
import pytest
from tiny_run import tiny_run

from fedvlm_jax.config.run_options import SystemOptions
from fedvlm_jax.training.experiment import make_simulator, open_experiment
from fedvlm_jax.training.wave_width import fit


@pytest.mark.parametrize(("cache", "objective"), [("memory", "sft"), ("off", "sft"), ("memory", "dpo")])
def test_blank_rows_have_the_shapes_of_real_ones(model, loaded, tmp_path, cache, objective):
    run = tiny_run(model, tmp_path / "run", system=SystemOptions(cache=cache), objective=objective)
    experiment = open_experiment(run, loaded)
    rows = np.asarray([[0, 3, 3], [1, 0, 2]])
    real, blank = experiment.inputs(rows), experiment.blank_inputs(rows)
    assert {name: (x.shape, x.dtype) for name, x in real.items()} == {
        name: (x.shape, x.dtype) for name, x in blank.items()
    }
    pictures = {"pixel_values", "image_features"}
    jax.tree.map(
        np.testing.assert_array_equal, *({k: v for k, v in x.items() if k not in pictures} for x in (real, blank))
    )


def test_the_first_round_finds_the_program_that_was_measured(model, loaded, tmp_path):
    experiment = fit(open_experiment(tiny_run(model, tmp_path / "run"), loaded))
    simulator = make_simulator(experiment)
    before = dict(simulator.programs.compiled)
    simulator.run_round(simulator.read_round(1), {"a": 1e-3, "b": 1e-3})
    assert simulator.programs.compiled == before != {}
