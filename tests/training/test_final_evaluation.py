"""What a run ends with: own, global and newcomers' models, and each model on each other's data, on the tiny model."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import tiny_run

from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.final_evaluation import read_gains
from fedvlm_jax.training.personalization import find_nearest


def run_with(model, folder, loaded, method="plora", held_out=0.25, **evaluation):
    run = tiny_run(model, folder, method=method)
    data = run.data.replace(held_out_clients=held_out)
    changed = dataclasses.replace(run.evaluation, **evaluation)
    return read_run(federated_run.train(dataclasses.replace(run, data=data, evaluation=changed), model=loaded))


@pytest.fixture(scope="module")
def record(model, loaded, tmp_path_factory):
    return run_with(model, tmp_path_factory.mktemp("runs") / "plora", loaded, cross_clients=True)


@pytest.mark.broad
def test_scores_do_not_depend_on_how_examples_are_cut(model, loaded, tmp_path):
    """Clients with 0, 1 and 9 examples beside each other, in pieces of 1 and 4 and waves of 1 and 3."""
    experiment = open_experiment(tiny_run(model, tmp_path), loaded)
    clients = experiment.examples.clients
    sizes = (0, 1, 9, 6)
    ragged = tuple(
        dataclasses.replace(client, test=np.concatenate([client.train, client.test])[:size])
        for client, size in zip(clients, sizes, strict=True)
    )
    examples = dataclasses.replace(experiment.examples, clients=ragged)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: (leaf + 0.3 * rng.standard_normal((4, *leaf.shape))).astype(np.float32), experiment.adapter
    )
    models = {"base": None, "own": lambda numbers: jax.tree.map(lambda leaf: leaf[numbers], adapters)}
    found = []
    for wave, batch in ((1, 1), (3, 4)):
        evaluator = dataclasses.replace(experiment.evaluator, examples=examples, wave=wave, batch=batch, base={})
        scored = evaluator(loaded.params, models, "test", range(4))
        found.append({name: one.scores for name, one in scored.items()})
    names = [client.name for client, size in zip(clients, sizes, strict=True) if size]
    for scores in found:
        for kind in models:
            assert list(scores[kind]["loss"]) == names
            for metric, values in scores[kind].items():
                for name in names:
                    assert values[name] == pytest.approx(found[0][kind][metric][name], rel=1e-4, abs=1e-5), metric
    assert found[0]["own"]["loss"] != found[0]["base"]["loss"]
    assert found[0]["base"]["reward_margin"] == dict.fromkeys(names, 0.0)
    assert any(found[0]["own"]["reward_margin"].values())


def test_what_a_client_gains_is_paired_over_its_examples():
    """By hand: the mean of ten gains of which five are 1 is a binomial's; its 2.5 % and 97.5 % points are 2 and 8."""
    ones, half = np.ones(10), np.repeat([0.0, 1.0], 5)
    own = {"better": ones, "worse": 0 * ones, "same": half, "half": ones, "alone": ones[:1]}
    base = {"better": 0 * ones, "worse": ones, "same": half, "half": half, "alone": ones[:1]}
    gains = read_gains(own, base)
    assert gains.keys() == own.keys() - {"alone"}
    assert np.ravel([gains[name] for name in ("better", "worse", "same")]).tolist() == [1, 1, -1, -1, 0, 0]
    assert gains["half"] == pytest.approx([0.2, 0.8])


@pytest.mark.broad
def test_those_who_trained_have_an_interval_around_what_they_gain(record):
    own, base = record.scores("personal"), record.scores("zero_shot")
    intervals = record.results["gain_intervals"]["exact_match"]
    assert set(intervals) == set(own)
    for client, (low, high) in intervals.items():
        assert low - 1e-9 <= own[client] - base[client] <= high + 1e-9


def test_who_is_scored_where(record):
    everyone, new = set(record.config["resolved"]["clients"]), set(record.scores("held_out/personal", "loss"))
    assert len(everyone) == 4
    assert len(new) == 1
    for model in ("zero_shot", "personal", "global"):
        assert set(record.scores(model, "loss")) == everyone - new
    assert record.config["federation"]["held_out"]["clients"] == sorted(new)
    assert {line["clients"] for line in record.rounds} == {3}


def test_the_matrix_has_own_models_on_its_diagonal(record):
    stored = record.results["cross_clients"]
    own = record.scores("personal", "loss")
    assert stored["clients"] == list(own)
    assert np.diagonal(stored["loss"]) == pytest.approx(list(own.values()), rel=1e-5)
    assert not np.allclose(stored["loss"], np.transpose(stored["loss"]))


def test_the_global_model_is_nobody_s_own_where_something_is_private(record):
    own, general = record.scores("personal", "loss"), record.scores("global", "loss")
    assert all(own[client] != general[client] for client in own)
    # A held-out client begins with exactly the global model.
    newcomer = load_file(
        next(record.folder.glob(f"adapters/clients/{record.config['federation']['held_out']['clients'][0]}*"))
    )
    shared = load_file(record.folder / "adapters" / "shared.safetensors")
    for path, leaf in shared.items():
        np.testing.assert_array_equal(newcomer[path], leaf)


@pytest.mark.broad
def test_where_nothing_is_private_the_global_model_is_everybody_s(model, loaded, tmp_path):
    record = run_with(model, tmp_path / "run", loaded, method="fedavg-lora", held_out=0.0)
    assert record.results["global"] == record.results["personal"]
    assert "held_out" not in record.results
    record = run_with(model, tmp_path / "local", loaded, method="local", held_out=0.0)
    assert "global" not in record.results


@pytest.mark.parametrize("kind", ["mean", "nearest"])
def test_newcomers_start_with_others_private_part(model, loaded, tmp_path, kind):
    record = run_with(model, tmp_path / "run", loaded, cold_start=kind)
    (new,) = record.config["federation"]["held_out"]["clients"]
    files = {path.stem: load_file(path) for path in (record.folder / "adapters" / "clients").iterdir()}
    newcomer = files.pop(new)
    private = [path for path in newcomer if path.endswith("/a")]
    assert private
    for path in private:
        others = np.stack([own[path] for own in files.values()])
        if kind == "mean":
            np.testing.assert_allclose(newcomer[path], others.mean(axis=0), rtol=1e-4, atol=1e-6)
        else:
            assert (others == newcomer[path]).all(axis=tuple(range(1, others.ndim))).sum() == 1
    assert record.results["held_out"]["cold_start"] == kind


def test_nearest_by_hand():
    # The mean of clients 0 and 1 is (1, 1); taken off, they point along (1, -1) and (-1, 1); client 2 along (3, -1).
    means = np.asarray([[2.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    assert find_nearest(means, np.array([2]), np.array([0, 1])).tolist() == [0]
    assert find_nearest(means, np.array([1, 0]), np.array([0, 2])).tolist() == [0, 0]
