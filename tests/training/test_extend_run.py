"""A finished run that trains longer: what is done stays, and what is added is as in a run of that length."""

import dataclasses
import json

import pytest
from made_up import write_run
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.cli import train as command
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import Run, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.config_seal import seal
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.extend_run import lengthen
from fedvlm_jax.utils.progress import SilentProgress

TIMES = ("seconds", "clients_per_second")


def run_of(model, out, rounds, **changes):
    """No decay, so that rates do not depend on how many rounds there are."""
    train = TrainOptions(rounds=rounds, local_steps=2, batch_size=4, decay=1.0)
    return tiny_run(model, out, train=dataclasses.replace(train, **changes))


def read_lines(folder):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder)]


@pytest.mark.slow
def test_two_rounds_and_two_more_are_four(model, loaded, tmp_path):
    """Bit for bit, where the rates are alike; stopped on the way, too."""
    whole = federated_run.train(run_of(model, tmp_path / "whole", 4), None, loaded)
    short = federated_run.train(run_of(model, tmp_path / "short", 2), None, loaded)
    first = read_run(short)
    lengthen(short, 4)
    assert not (short / "results.json").exists()
    assert json.loads((short / "results-2.json").read_text()) == first.results
    with pytest.raises(StopError):
        federated_run.resume(short, StopAfter(3), loaded)
    lengthen(short, 4)  # the same command again
    rest = SilentProgress()
    federated_run.resume(short, rest, loaded)
    assert [line["round"] for line in rest.lines] == [4]
    assert_same_adapters(short, whole)
    assert read_lines(short) == read_lines(whole)
    assert read_run(short).results == read_run(whole).results
    assert read_config(short).run == dataclasses.replace(read_config(whole).run, out=short)
    assert read_config(short).content["longer"] == [{"from": 2, "to": 4}]
    done = (short / "results.json").stat().st_mtime_ns
    lengthen(short, 4)
    assert (short / "results.json").stat().st_mtime_ns == done, "it has that many rounds"


@pytest.mark.parametrize(
    ("changes", "rounds", "told"),
    [
        ({}, 9, r"--train.rounds 9: .* has 10 rounds already"),
        ({}, 0, r"--train.rounds is 0: it must be 1 or more"),
        ({"method": "flora"}, 24, "flora makes room for its rounds at the start, and here for 10; start a new run"),
        ({"method": "fedex-lora"}, 24, "fedex-lora makes room for its rounds"),
        ({"method": "feddpa-f"}, 24, "what feddpa-f trains in a round depends on how many there are"),
        ({"train": TrainOptions(finetune_steps=4)}, 24, "ended with local fine-tuning"),
    ],
)
def test_what_cannot_train_longer_stays_as_it_is(changes, rounds, told, tmp_path):
    folder = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5}, Run(**changes))
    (folder / "checkpoints" / "10").mkdir(parents=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=told):
        lengthen(folder, rounds)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "told"),
    [("results.json", "is not finished: its 10 rounds come first"), ("checkpoints", "no checkpoint of")],
)
def test_what_must_be_there(name, told, tmp_path):
    folder = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5})
    (folder / "checkpoints" / "10").mkdir(parents=True)
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=told):
        lengthen(folder, 24)


def test_rates_of_added_rounds_are_those_of_the_new_length(tmp_path):
    from fedvlm_jax.config.learning_rates import find_rates

    rates = {}
    for rounds in (16, 24):
        run = Run(train=TrainOptions(rounds=rounds))
        rates[rounds] = [find_rates(run.train, round_)["a"] for round_ in range(1, rounds + 1)]
    whole = run.train.learning_rate_a
    assert rates[16][9:] == [pytest.approx(0.3 * whole)] * 7
    assert rates[24][14:] == [pytest.approx(0.3 * whole)] * 10
    assert rates[24][:14] == [whole] * 14


@pytest.mark.parametrize("words", [["--train.rounds", "16"], ["--train.rounds=16"], ["--train.rounds", "24"]])
def test_the_flag_counts_even_at_its_default(words, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5}, Run(train=TrainOptions(rounds=8)))
    (folder / "checkpoints" / "8").mkdir(parents=True)
    nothing = {"data": "", "weights": "", "model_files": {}, "clients": {}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(seal({**config, "fingerprint": nothing})))
    seen = []

    def resume(folder, show, **rest):
        seen.append(read_config(folder).run.train.rounds)
        raise UserError("far enough")

    monkeypatch.setattr(federated_run, "resume", resume)
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(folder), *words])
    assert seen == [int(words[-1].rpartition("=")[2])]


def test_without_the_flag_a_run_keeps_its_rounds(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5}, Run(train=TrainOptions(rounds=8)))
    monkeypatch.setattr(federated_run, "resume", lambda folder, show, **rest: folder)
    monkeypatch.setattr(command, "_print_results", lambda *rest: None)
    main(["train", "--resume", str(folder), "--no-baseline"])
    assert read_config(folder).run.train.rounds == 8
    assert (folder / "results.json").exists()


@pytest.mark.parametrize(
    "words", [["--seed", "0"], ["--lora.rank=8"], ["--train.local-steps", "4", "--train.rounds", "9"]]
)
def test_a_flag_that_says_the_default_is_refused_too(words, tmp_path, capsys):
    """It would be taken for not said, and the run's own option, which may be another, would count."""
    folder = write_run(tmp_path / "run", {"a": 0.2}, {"a": 0.5}, Run(seed=3))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--resume", str(folder), *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"leave out {words[0].partition('=')[0]}\n" in said
