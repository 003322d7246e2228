"""Whole runs on a tiny model: what they leave, and that stopping and going on changes nothing, bit for bit."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, read_adapters, tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, TrainOptions, to_json
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.checkpoint import Checkpoints
from fedvlm_jax.run_dir.config_seal import seal
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.training import evaluate, federated_run
from fedvlm_jax.utils.progress import SilentProgress


@pytest.fixture(scope="module")
def finished(model, loaded, tmp_path_factory):
    """An uninterrupted run, fine-tuning included."""
    run = tiny_run(model, tmp_path_factory.mktemp("runs") / "whole")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, finetune_steps=3))
    return federated_run.train(run, model=loaded)


def test_what_a_run_leaves(finished):
    record = read_run(finished)
    names = record.config["resolved"]["clients"]
    assert len(names) == 4
    assert [line["round"] for line in record.rounds] == [1, 2, 3, 4, 5, 6]
    assert [line["method"] for line in record.rounds] == ["plora"] * 4 + ["local"] * 2
    assert [line["clients"] for line in record.rounds] == [3] * 4 + [4] * 2
    assert [line["steps"] for line in record.rounds] == [2, 2, 2, 2, 2, 1], "three steps of fine-tuning are 2 + 1"
    assert all(line["bytes_up_per_client"] > 0 for line in record.rounds[:4])
    assert all(line["bytes_up_per_client"] == 0 for line in record.rounds[4:])
    assert set(record.results["personal"]["test"]["exact_match"]) == set(names)
    adapters = read_adapters(finished)
    assert len(adapters) == 6, "four clients', the shared part, and a global model"
    shared = adapters["adapters/shared.safetensors"]
    assert all(path.endswith("/b") for path in shared)
    assert sum(array.nbytes for array in shared.values()) == record.rounds[0]["bytes_up_per_client"]
    own = next(arrays for path, arrays in adapters.items() if path.startswith("adapters/clients/"))
    trained = sum(array.size for path, array in own.items() if not path.endswith("scale"))
    assert record.config["resolved"]["adapter_parameters"] == trained


def test_a_federated_model_s_shared_factors_are_everybody_s(model, loaded, tmp_path):
    folder = federated_run.train(tiny_run(model, tmp_path / "run"), model=loaded)
    adapters = read_adapters(folder)
    shared = adapters.pop("adapters/shared.safetensors")
    for own in adapters.values():
        for path, array in shared.items():
            np.testing.assert_array_equal(own[path], array)
    privates = [own["language_model/encoder/layers/fc1/a"] for own in adapters.values()]
    assert any(not np.array_equal(privates[0], other) for other in privates[1:])


def test_evaluating_the_stored_adapters_gives_the_results(finished):
    scores = evaluate.evaluate(finished)
    results = read_run(finished).results
    assert scores == {name: results[name] for name in ("generation", "zero_shot", "personal", "gain_intervals")}


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_stopped_and_resumed_is_never_stopped(model, loaded, finished, tmp_path, stop):
    run = tiny_run(model, tmp_path / "run")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, finetune_steps=3))
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(stop), loaded)
    rest = SilentProgress()
    federated_run.resume(run.out, rest, loaded)
    assert [line["round"] for line in rest.lines] == list(range(stop + 1, 7)), "finished rounds are not run again"
    assert_same_adapters(run.out, finished)
    mine, whole = read_metrics(run.out), read_metrics(finished)
    timing = {"seconds", "clients_per_second"}
    assert [{k: v for k, v in line.items() if k not in timing} for line in mine] == [
        {k: v for k, v in line.items() if k not in timing} for line in whole
    ]


def test_a_line_without_its_checkpoint_is_run_again(model, loaded, finished, tmp_path, monkeypatch):
    """Killed inside the write of a checkpoint: the round's line is there, its checkpoint is not."""
    run = tiny_run(model, tmp_path / "run")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, finetune_steps=3))

    def fail(self, round_, *rest):
        if round_ == 3:
            raise StopError
        return original(self, round_, *rest)

    original = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(StopError):
        federated_run.train(run, model=loaded)
    assert read_metrics(run.out)[-1]["round"] == 3
    monkeypatch.undo()
    rest = SilentProgress()
    federated_run.resume(run.out, rest, loaded)
    assert rest.lines[0]["round"] == 3
    assert_same_adapters(run.out, finished)


@pytest.mark.broad
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_random_moments(model, finished, tmp_path, kills):
    """`kill -9` from outside, wherever it hits; then the rest. It is held against the same command, left alone."""
    run = tiny_run(model, tmp_path / "run")
    train = dataclasses.replace(run.train, finetune_steps=3)
    flags = [
        f"--model={model}", "--cohort=3", "--seed=1", "--data.languages", "en", "de", "--data.vendors", "noto",
        "fluent", "--data.images-per-client=5", "--data.validation-per-client=2", "--data.test-per-client=3",
        f"--train.rounds={train.rounds}", "--train.local-steps=2", "--train.batch-size=4", "--lora.rank=2",
        "--evaluation.every=2", "--evaluation.max-answer-tokens=4", "--evaluation.batch-size=6",
        f"--train.finetune-steps={train.finetune_steps}",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from fedvlm_jax.cli.main import main; main()", "train", "--no-baseline"]
    generator = random.Random(os.getpid())
    log = tmp_path / "log"
    # In a process of its own, too: behind all broad tests such a one has ended some last bits beside this process.
    subprocess.run([*command, *flags, f"--out={tmp_path / 'whole'}"], check=True, capture_output=True)
    flags.append(f"--out={run.out}")
    for attempt in range(8):
        begun = (run.out / "config.json").exists()
        with log.open("w") as output:
            words = [*command, "--resume", str(run.out)] if begun else [*command, *flags]
            process = subprocess.Popen(words, stdout=output, stderr=output)
            if attempt < kills:
                watched = run.out / "metrics.jsonl"
                lines = len(read_metrics(run.out)) if begun else 0
                deadline = time.monotonic() + 240
                while process.poll() is None and time.monotonic() < deadline:
                    if watched.exists() and len(watched.read_text().splitlines()) > lines:
                        time.sleep(generator.random() * 0.3)
                        process.send_signal(signal.SIGKILL)
                        break
                    time.sleep(0.01)
            code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
    stored = json.loads((run.out / "config.json").read_text())["run"]
    whole = json.loads((finished / "config.json").read_text())["run"]
    assert {**stored, "out": None} == {**whole, "out": None}, "the flags above are not the fixture's options"
    assert_same_adapters(run.out, tmp_path / "whole")
    assert [line["round"] for line in read_metrics(run.out)] == [1, 2, 3, 4, 5, 6]


# --- Errors ---


def test_a_used_folder_is_refused(model, loaded, finished):
    with pytest.raises(UserError, match="is not empty: choose another --out"):
        federated_run.train(tiny_run(model, finished), model=loaded)


def test_a_finished_run_stays_as_it_is(finished):
    before = (finished / "results.json").stat().st_mtime_ns
    show = SilentProgress()
    assert federated_run.resume(finished, show) == finished
    assert (finished / "results.json").stat().st_mtime_ns == before
    assert "finished" in show.notes[-1]


@pytest.mark.broad
@pytest.mark.parametrize(
    ("part", "option", "value", "told"),
    [("lora", "rank", 3, r"shared.*\[1, 3, 16\]"), ("train", "optimizer", "sgd", r"\['states'\]")],
)
def test_a_checkpoint_of_another_configuration_is_refused(model, loaded, tmp_path, part, option, value, told):
    """What the server holds, and what clients keep in their own file."""
    run = tiny_run(model, tmp_path / "run")
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(1), loaded)
    stored = json.loads((run.out / "config.json").read_text())
    stored["run"][part][option] = value
    (run.out / "config.json").write_text(json.dumps(seal(stored)))
    with pytest.raises(UserError, match=rf"does not fit this run(.|\n)*{told}"):
        federated_run.resume(run.out, model=loaded)


def test_more_devices_than_there_are(model, loaded, tmp_path):
    run = tiny_run(model, tmp_path / "run")
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(1), loaded)
    stored = json.loads((run.out / "config.json").read_text())
    stored["resolved"]["mesh"] = {"clients": 32, "model": 2}
    (run.out / "config.json").write_text(json.dumps(seal(stored)))
    with pytest.raises(UserError, match=r"ran on 64 devices \(clients=32,model=2\)"):
        federated_run.resume(run.out, model=loaded)


def test_a_loss_that_is_not_finite_stops_the_run(model, loaded, tmp_path):
    train = TrainOptions(
        rounds=4,
        local_steps=2,
        batch_size=4,
        optimizer="sgd",
        learning_rate_a=1e30,
        learning_rate_b=1e30,
    )
    with pytest.raises(UserError, match=r"the training of .* not finite: lower --train\.learning-rate-a"):
        federated_run.train(tiny_run(model, tmp_path / "run", train=train), model=loaded)


def test_too_large_a_cohort(model, loaded, tmp_path):
    with pytest.raises(UserError, match="--cohort 9: 4 clients train at most"):
        federated_run.train(tiny_run(model, tmp_path / "run", cohort=9), model=loaded)


def test_answers_longer_than_the_model_has_positions(model, loaded, tmp_path):
    evaluation = EvaluationOptions(max_answer_tokens=65)
    with pytest.raises(UserError, match=r"--evaluation.max-answer-tokens is 65: .* has 64 positions"):
        federated_run.train(tiny_run(model, tmp_path / "run", evaluation=evaluation), model=loaded)


def test_options_survive_the_folder(finished, model):
    run = tiny_run(model, finished)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, finetune_steps=3))
    assert json.loads((finished / "config.json").read_text())["run"] == json.loads(json.dumps(to_json(run)))
