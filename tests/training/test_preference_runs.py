"""Federated runs that learn from pairs, on the tiny model: what is preferred is learnt, references are found again."""

import dataclasses

import jax
import numpy as np
import pytest
from make_parquet import make_row, make_rows, write_rows
from tiny_run import tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, PreferenceOptions, SystemOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.objectives.log_probs import score_pairs
from fedvlm_jax.run_dir.artifacts import open_adapters
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import SilentProgress

ROUNDS = 10
WORDS = (("red", "cat"), ("up", "no"), ("one", "hand"), ("car", "bus"), ("water", "food"), ("bird", "house"))
"""What is preferred to what, by everybody; a token each, because to a random model a longer answer is less likely."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two clients that are asked alike and agree."""
    rows = []
    for client in "ab":
        for split in ("train", "train", "validation", "test"):
            for chosen, rejected in WORDS:
                words = {"question": f"{chosen} or {rejected}", "chosen": chosen, "rejected": rejected}
                rows.append(make_row(len(rows), client=client, split=split, **words))
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.parquet", rows)


def make_run(model, pairs, out, **changes):
    """Everybody every round, at high rates; validated once, so that the stored models are the last ones."""
    run = tiny_run(
        model,
        out,
        objective="dpo",
        cohort=None,
        data=make_options(source=str(pairs)),
        train=TrainOptions(rounds=ROUNDS, local_steps=4, batch_size=4, learning_rate_a=3e-2, learning_rate_b=3e-2),
        evaluation=EvaluationOptions(every=ROUNDS, max_answer_tokens=4, batch_size=6),
    )
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope="module")
def loaded(model, pairs, tmp_path_factory):
    return load_model(make_run(model, pairs, tmp_path_factory.mktemp("unused")))


def count_preferred(experiment, adapters):
    """The share of all training pairs whose chosen answer is the likelier one, each by its client's own model."""
    loaded, wins = experiment.model, []
    score = jax.jit(lambda params, adapter, batch: score_pairs(loaded.vlm, params, adapter, batch))
    for number, client in enumerate(experiment.examples.clients):
        own = None if adapters is None else jax.tree.map(lambda leaf, n=number: leaf[n], adapters)
        scores = score(loaded.params, own, experiment.inputs(client.train))
        wins += (scores["chosen_log_prob"] > scores["rejected_log_prob"]).tolist()
    return np.mean(wins)


@pytest.mark.parametrize(
    ("method", "objective", "options"),
    [
        pytest.param("local", "dpo", {}, marks=pytest.mark.slow),
        pytest.param("fedavg-lora", "dpo", {}, marks=pytest.mark.slow),
        pytest.param("plora", "dpo", {}, marks=pytest.mark.broad),
        # Beside a random model's cross-entropy of 8 nats.
        pytest.param("plora", "sft+dpo", {"beta": 1.0, "sft_weight": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_what_is_preferred_is_learnt(model, pairs, loaded, tmp_path, method, objective, options):
    preference = PreferenceOptions(**options)
    run = make_run(model, pairs, tmp_path / "run", method=method, objective=objective, preference=preference)
    folder = federated_run.train(run, model=loaded)
    first, *_, last = read_metrics(folder)
    assert last["reward_accuracy"] > max(first["reward_accuracy"], 0.9)
    assert last["reward_margin"] > first["reward_margin"] > 0
    assert last["loss"] < first["loss"]
    if objective == "sft+dpo":
        assert last["token_accuracy"] > first["token_accuracy"]
        assert last["loss"] == pytest.approx(last["dpo_loss"] + 0.1 * last["sft_loss"], rel=1e-5)
    experiment = open_experiment(run, loaded)
    names = [client.name for client in experiment.examples.clients]
    after = count_preferred(experiment, open_adapters(folder / "adapters", names)(np.arange(len(names))))
    assert after > max(count_preferred(experiment, None), 0.9)


def test_a_reference_on_disk_is_computed_once(model, pairs, tmp_path):
    """A resumed run, or another one on the same pairs, finds what the first has left; the numbers are the same."""
    system = SystemOptions(cache="disk", cache_dir=tmp_path / "cache")
    run = make_run(model, pairs, tmp_path / "run", system=system)
    taken = []
    for _ in range(2):
        show = SilentProgress()
        batch = open_experiment(run, load_model(run), show).inputs(np.arange(9))
        taken.append({name: array for name, array in batch.items() if name.startswith("reference_")})
        computed = [note for note in show.notes if note.startswith("reference log-probabilities")]
        assert bool(computed) == (len(taken) == 1), computed
    assert taken[0].keys() == {"reference_chosen", "reference_rejected"}
    for name, values in taken[0].items():
        np.testing.assert_array_equal(values, taken[1][name])
        assert (values < 0).all()


def test_runs_of_a_model_share_the_reference(model, pairs, loaded, tmp_path):
    open_experiment(make_run(model, pairs, tmp_path), loaded)
    show = SilentProgress()
    other = make_run(model, pairs, tmp_path, method="local", preference=PreferenceOptions(beta=1.0))
    open_experiment(other, loaded, show)
    assert not [note for note in show.notes if note.startswith("reference")]


@pytest.mark.broad
def test_options_of_the_loss_are_those_of_the_run(model, pairs, loaded, tmp_path):
    """Two runs of a model that differ in beta alone are two programs."""
    lines = []
    for beta in (0.1, 1.0):
        out = tmp_path / str(beta)
        train, preference = TrainOptions(rounds=1, local_steps=2), PreferenceOptions(beta=beta)
        run = make_run(model, pairs, out, preference=preference, train=train)
        federated_run.train(run, model=loaded)
        lines.append(read_metrics(out)[-1])
    assert lines[1]["reward_margin"] > 3 * lines[0]["reward_margin"] > 0


@pytest.mark.parametrize("objective", ["dpo", "sft+dpo"])
def test_data_without_rejected_answers_is_told_before_the_model_is_loaded(tmp_path, objective):
    path = write_rows(tmp_path / "rows.parquet", make_rows(4), drop=("rejected",))
    run = tiny_run(tmp_path / "no-such-model", tmp_path / "run", data=make_options(source=str(path)))
    with pytest.raises(UserError, match="has no column 'rejected'"):
        load_model(dataclasses.replace(run, objective=objective))


def test_rows_that_are_no_pair_count_for_sft_and_are_left_out_for_dpo(model, tmp_path):
    rows = make_rows(40)
    rows[3]["rejected"], rows[4]["rejected"] = None, rows[4]["chosen"]
    data = make_options(source=str(write_rows(tmp_path / "rows.parquet", rows)), max_bad_share=0.1)
    run = make_run(model, None, tmp_path / "run", data=data)
    loaded = load_model(run)
    experiment = open_experiment(run, loaded)
    assert len(experiment.examples) == 38
    assert sorted(row.reason for row in experiment.examples.skipped) == [
        "chosen equals rejected",
        "empty rejected answer",
    ]
    other = open_experiment(dataclasses.replace(run, objective="sft"), loaded)
    assert len(other.examples) == 40
    assert "reference_chosen" not in other.inputs(np.arange(2))
