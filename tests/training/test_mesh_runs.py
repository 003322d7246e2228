"""Whole runs on four devices, two shares of clients on a base cut in two, held against the same run on one device."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_parquet import make_row, write_rows
from tiny_run import assert_same_adapters, read_adapters, tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, SystemOptions, TrainOptions, to_json
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import federated_run

pytestmark = pytest.mark.broad

TESTS = Path(__file__).parent.parent
WHOLE = 4 * ((6152 + 320) + (80 + 32 + 64 + 64 + 96) + (32 + 2112) + 128 + (32 + 32 + 48))
"""Bytes that each device has of the tiny model beside its half of the others: convolutions, norms, positions, the
projection of the image, and the biases of matrices that are cut by rows."""

WORDS = (("red", "cat"), ("up", "no"), ("one", "hand"), ("car", "bus"), ("water", "food"), ("bird", "house"))


def make_pairs(folder):
    """Three clients with pairs, for the reference's log-probabilities."""
    rows = []
    for client in "abc":
        for split in ("train", "validation", "test"):
            for chosen, rejected in WORDS:
                words = {"question": f"{chosen} or {rejected}", "chosen": chosen, "rejected": rejected}
                rows.append(make_row(len(rows), client=client, split=split, **words))
    return write_rows(folder / "pairs.parquet", rows)


def make_case(name, folder):
    """Options by which the runs differ from the tiny one; together they reach every program that reads the base."""
    train = TrainOptions(rounds=3, local_steps=2, batch_size=4, finetune_steps=2)
    if name == "plora":
        return {}
    if name == "flora":
        return {"objective": "dpo", "data": make_options(source=str(make_pairs(folder))), "cohort": None}
    evaluation = EvaluationOptions(every=2, max_answer_tokens=4, batch_size=6, neighbours=2, cross_clients=True)
    return {"train": train, "evaluation": evaluation}


@pytest.fixture(
    scope="module",
    params=["plora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flora", "fedex-lora"))],
)
def runs(request, model, tmp_path_factory):
    """-> the run's folder on one device, that on four, and what the process of the latter said."""
    folder = tmp_path_factory.mktemp("runs")
    one = tiny_run(model, folder / "one", method=request.param, **make_case(request.param, folder))
    four = dataclasses.replace(one, out=folder / "four", system=SystemOptions(mesh="clients=2,model=2"))
    options = folder / "options.json"
    options.write_text(json.dumps(to_json(four)))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mesh_check.py")), str(options), "2"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return federated_run.train(one), four.out, json.loads(done.stdout.splitlines()[-1])


def test_four_devices_train_what_one_trains(runs):
    one, four, _ = runs
    assert read_run(four).config["resolved"]["mesh"] == {"clients": 2, "model": 2}
    alone, together = read_adapters(one), read_adapters(four)
    assert alone.keys() == together.keys()
    for name, arrays in alone.items():
        for path, array in arrays.items():
            np.testing.assert_allclose(together[name][path], array, atol=2e-5, err_msg=f"{name} {path}")


def test_four_devices_score_as_one(runs):
    one, four, said = runs
    alone, together = read_run(one), read_run(four)
    for model in ("zero_shot", "personal"):
        for split in ("validation", "test"):
            for results in (together.results, said["evaluated"]):
                for client, loss in alone.results[model][split]["loss"].items():
                    assert results[model][split]["loss"][client] == pytest.approx(loss, rel=1e-4), (model, split)
    for mine, theirs in zip(alone.rounds, together.rounds, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["bytes_up_per_client"] == mine["bytes_up_per_client"]


def test_stopped_and_resumed_is_never_stopped(runs):
    _, four, _ = runs
    halved = four.with_name(four.name + "-halved")
    assert_same_adapters(four, halved)
    assert read_run(halved).config["resolved"]["mesh"] == {"clients": 2, "model": 2}


def test_no_device_has_all_of_the_base(runs):
    _, _, said = runs
    assert len(set(said["held_bytes"].values())) == 1
    held = next(iter(said["held_bytes"].values()))
    assert 2 * held - said["base_bytes"] == WHOLE


def test_too_few_devices(runs):
    assert runs[2]["refused"] == "--mesh clients=4,model=2 takes 8 devices: there are 4 (cpu)"
