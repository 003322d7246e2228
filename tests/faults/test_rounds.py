"""Rounds in which something is not finite: who is left out, what is never taken, and what is said."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federation.test_participation import RATES, Case, assert_same, copy, read_steps
from tiny_run import tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.config import ServerOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.reporting.sentences import describe_run
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.training import best_round, federated_run, trainer
from fedvlm_jax.training.failures import describe_lost, describe_rounds, describe_unfit, explain_all_unfit
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.progress import SilentProgress
from fedvlm_jax.utils.progress_display import describe_line

HUGE = {"a": jnp.float32(1e30), "b": jnp.float32(1e30)}


def poison(read, places):
    """A round whose clients at these places of the first wave have pictures that are no numbers."""
    examples = dict(read.clients.examples)
    examples["image_features"] = np.array(examples["image_features"])
    examples["image_features"][0, places] = np.nan
    return read._replace(clients=read.clients._replace(examples=examples))


# --- What counts as finite ---


@pytest.mark.parametrize(
    ("leaf", "finite"),
    [([1.0, -2.0], True), ([np.nan], False), ([-np.inf], False), ([1e25], False), ([3], True), ([True], True)],
)
def test_finite_means_the_norm_too(leaf, finite):
    assert bool(tree.is_finite({"rest": jnp.zeros(2), "it": jnp.asarray(leaf)})) == finite


def test_nothing_is_finite():
    assert bool(tree.is_finite({}))


# --- One round ---


@pytest.fixture(scope="module")
def plora():
    return Case("plora")


def test_an_unfit_client_is_named_and_keeps_its_state(plora):
    simulator, without = plora.start(), plora.start()
    for one in (simulator, without):
        one.run_round(read_steps(one, 1, [4] * 4), RATES)
    before = copy(simulator.client_states.gather([1]))
    report = simulator.run_round(poison(read_steps(simulator, 2, [4] * 4), [1]), RATES)
    without.run_round(read_steps(without, 2, [4, 0, 4, 4]), RATES)
    assert (report.unfit.tolist(), report.counted.tolist(), report.finite) == ([1], [0, 2, 3], True)
    assert_same(copy(simulator.client_states.gather([1])), before)
    assert_same(copy(simulator.server), copy(without.server), rtol=1e-4, atol=2e-6)
    assert len(plora.programs.compiled) == 1, "who is unfit is data"


def test_an_unfit_newcomer_is_still_new(plora):
    simulator = plora.start()
    simulator.run_round(poison(read_steps(simulator, 1, [4] * 4), [1, 3]), RATES)
    assert simulator.client_states.known.tolist() == [True, False, True, False]
    simulator.run_round(read_steps(simulator, 2, [4] * 4), RATES)
    assert simulator.client_states.known.all()


def test_where_all_are_unfit_nothing_changes(plora):
    simulator = plora.start()
    simulator.run_round(read_steps(simulator, 1, [4] * 4), RATES)
    before = copy(simulator.state())
    report = simulator.run_round(read_steps(simulator, 2, [4] * 4), HUGE)
    assert (report.unfit.tolist(), report.counted.tolist(), report.trained) == ([0, 1, 2, 3], [], None)
    assert_same(copy(simulator.state()), before)
    report = simulator.run_round(read_steps(simulator, 3, [4] * 4), RATES)
    assert len(report.counted) == 4, "and the next round is like any other"


def test_rates_of_zero_tell_data_from_rates(plora):
    simulator = plora.start()
    read = poison(read_steps(simulator, 1, [4] * 4), [2])
    before = copy(simulator.state())
    assert simulator.find_unfit(read).tolist() == [2]
    assert simulator.find_unfit(read_steps(simulator, 1, [4] * 4)).tolist() == []
    assert_same(copy(simulator.state()), before)


@pytest.mark.parametrize("optimizer", ["avg", "adam"])
def test_an_aggregate_that_is_not_finite_is_not_taken(optimizer):
    """The server's step overflows, of finite messages; its moments count as well."""
    simulator = Case("fedavg-lora", server=ServerOptions(optimizer, 1e36)).start()
    before = copy(simulator.state())
    report = simulator.run_round(read_steps(simulator, 1, [4] * 4), RATES)
    assert (report.finite, report.unfit.tolist()) == (False, [])
    assert_same(copy(simulator.state()), before)
    assert not simulator.client_states.known.any()


def test_a_base_that_overflows_is_not_taken(monkeypatch):
    """The server's factors are finite, what they make of the weights is not."""
    simulator = Case("flora").start()
    server = copy(simulator.server)
    large = {**server, "base": jax.tree.map(lambda leaf: np.full_like(leaf, 1e30), server["base"])}
    assert simulator.programs.base_is_finite(simulator.params, simulator.server)
    monkeypatch.setattr(simulator, "_run", lambda *given, run=simulator._run: run(*given)._replace(server=large))
    assert not simulator.run_round(read_steps(simulator, 1, [4] * 4), RATES).finite
    assert_same(copy(simulator.server), server)


def test_clients_without_examples_take_no_place():
    """Two of four have none: a cohort of two is the other two, and so is everybody."""
    case = Case("local")
    for cohort in (2, None):
        simulator = case.start(sizes=[9, 0, 4, 0], cohort=cohort)
        assert {tuple(simulator.read_round(n).numbers) for n in range(1, 5)} == {(0, 2)}


# --- A run ---


def short(model, out, **train):
    return tiny_run(
        model, out, cohort=None, train=TrainOptions(rounds=2, local_steps=1, batch_size=4, **train),
        evaluation=EvaluationOptions(every=2, max_answer_tokens=4, batch_size=6, examples=0),
    )  # fmt: skip


@pytest.mark.broad
def test_a_run_with_an_unfit_client_ends_well_and_names_it(model, loaded, tmp_path, monkeypatch):
    read = trainer._read_round
    monkeypatch.setattr(trainer, "_read_round", lambda *given: poison(read(*given), [1]))
    show = SilentProgress()
    folder = federated_run.train(short(model, tmp_path / "run"), show, loaded)
    name = read_run(folder).config["resolved"]["clients"][1]
    lines = read_metrics(folder)
    assert [line["unfit"] for line in lines] == [[name], [name]]
    assert all(np.isfinite(line["loss"]) for line in lines)
    told = [note for note in show.notes if name in note]
    assert len(told) == 2, "once in the rounds, once at the end"
    assert told[0].startswith("round 1: 1 of its clients did not count")
    assert "before a step is taken: look at its examples" in told[0]
    assert any(f"{name} (2)" in sentence for sentence in describe_run(read_run(folder)))
    assert all(np.isfinite(list(read_run(folder).scores("personal", "loss").values())))


@pytest.mark.parametrize(
    ("places", "train", "message"),
    [
        ([0, 1, 2, 3], {}, r"round 1: the loss of all 4 clients is not finite before anything is trained.*--model"),
        ([], {"learning_rate_a": 1e30, "learning_rate_b": 1e30}, r"round 1: the training of all 4.*lower --train.lear"),
    ],
)
def test_the_base_is_not_blamed_on_the_rates(model, loaded, tmp_path, monkeypatch, places, train, message):
    read = trainer._read_round
    monkeypatch.setattr(trainer, "_read_round", lambda *given: poison(read(*given), places))
    with pytest.raises(UserError, match=message):
        federated_run.train(short(model, tmp_path / "run", **train), model=loaded)
    assert not (tmp_path / "run" / "results.json").exists()
    assert read_metrics(tmp_path / "run") == []


@pytest.mark.broad
def test_a_run_with_noise_does_not_tell_by_its_end_that_all_of_a_round_were_unfit(model, loaded, tmp_path, monkeypatch):
    """The round has released noise, and a Poisson sample may well be a single client."""
    read = trainer._read_round
    places = {1: [0, 1, 2, 3], 2: []}
    monkeypatch.setattr(trainer, "_read_round", lambda *given: poison(found := read(*given), places[found.round]))
    privacy = PrivacyOptions(noise=1.0, clip=1e-3, sampling="all", delta=1e-2)
    run = dataclasses.replace(short(model, tmp_path / "run"), privacy=privacy)
    lines = read_metrics(federated_run.train(run, show := SilentProgress(), loaded))
    assert [len(line.get("unfit", [])) for line in lines] == [4, 0]
    assert [line["sampled"] for line in lines] == [0, 4]
    assert lines[0]["noise_norm"] > 0
    assert sum(note.startswith("round 1: 4 of its clients did not count") for note in show.notes) == 1


def test_an_overflow_in_the_last_round_is_no_success(model, loaded, tmp_path, monkeypatch):
    """Its loss, before the update, is finite. What is kept, and called good, is the round before."""
    rates = trainer.find_rates
    monkeypatch.setattr(trainer, "find_rates", lambda run, n: {"a": 1e30, "b": 1e30} if n == 2 else rates(run, n))
    with pytest.raises(UserError, match=r"round 2: .*not finite.*last good checkpoint is that of round 1") as told:
        federated_run.train(short(model, tmp_path / "run"), model=loaded)
    assert len(str(told.value).splitlines()) == 1
    assert [line["round"] for line in read_metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_round_whose_validation_is_not_finite_is_never_the_best(model, loaded, tmp_path, monkeypatch):
    """Not by its metric, not by its loss, and a run without any other ends with a line."""
    score = best_round.score_validation

    def spoil(*given):
        found = score(*given)
        return {**found, "exact_match": dict.fromkeys(found["exact_match"], 1.0), "loss": {"one": bad}}

    monkeypatch.setattr(best_round, "score_validation", spoil)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="no round's models have a finite loss"):
            federated_run.train(short(model, tmp_path / f"run{bad}"), model=loaded)


def test_nobody_in_any_round_is_told(model, loaded, tmp_path):
    run = short(model, tmp_path / "run")
    show = SilentProgress()
    run = dataclasses.replace(run, participation=dataclasses.replace(run.participation, dropout=0.999999))
    folder = federated_run.train(run, show, loaded)
    assert any(note.startswith("Nothing was trained: in none of the 2 rounds") for note in show.notes)
    assert any(sentence.startswith("Nothing was trained") for sentence in describe_run(read_run(folder)))
    json.loads((folder / "results.json").read_text())


# --- Sentences ---


def test_results_without_a_finite_loss_are_no_results():
    """Without validation data nothing else looks at the last round's models."""

    def results(**losses):
        base = {"a": 1.0, "b": 2.0, "c": float("nan")}
        return {"selected_round": 4, "zero_shot": {"test": {"loss": base}}, "personal": {"test": {"loss": losses}}}

    bad = float("inf")
    assert describe_lost(results(a=1.0, b=None, c=bad)) == "", "the frozen model has none for c"
    assert describe_lost(results(a=1.0, b=bad)).startswith("The models of round 4 have a loss that is not finite for b")
    with pytest.raises(UserError, match="every client: these are no results"):
        describe_lost(results(a=bad, b=bad, c=1.0))
    assert describe_lost({"personal": {"test": {}}, "zero_shot": {"test": {}}}) == ""


def test_sentences():
    assert describe_line({"loss": 1.0, "unfit": ["a", "b"]}) == ["loss 1.000", "2 not finite"]
    assert describe_unfit(3, ["a", "b", "c", "d", "e"], ["a"]) == (
        "round 3: 5 of its clients did not count, for numbers that are not finite; a has such numbers before a step is "
        "taken: look at its examples; b, c, d and 1 more has them from its training: lower --train.learning-rate-a and "
        "--train.learning-rate-b, or look at its examples"
    )
    assert "what earlier rounds added to the model is too large" in explain_all_unfit(4, ["a"], ["a"], "nano", "good")
    assert describe_rounds([{"loss": 1.0}, {}]) == [
        "In 1 of 2 rounds nobody's training counted: these changed nothing."
    ]
    assert describe_rounds([{"loss": 1.0}]) == []
