"""Runs of methods whose state is more than a shared and a private part: stopped, resumed, stored, evaluated again."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run
from toy import WRITING

from fedvlm_jax.config.run_options import LocalOptions, LoraOptions, ServerOptions, TrainOptions
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import evaluate, federated_run

pytestmark = pytest.mark.broad

RICH = ("fedex-lora", "feddpa-f", "fedalt")
"""A base that moves; phases and two adapters; a router and downloads of one's own: fine-tuned too."""
ORDINARY = RICH[:1]
"""The others are slow tests."""


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in ORDINARY else [pytest.mark.slow]) for m in WRITING]
)
def test_a_stopped_run_ends_as_a_whole_one(method, model, loaded, tmp_path):
    train = TrainOptions(rounds=4, local_steps=2, batch_size=4, finetune_steps=2 if method in RICH else 0)
    whole, halved = (tiny_run(model, tmp_path / name, method=method, train=train) for name in ("whole", "halved"))
    federated_run.train(whole, model=loaded)
    last = 5 if train.finetune_steps else 4
    for stop in (2, last - 1):
        begun = (halved.out / "config.json").exists()
        with pytest.raises(StopError):
            federated_run.resume(halved.out, StopAfter(stop), loaded) if begun else federated_run.train(
                halved, StopAfter(stop), loaded
            )
    federated_run.resume(halved.out, model=loaded)
    assert_same_adapters(whole.out, halved.out)
    lines = read_metrics(whole.out)
    assert [line["round"] for line in lines] == list(range(1, last + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    stored = json.loads((whole.out / "results.json").read_text())
    again = evaluate.evaluate(whole.out)
    for split in ("validation", "test"):
        for client, loss in stored["personal"][split]["loss"].items():
            assert again["personal"][split]["loss"][client] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"local": LocalOptions(proximal=0.1), "server": ServerOptions("adam", learning_rate=0.01)},
        pytest.param({"lora": LoraOptions(rank=4, ranks=(4, 2, 1))}, marks=pytest.mark.slow),
        pytest.param(
            {
                "local": LocalOptions(scaffold=True),
                "train": TrainOptions(rounds=4, local_steps=2, batch_size=4, optimizer="sgd"),
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["prox-adam", "ranks", "scaffold"],
)
def test_options_beside_the_method_survive_a_stop(options, model, loaded, tmp_path):
    runs = [tiny_run(model, tmp_path / name, method="plora", **options) for name in ("whole", "halved")]
    federated_run.train(runs[0], model=loaded)
    with pytest.raises(StopError):
        federated_run.train(runs[1], StopAfter(2), loaded)
    federated_run.resume(runs[1].out, model=loaded)
    assert_same_adapters(*(run.out for run in runs))


def test_ranks_are_in_the_adapters_and_in_the_bytes(model, loaded, tmp_path):
    run = tiny_run(model, tmp_path / "run", method="fedavg-lora", cohort=None, lora=LoraOptions(rank=4, ranks=(4, 2)))
    run = dataclasses.replace(run, train=TrainOptions(rounds=1, local_steps=2, batch_size=4))
    federated_run.train(run, model=loaded)
    clients = [load_file(path) for path in sorted((run.out / "adapters" / "clients").iterdir())]
    used = [
        int(max(np.flatnonzero(np.abs(own[path]).sum(axis=tuple(range(own[path].ndim - 1))) > 0)) + 1)
        for own in clients
        for path in own
        if path.endswith("fc1/a")
    ]
    assert sorted(set(used)) == [2, 4]
    full = tiny_run(model, tmp_path / "full", method="fedavg-lora", cohort=None, lora=LoraOptions(rank=4))
    federated_run.train(dataclasses.replace(full, train=run.train), model=loaded)
    sent, all_sent = (read_metrics(folder)[0]["bytes_up_per_client"] for folder in (run.out, full.out))
    assert sent == pytest.approx(0.75 * all_sent, rel=1e-3)
