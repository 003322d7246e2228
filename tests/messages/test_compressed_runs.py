"""Whole runs with compressed messages on the tiny model: stopped and resumed bit for bit, and bytes in their lines."""

import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, read_adapters, tiny_run

from fedvlm_jax.config.run_options import TrainOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.run_dir.reader import read_metrics, read_run
from fedvlm_jax.training import federated_run

pytestmark = pytest.mark.broad

TOP_K = MessageOptions(compress="top-k", keep=0.05)
TIMING = {"seconds", "clients_per_second"}


def read_lines(folder):
    return [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(folder)]


def test_a_run_that_was_stopped_goes_on_with_what_its_clients_owe(model, loaded, tmp_path):
    """Three of four clients a round: what those owe who were not drawn is kept too."""
    whole = federated_run.train(tiny_run(model, tmp_path / "whole", messages=TOP_K), model=loaded)
    stopped = tiny_run(model, tmp_path / "stopped", messages=TOP_K)
    with pytest.raises(StopError):
        federated_run.train(stopped, StopAfter(2), loaded)
    federated_run.resume(stopped.out, model=loaded)
    assert_same_adapters(stopped.out, whole)
    lines = read_lines(whole)
    assert read_lines(stopped.out) == lines
    entries = sum(array.size for array in read_adapters(whole)["adapters/shared.safetensors"].values())
    assert entries > 256
    assert {line["bytes_up_per_client"] for line in lines} == {(4 + 2) * round(0.05 * entries)}
    assert all(0 < line["compression_error"] < 1 for line in lines)


@pytest.mark.slow
def test_a_run_with_int8_stopped_and_resumed(model, loaded, tmp_path):
    messages = MessageOptions(compress="int8")
    whole = federated_run.train(tiny_run(model, tmp_path / "whole", messages=messages), model=loaded)
    stopped = tiny_run(model, tmp_path / "stopped", messages=messages)
    with pytest.raises(StopError):
        federated_run.train(stopped, StopAfter(2), loaded)
    federated_run.resume(stopped.out, model=loaded)
    assert_same_adapters(stopped.out, whole)


@pytest.mark.slow
def test_lines_have_the_bytes_of_what_was_encoded_and_the_error(model, loaded, tmp_path):
    """Local fine-tuning after the federation sends nothing and owes nothing."""
    messages = MessageOptions(secure=True)
    folders = {
        name: federated_run.train(
            tiny_run(
                model,
                tmp_path / name,
                messages=options,
                train=TrainOptions(rounds=2, local_steps=2, batch_size=4, finetune_steps=2),
            ),
            model=loaded,
        )
        for name, options in {"plain": MessageOptions(), "top-k": TOP_K, "secure": messages}.items()
    }
    records = {name: read_run(folder) for name, folder in folders.items()}
    first = {name: record.rounds[0] for name, record in records.items()}
    entries = first["plain"]["bytes_up_per_client"] // 4
    assert first["secure"]["bytes_up_per_client"] == 4 * entries
    places = 1 if entries <= 256 else 2
    assert first["top-k"]["bytes_up_per_client"] == (4 + places) * round(0.05 * entries)
    assert 0 < first["top-k"]["compression_error"] < 1
    assert "compression_error" not in first["plain"]
    assert {"quantisation_error", "clipped_share"} <= first["secure"].keys()
    for record in records.values():
        last = record.rounds[-1]
        assert (last["method"], last["bytes_up_per_client"]) == ("local", 0)
        assert "compression_error" not in last
    losses = {name: line["loss"] for name, line in first.items()}
    assert len(set(losses.values())) == 1, "the first round's training sees nothing of how its result is sent"
