"""The learning rates of a run's rounds, dropout in them, and that a trainer runs them once."""

import pytest
from tiny_run import tiny_run

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.config.run_options import LoraOptions, TrainOptions
from fedvlm_jax.training import round_setup
from fedvlm_jax.training.experiment import make_simulator, open_experiment
from fedvlm_jax.training.trainer import FederatedTrainer
from fedvlm_jax.utils.progress import SilentProgress


def rates(**train):
    options = TrainOptions(rounds=8, learning_rate_a=4.0, learning_rate_b=8.0, **train)
    return [find_rates(options, number) for number in range(1, 10)]


def test_rates_rise_over_the_rounds_of_warm_up_and_fall_late():
    """A quarter, a half and three quarters in three rounds; a tenth after the sixth of eight, fine-tuning included."""
    found = rates(warmup_rounds=3, decay=0.1, decay_at=0.75)
    assert [one["a"] for one in found] == pytest.approx([1, 2, 3, 4, 4, 4, 0.4, 0.4, 0.4])
    assert [one["b"] for one in found] == pytest.approx([2, 4, 6, 8, 8, 8, 0.8, 0.8, 0.8])


def test_without_warm_up_rates_are_what_they_were():
    assert rates(decay=1.0) == [{"a": 4.0, "b": 8.0}] * 9


def test_dropout_reaches_training_and_targets_without_a_weight_are_told(model, loaded, tmp_path, monkeypatch):
    asked, show = [], SilentProgress()
    make = round_setup.make_local_trainer
    monkeypatch.setattr(round_setup, "make_local_trainer", lambda *given, **kw: asked.append(kw) or make(*given, **kw))
    options = LoraOptions(rank=2, dropout=0.25, targets="q_proj|o_proj|lm_head")
    run = tiny_run(model, tmp_path / "run", method="local", lora=options)
    make_simulator(open_experiment(run, loaded, show))
    assert [given["dropout"] for given in asked] == [0.25]
    assert [note for note in show.notes if "targets" in note] == [
        f"--lora.targets: o_proj, lm_head match no weight of {model}; the others have adapters"
    ]


@pytest.mark.broad
def test_a_trainer_runs_once(model, loaded, tmp_path):
    """Another run would begin with the models that the first one ended with."""
    (tmp_path / "run").mkdir()
    train = TrainOptions(rounds=1, local_steps=1, batch_size=4)
    trainer = FederatedTrainer(open_experiment(tiny_run(model, tmp_path / "run", train=train), loaded))
    trainer.run(0, ())
    with pytest.raises(ValueError, match="a trainer runs once"):
        trainer.run(0, ())
