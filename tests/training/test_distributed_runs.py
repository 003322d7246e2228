"""Whole runs of several processes that talk over loopback, as their users start them; run with `pytest -m slow`.

Each process has a part of four devices, and the run is held against that of one process with all four.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from make_parquet import make_row, write_rows
from tiny_run import assert_same_adapters, read_adapters

from fedvlm_jax.run_dir.reader import read_metrics, read_run

pytestmark = pytest.mark.slow

DEVICES = 4
TIMES = ("seconds", "clients_per_second")
OPTIONS = [
    "--cohort", "3", "--seed", "1", "--data.languages", "en", "de", "--data.vendors", "noto", "fluent",
    "--data.images-per-client", "5", "--data.validation-per-client", "2", "--data.test-per-client", "3",
    "--train.rounds", "5", "--train.local-steps", "2", "--train.batch-size", "4", "--lora.rank", "2",
    "--evaluation.every", "2", "--evaluation.max-answer-tokens", "4", "--evaluation.batch-size", "6",
]  # fmt: skip
WORDS = (("red", "cat"), ("up", "no"), ("one", "hand"), ("car", "bus"), ("water", "food"), ("bird", "house"))


def find_port():
    with closing(socket.socket()) as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(model, out, processes, *options, devices=DEVICES):
    """Start all processes of a run."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
    }
    where = ["--distributed.coordinator", f"127.0.0.1:{find_port()}", "--distributed.processes", str(processes)]
    train = [sys.executable, "-m", "fedvlm_jax", "train", "--no-baseline"]
    command = [*train, "--model", str(model), "--out", str(out), *options]
    return [
        subprocess.Popen(
            command + ([*where, "--distributed.process", str(process)] if processes > 1 else []),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip


def finish(started):
    """What each process said, once all have ended well."""
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n---\n".join(it[-3000:] for it in said)
    return said


def wait_for_checkpoint(started, out, round_):
    """Until the checkpoint after a round is there, whole: its folder has its name only then."""
    while not (out / "checkpoints" / str(round_)).exists():
        assert all(process.poll() is None for process in started), [it.communicate()[0][-3000:] for it in started]
        time.sleep(0.05)


def assert_alike(one, other):
    one, other = read_adapters(one), read_adapters(other)
    assert one.keys() == other.keys()
    for name, arrays in one.items():
        for path, array in arrays.items():
            largest = np.abs(array).max()
            np.testing.assert_allclose(other[name][path], array, rtol=0, atol=1e-6 * largest, err_msg=f"{name} {path}")


def assert_close(one, other, where):
    """Values of JSON that are alike: numbers to 1e-4."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_close(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, f"{where}/{place}")
    elif isinstance(one, float):
        # Of an angle of a degree, whose cosine is within 1e-4 of 1, float32 knows 1e-3 of a degree and no more.
        assert other == pytest.approx(one, rel=1e-4, abs=1e-3 if "angle" in where else 1e-12, nan_ok=True), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """-> the folders of one process's run and of two's, and what the two said."""
    folder = tmp_path_factory.mktemp("runs")
    alone = start(model, folder / "one", 1, *OPTIONS)
    finish(alone)
    said = finish(start(model, folder / "two", 2, *OPTIONS))
    return folder / "one", folder / "two", said


def test_two_processes_train_what_one_trains(runs):
    one, two, _ = runs
    assert read_run(two).config["resolved"]["processes"] == 2
    assert_alike(one, two)


def test_two_processes_score_as_one(runs):
    one, two = map(read_run, runs[:2])
    for model in ("zero_shot", "personal", "global"):
        for split in ("validation", "test"):
            for metric, values in one.results[model][split].items():
                # Margins are differences of log-probabilities near 10, of which float32 knows 1e-6.
                wanted = pytest.approx(values, rel=1e-5, abs=1e-6)
                assert two.results[model][split][metric] == wanted, (model, split, metric)
    for mine, theirs in zip(one.rounds, two.rounds, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - set(TIMES):
            assert_close(mine[name], theirs[name], name)


def test_the_first_tells_and_the_other_is_silent(runs):
    first, second = runs[2]
    assert "round 5/5" in first
    assert "report" in first
    assert [line for line in second.splitlines() if line and not line.startswith("[Gloo]")] == []


@pytest.mark.parametrize("victim", [1, 0])
def test_one_is_killed_and_the_same_command_goes_on(runs, model, tmp_path, victim):
    out = tmp_path / "killed"
    started = start(model, out, 2, *OPTIONS)
    wait_for_checkpoint(started, out, 2)
    started[victim].kill()
    said = started[1 - victim].communicate(timeout=120)[0]
    started[victim].communicate()
    assert not (out / "results.json").exists()
    assert started[1 - victim].returncode == 3, said
    again = r"fedvlm: process {}(?: and \d+)? is gone\. Start all processes again with (.*): the run goes on (.*)"
    told = re.search(again.format(victim), said)
    assert told, said
    assert str(out) in told[1]
    assert re.match(r"after round [2-4], its newest checkpoint", told[2])
    assert "stack trace" not in said
    finish(start(model, out, 2, *OPTIONS))
    assert_same_adapters(runs[1], out)
    rounds = [
        [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder)]
        for folder in (runs[1], out)
    ]
    assert rounds[0] == rounds[1]


def test_two_processes_draw_the_same_clients_and_noise(model, tmp_path):
    """With this seed the third round has nobody in it."""
    private = [*OPTIONS, "--cohort", "1", "--privacy.noise", "1", "--privacy.clip", "0.01", "--privacy.delta", "1e-3"]
    for processes in (1, 2):
        finish(start(model, tmp_path / str(processes), processes, *private))
    one, two = (read_metrics(tmp_path / str(processes)) for processes in (1, 2))
    assert [line["clients"] for line in one] == [2, 1, 0, 1, 1]
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("clients", "sampled", "noise_norm", "clip_fraction"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
    assert_alike(tmp_path / "1", tmp_path / "2")


def test_strangers_at_the_port_change_nothing(runs, model, tmp_path):
    """Odd bytes, and connections that say nothing, while the processes meet and train."""
    started = start(model, tmp_path / "visited", 2, *OPTIONS)
    port, silent = int(started[0].args[started[0].args.index("--distributed.coordinator") + 1].rpartition(":")[2]), []
    while len(silent) < 20 and all(process.poll() is None for process in started):
        try:
            visitor = socket.create_connection(("127.0.0.1", port), 1.0)
        except OSError:
            time.sleep(0.1)
            continue
        silent.append(visitor)
        if len(silent) % 2:
            visitor.sendall(b"fedvlm process one of two\r\n\xff\xfe GET / HTTP/1.1\r\n\r\n")
    assert len(silent) == 20
    finish(started)
    for visitor in silent:
        visitor.close()
    assert_same_adapters(runs[1], tmp_path / "visited")


def test_process_0_listens_at_its_address_and_says_who_did_not_come(model, tmp_path):
    first = start(model, tmp_path / "none", 2, *OPTIONS, "--distributed.timeout", "12")
    first[1].kill()
    where = first[0].args[first[0].args.index("--distributed.coordinator") + 1]
    listening = f"{int(where.rpartition(':')[2]):04X}"
    seen = set()
    while first[0].poll() is None:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            lines = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            seen |= {line[1].partition(":")[0] for line in lines if line[1].endswith(listening) and line[3] == "0A"}
        time.sleep(0.2)
    said = first[0].communicate()[0]
    assert first[0].returncode == 2, said
    assert {address[-8:] for address in seen} == {"0100007F"}, seen  # 127.0.0.1
    assert {address[:-8] for address in seen} <= {"", "0000000000000000FFFF0000"}, seen  # as IPv6 writes it
    assert said.startswith("fedvlm: after 12 s not all of 2 processes were there")
    assert len(said.splitlines()) == 1


def test_a_finished_run_is_not_run_again_and_other_options_are_refused(runs, model):
    _, two, _ = runs
    before = (two / "metrics.jsonl").read_bytes()
    first, second = finish(start(model, two, 2, *OPTIONS))
    assert "is finished" in first
    assert "round" not in second
    assert (two / "metrics.jsonl").read_bytes() == before
    others = start(model, two, 2, *OPTIONS, "--train.rounds", "6")
    for process in others:
        said = process.communicate()[0]
        assert process.returncode == 2
        assert "has a run with other options (--train.rounds)" in said


def test_four_processes_train_what_one_trains(runs, model, tmp_path):
    finish(start(model, tmp_path / "four", 4, *OPTIONS))
    assert_alike(runs[0], tmp_path / "four")


@pytest.mark.parametrize(
    ("mesh", "reason"), [("clients=2", "it must take all of them"), ("clients=1,model=4", "a model that divides 2")]
)
def test_meshes_that_several_processes_cannot_have(model, tmp_path, mesh, reason):
    """Who finds it first says why; the other the same, or that the first is gone."""
    started = start(model, tmp_path / "none", 2, *OPTIONS, "--mesh", mesh)
    said = "".join(process.communicate()[0] for process in started)
    codes = {process.returncode for process in started}
    assert 2 in codes
    assert codes <= {2, 3}
    assert reason in said


def test_everything_else_that_reaches_the_devices(model, tmp_path):
    """Pairs, a base that the method moves and that is cut, clients that drop out, newcomers like their nearest, local
    fine-tuning, neighbours, the matrix."""
    rows = []
    for client in "abcde":
        for split in ("train", "validation", "test"):
            for chosen, rejected in WORDS:
                words = {"question": f"{chosen} or {rejected}", "chosen": chosen, "rejected": rejected}
                rows.append(make_row(len(rows), client=client, split=split, **words))
    options = [
        "--data", str(write_rows(tmp_path / "pairs.parquet", rows)), "--objective", "dpo", "--method", "fedex-lora",
        "--mesh", "clients=2,model=2", "--train.rounds", "3", "--train.local-steps", "2", "--train.batch-size", "4",
        "--train.finetune-steps", "2", "--lora.rank", "2", "--participation.dropout", "0.4",
        "--data.held-out-clients", "0.2", "--evaluation.cold-start", "nearest", "--evaluation.neighbours", "2",
        "--evaluation.cross-clients", "--evaluation.every", "2", "--evaluation.max-answer-tokens", "4",
        "--evaluation.batch-size", "6",
    ]  # fmt: skip
    finish(start(model, tmp_path / "one", 1, *options))
    finish(start(model, tmp_path / "two", 2, *options))
    assert_alike(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for client, loss in one["personal"]["test"]["loss"].items():
        assert two["personal"]["test"]["loss"][client] == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(two["cross_clients"]["loss"], one["cross_clients"]["loss"], rtol=1e-4)
