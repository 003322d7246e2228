"""A tiny run that keeps its messages: what is kept is what was sent; `fedvlm audit` from the folder to the report."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_run import StopAfter, StopError, tiny_run

from fedvlm_jax.audit import audit_run, canaries
from fedvlm_jax.audit.candidates import choose_rounds
from fedvlm_jax.audit.epsilon import bound_run, make_replay
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.audit_options import AuditOptions
from fedvlm_jax.config.method_checks import for_method
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import EvaluationOptions, Run, TrainOptions, from_json, to_json
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.round import from_waves
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.reporting.audit_report import describe_audit, read_audit, tabulate_audit
from fedvlm_jax.run_dir import kept_messages
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.experiment import make_simulator, open_experiment, shape_messages
from fedvlm_jax.training.trainer import Callback
from fedvlm_jax.utils.progress import SilentProgress

KEEP = AuditOptions(keep=True)
QUICK = EvaluationOptions(every=4, max_answer_tokens=4, batch_size=6, global_model=False, examples=0)


class Watch(Callback):
    """Notes what left the clients in every round, and which rows they read, beside the callbacks of every run."""

    def __init__(self):
        self.rounds, self.rows = {}, {}

    def on_round(self, trainer, result):
        report = result.report
        sent = jax.device_get((report.sent.messages, report.sent.server))
        self.rounds[result.round] = (report.counted, *sent)
        clients = from_waves(result.inputs.clients)
        for place, number in enumerate(result.inputs.numbers.tolist()):
            used = clients.indices[place][clients.mask[place]]
            self.rows[result.round, number] = clients.examples["labels"][place][np.unique(used)]


@pytest.fixture(scope="module")
def made(model, loaded, tmp_path_factory):
    """A run of four rounds, with what was seen of it on the way."""
    watch = Watch()
    run = tiny_run(model, tmp_path_factory.mktemp("runs") / "run", audit=KEEP, evaluation=QUICK)
    return federated_run.train(run, model=loaded, callbacks=(watch,)), watch, run


@pytest.fixture(scope="module")
def audited(made):
    folder, _, _ = made
    return folder, audit_run.audit(folder, audit_run.AuditChoices(rounds=3, clients=3))


def read_files(folder):
    return {path.name: path.read_bytes() for path in (folder / kept_messages.FOLDER).iterdir()}


@pytest.mark.slow
def test_what_is_kept_is_what_was_sent(made):
    folder, watch, _ = made
    assert kept_messages.list_rounds(folder) == [1, 2, 3, 4]
    for round_, (numbers, messages, server) in watch.rounds.items():
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), messages)
        kept = kept_messages.read_round(folder, round_, shapes, server)
        np.testing.assert_array_equal(kept.numbers, numbers)
        assert kept.weights.sum() == pytest.approx(1)
        jax.tree.map(np.testing.assert_array_equal, kept.messages, messages)
        jax.tree.map(np.testing.assert_array_equal, kept.server, server)


@pytest.mark.slow
def test_a_run_that_was_stopped_keeps_the_same_files(made, loaded, tmp_path):
    folder, _, run = made
    with pytest.raises(StopError):
        federated_run.train(replace(run, out=tmp_path / "run"), StopAfter(2), loaded)
    again = kept_messages.FOLDER
    shutil.copy(folder / again / kept_messages.name_file(4), tmp_path / "run" / again / kept_messages.name_file(3))
    listed = json.loads((tmp_path / "run" / again / "digests.json").read_text())
    listed["rounds"]["3"] = "of a round that a kill cut off"
    (tmp_path / "run" / again / "digests.json").write_text(json.dumps(listed))
    federated_run.resume(tmp_path / "run", model=loaded)
    assert read_files(tmp_path / "run") == read_files(folder)


@pytest.mark.slow
def test_rows_are_those_that_were_trained_on(made, loaded):
    folder, watch, run = made
    from fedvlm_jax.audit.candidates import read_batches
    from fedvlm_jax.training.experiment import open_experiment

    experiment = open_experiment(replace(run, out=folder), loaded)
    found = read_batches(experiment, [1, 4])
    assert {(round_, number) for round_, of_round in found.items() for number in of_round} == {
        key for key in watch.rows if key[0] in (1, 4)
    }
    for (round_, number), labels in watch.rows.items():
        if round_ in found:
            np.testing.assert_array_equal(experiment.examples.labels[found[round_][number]], labels)


def test_the_noise_that_is_replayed_is_of_the_rounds_that_epsilon_allowed(model, loaded, tmp_path, monkeypatch):
    """Rounds of local fine-tuning release nothing, and rounds that were asked for may not have been run."""
    privacy = PrivacyOptions(noise=5.0, epsilon=2.0, delta=1e-2, sampling="all")
    train = TrainOptions(rounds=50, local_steps=1, batch_size=4, finetune_steps=3)
    run = tiny_run(model, tmp_path / "run", privacy=privacy, cohort=None, train=train)
    experiment = open_experiment(run, loaded)
    replayed = []
    monkeypatch.setattr(
        canaries,
        "audit_mechanism",
        lambda replay, *given: replayed.append(replay) or canaries.Bound(1.0, 8, 8, 8, 0.95),
    )
    found = bound_run(experiment, make_simulator(experiment), 8, SilentProgress())
    assert 1 < experiment.budget.rounds < 50
    assert [replay.rounds for replay in replayed] == [experiment.budget.rounds]
    assert (found["accounted"], found["lower"]) == (experiment.budget.epsilon, 1.0)


@pytest.mark.broad
@pytest.mark.parametrize("mechanism", ["gaussian", pytest.param("banded", marks=pytest.mark.slow)])
def test_canaries_of_a_run_stay_below_its_epsilon_over_ten_seeds(mechanism, model, loaded, tmp_path):
    """And show a run whose noise is an eightieth of what was accounted."""
    privacy = PrivacyOptions(noise=8.0, clip=0.05, delta=1e-5, sampling="all", mechanism=mechanism)
    run = tiny_run(model, tmp_path / "run", privacy=privacy, cohort=None)
    quiet = replace(run, privacy=replace(privacy, noise=0.1))
    honest, broken = (open_experiment(each, loaded) for each in (run, quiet))
    message, budget = shape_messages(honest, [1])[1], honest.budget
    replay, loud = (make_replay(budget, make_simulator(each), message) for each in (honest, broken))
    bounds = [canaries.audit_mechanism(replay, 32, budget.delta, [seed]).epsilon for seed in range(10)]
    assert max(bounds) <= budget.epsilon
    assert canaries.audit_mechanism(loud, 32, budget.delta, [0]).epsilon > budget.epsilon


@pytest.mark.slow
def test_an_audit_and_its_report(audited, capsys):
    folder, found = audited
    assert json.loads((folder / "audit.json").read_text()) == found == read_audit(folder)
    assert found["rounds"] == [1, 3, 4]
    assert found["shares"] == "B"
    assert {(one["test"], one["knows"]) for one in found["membership"]} == {
        ("base", ""),
        *((test, who) for test in ("loss", "projection", "span") for who in ("start", "others", "own")),
    }
    for one in found["membership"]:
        assert one["members"] == sum(client["members"] for client in one["clients"].values())
        assert one["auroc"][1] <= one["auroc"][0] <= one["auroc"][2]
    for one in found["reconstruction"]:
        assert 0 < one["random"] < 1
    assert found["epsilon"] is None
    assert any("lower bounds" in sentence for sentence in describe_audit(found))
    main(["audit", str(folder), "--rounds", "2", "--clients", "2"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 or "report" in shown
    page = (folder / "report.html").read_text()
    assert "Was a row trained on?" in page
    assert "<svg" in page.partition("tell of the clients")[2]
    assert (folder / "figures" / "audit.png").is_file()
    assert {table.title for table in tabulate_audit(found)} > {"Which row was in the batch?"}


@pytest.mark.slow
def test_what_cannot_be_audited_is_refused(made, tmp_path, capsys):
    folder, _, _ = made

    def refuse(change):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(SystemExit) as stop:
            main(["audit", str(copy)])
        shutil.rmtree(copy)
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert "\n" not in said
        return said

    def damage(copy):
        file = copy / "messages" / kept_messages.name_file(4)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))

    assert "--audit.keep" in refuse(lambda copy: shutil.rmtree(copy / "messages"))
    assert "not finished" in refuse(lambda copy: (copy / "results.json").unlink())
    assert "damaged" in refuse(lambda copy: (copy / "messages" / "digests.json").write_text("{"))
    assert "no round" in refuse(
        lambda copy: (copy / "messages" / "digests.json").write_text('{"rounds": {"../x": ""}}')
    )
    assert "not as it was written" in refuse(damage)
    assert "cannot be read" in refuse(lambda copy: (copy / "messages" / kept_messages.name_file(4)).unlink())
    with pytest.raises(UserError, match="another version"):
        kept_messages.read_round(folder, 1, {"b": np.zeros(3)}, {})


@pytest.mark.slow
def test_more_than_is_allowed_is_refused_before_the_first_round(made, loaded, tmp_path):
    _, _, run = made
    small = replace(run, audit=AuditOptions(keep=True, most_gib=1e-6), out=tmp_path / "run")
    with pytest.raises(UserError, match="most-gib"):
        federated_run.train(small, model=loaded)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_what_is_said_beforehand_is_enough(made, loaded):
    from fedvlm_jax.training.callbacks import count_kept
    from fedvlm_jax.training.experiment import open_experiment

    folder, _, run = made
    said = count_kept(open_experiment(run, loaded))
    there = sum(path.stat().st_size for path in (folder / "messages").glob("*.safetensors"))
    assert there <= said <= 2 * there


def test_options_of_a_run_and_of_an_older_folder():
    stored = to_json(Run(audit=KEEP))
    assert from_json(stored).audit == KEEP
    del stored["audit"]
    assert from_json(stored).audit == AuditOptions()


def test_a_method_that_sends_nothing_keeps_nothing():
    with pytest.raises(UserError, match="no client sends anything"):
        validate(Run(method="local", audit=KEEP))
    assert for_method(Run(audit=KEEP), "local").audit == AuditOptions()
    assert for_method(Run(audit=KEEP), "ffa-lora").audit == KEEP


def test_rounds_are_spread_evenly():
    assert choose_rounds([2, 4, 6], 9) == [2, 4, 6]
    assert choose_rounds(list(range(1, 101)), 5) == [1, 26, 51, 75, 100]
    assert choose_rounds([1, 2, 3], 1) == [3]
