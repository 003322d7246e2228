"""Plans for CPU devices, which every machine can compile for, and for a TPU pod where libtpu is installed."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from models import causal_cases, clip_cases

from fedvlm_jax.analysis.plan import plan_round
from fedvlm_jax.analysis.plan_options import Request, SizeOptions
from fedvlm_jax.cli.plan import plan
from fedvlm_jax.config.run_options import LoraOptions, SystemOptions, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation import memory
from fedvlm_jax.federation.memory import GIB, Footprint
from fedvlm_jax.models import read_size, read_vlm
from fedvlm_jax.reporting.plan_report import describe_refusal, tabulate_plan, write_plan

ADAPTER = LoraOptions(rank=2, targets=r"language_model/encoder/.*(q_proj|fc1)")


def make_request(model, **changes):
    train = TrainOptions(rounds=2, local_steps=2, batch_size=2)
    sizes = SizeOptions(prompt_tokens=3, answer_tokens=3)
    given = {"model": str(model), "clients": 6, "cohort": 4, "sizes": sizes, "train": train, "lora": ADAPTER}
    return Request(**given | changes)


@pytest.fixture(scope="module")
def planned(model):
    notes = []
    return plan_round(make_request(model), notes.append), notes


def test_a_plan_for_this_cpu(planned, tmp_path):
    found, notes = planned
    assert (found.layout.cohort, found.layout.wave, found.layout.waves) == (4, 4, 1)
    assert (found.layout.rows, found.layout.steps, found.layout.batch) == (8, 2, 2)
    (prompt,) = found.example["input_ids"]
    assert prompt % 4 == 0
    assert prompt >= found.image_tokens + 3
    assert "image_features" in found.example
    base = 4 * found.parameters
    assert found.memory["base"] == base
    assert found.memory["arguments"] + found.memory["unread"] > base
    assert found.memory["unread"] > 0, "the vision tower, whose features are kept"
    assert found.collectives == ()  # one device
    assert found.flops > 0
    assert found.unknown_loops == 0
    assert describe_refusal(found) == ""
    assert "compiling for cpu: 4 clients" in notes[0]
    write_plan(tmp_path, found)
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["memory"] == found.memory
    assert stored["layout"]["wave"] == 4
    assert (stored["seconds"], stored["price"]) == (None, None)
    assert stored["request"]["train"]["local_steps"] == 2
    text = (tmp_path / "plan.md").read_text()
    assert "# Plan for cpu" in text
    assert all(table.title in text for table in tabulate_plan(found))


def test_the_command_says_a_table_s_note_once(planned, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fedvlm_jax.analysis.plan.plan_round", lambda request, note: planned[0])
    plan(make_request(model, out=tmp_path / "plan"))
    assert capsys.readouterr().out.count("no device sends another anything") == 1


@pytest.mark.broad
def test_what_is_too_large_is_narrowed_and_told(model, monkeypatch, tmp_path):
    """1 GiB of base and 1 GiB a client, by a made-up compiler, on a device of which 3.6 GiB may be used: 2 of 4 fit."""

    def measure(compiled, base, mesh, wave, unread):
        return Footprint(GIB, (1 + wave) * GIB, wave)

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "read_device_bytes", lambda mesh: 4 * GIB)
    notes = []
    found = plan_round(make_request(model), notes.append)
    assert (found.layout.wave, found.layout.waves, found.layout.cohort) == (2, 2, 4)
    assert [(one.wave, one.bytes, one.fits) for one in found.attempts] == [
        (4, 5 * GIB, False), (2, 3 * GIB, True),
    ]  # fmt: skip
    assert describe_refusal(found) == (
        "does not fit: 5.0 of 4.0 GiB (a tenth stays free); wave 4 → 2 fits, 2 clients a device in place of 4"
    )
    assert sum(note.startswith("does not fit: 5.00 GiB") for note in notes) == 1
    write_plan(tmp_path, found)
    assert describe_refusal(found) in (tmp_path / "plan.md").read_text()
    assert json.loads((tmp_path / "plan.json").read_text())["refusal"] == describe_refusal(found)


def test_no_room_for_anyone(model, monkeypatch):
    monkeypatch.setattr(memory, "read_device_bytes", lambda mesh: 1000)
    with pytest.raises(UserError, match=r"a round with one client on a device of .* does not fit"):
        plan_round(make_request(model))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"topology": "cpu:4096"}, "has settled for"),
        ({"system": SystemOptions(mesh="clients=4096")}, "--mesh clients=4096 takes 4,096 devices"),
        ({"lora": LoraOptions(rank=2, targets="nothing_is_called_so")}, "nothing_is_called_so"),
        ({"objective": "reward"}, "--objective reward draws answers, whose length nobody knows before"),
    ],
)
def test_what_cannot_be_planned(model, changes, expected):
    with pytest.raises(UserError, match=expected):
        plan_round(make_request(model, **changes))


def test_tokens_beyond_the_model_s_positions(model):
    request = replace(make_request(model), sizes=SizeOptions(prompt_tokens=200))
    with pytest.raises(UserError, match=r"--sizes.prompt-tokens: that makes 220 tokens .* 64 positions"):
        plan_round(request)


@pytest.mark.broad
@pytest.mark.parametrize("name", ["smolvlm", "qwen3-vl", "clip"])
def test_a_config_json_alone_is_planned(name, tmp_path):
    """Without an image processor's file pictures are as large as the tower, or as the family has them."""
    write_case = {**causal_cases.CASES, **clip_cases.CASES}[name]
    write_case(tmp_path)
    size = read_size(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    vlm = read_vlm(tmp_path)
    sides = {"qwen3-vl": (448, 448)}  # the folder's files allow less
    assert read_size(tmp_path) == sides.get(name, size)
    sizes = SizeOptions(image_size=40 if name in sides else None, prompt_tokens=3, answer_tokens=3)
    found = plan_round(make_request(tmp_path, lora=LoraOptions(rank=2), sizes=sizes))
    assert found.image_tokens == vlm.image_tokens(*size)
    assert "image_features" in found.example
    assert found.memory["base"] == 4 * found.parameters
    assert found.memory["unread"] > 0
    assert found.flops > 0


@pytest.mark.broad
def test_pictures_on_grids_of_their_own_are_planned_with_the_most_image_tokens(tmp_path):
    causal_cases.CASES["qwen3-vl"](tmp_path)
    sizes = SizeOptions(image_pixels=1030, pictures=2, prompt_tokens=3, answer_tokens=3)
    found = plan_round(make_request(tmp_path, lora=LoraOptions(rank=2), sizes=sizes))
    assert found.image_tokens == 2 * 16
    assert found.example["image_features"] == (32, read_vlm(tmp_path).image_width)
    assert found.example["image_grids"] == (2, 2)
    assert found.flops > 0


def test_grids_that_cannot_be_planned_are_refused(model, tmp_path):
    def ask(folder, targets="", **sizes):
        lora = LoraOptions(rank=2, targets=targets)
        return plan_round(make_request(folder, lora=lora, sizes=SizeOptions(**sizes)))

    with pytest.raises(UserError, match=r"have no grids of their own: leave --sizes\.image-pixels out"):
        ask(model, image_pixels=4096)
    with pytest.raises(UserError, match=r"--sizes\.image-size and --sizes\.image-pixels exclude each other"):
        ask(model, image_pixels=4096, image_size=64)
    causal_cases.CASES["qwen3-vl"](tmp_path)
    with pytest.raises(UserError, match=r"--sizes\.image-pixels 63: an image token alone has 64"):
        ask(tmp_path, image_pixels=63)
    with pytest.raises(UserError, match=r"--sizes\.image-pixels needs a frozen tower"):
        ask(tmp_path, image_pixels=4096, targets="vision_tower/.*qkv")


PROGRAM = """
import sys
from fedvlm_jax.cli.main import main
main(sys.argv[1:])
"""


def run_command(model, folder, topology, *words):
    """`fedvlm plan` in a process of its own, whose devices are not settled; its exit code, output and plan.json."""
    options = ["--model", str(model), "--out", str(folder), "--topology", topology, "--train.local-steps", "2"]
    options += ["--train.batch-size", "2", "--lora.rank", "2", "--lora.targets", ADAPTER.targets]
    options += ["--sizes.prompt-tokens", "3", "--sizes.answer-tokens", "3", "--clients", "16", *words]
    command = [sys.executable, "-c", PROGRAM, "plan", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else None


@pytest.mark.broad
def test_forced_devices_reduce_once_over_clients(model, tmp_path):
    """pLoRA sends the factors B, in float32: [1, 16] of fc1 and of q_proj, rank 2."""
    done, stored = run_command(model, tmp_path, "cpu:4", "--cohort", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    flags, reduction = sorted(stored["collectives"], key=lambda one: one["bytes_per_round"])
    assert (flags["kind"], flags["bytes_per_round"]) == ("all-gather", 8), "whose numbers are finite, a byte a client"
    assert (reduction["kind"], reduction["axes"], reduction["devices_per_group"]) == ("all-reduce", ["clients"], 4)
    assert reduction["runs_per_round"] == 1
    assert reduction["bytes_per_round"] == 4 * 2 * (16 + 16)
    assert stored["mesh"] == {"clients": 4, "model": 1}
    assert "compiling for cpu:4: 8 clients, 1 x 8, 2 side by side on a device" in done.stderr


@pytest.mark.slow
def test_a_pod_that_is_not_there(model, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu is not installed: pip install -e ".[plan]"')
    words = ("--system.compute", "bfloat16", "--mesh", "clients=2,model=2", "--price-per-chip-hour", "3.6")
    done, stored = run_command(model, tmp_path, "v5e:2x2", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hostname" not in done.stderr
    over_clients = [one for one in stored["collectives"] if "clients" in one["axes"]]
    assert sum(one["runs_per_round"] for one in over_clients) == 2, "the factors B, and whose numbers are finite"
    assert 0 < sum(one["bytes_per_round"] for one in over_clients) - 4 * 2 * (16 + 16) <= 4 * 16
    assert stored["room"] == 16 * GIB
    assert 0 < stored["memory"]["needed"] < GIB
    assert stored["unknown_loops"] == 0
    assert stored["seconds"] == stored["flops"] / 197e12
    assert stored["price"] == pytest.approx(stored["seconds"] * 4 * 3.6 / 3600)
    assert jax.devices()[0].platform == "cpu"
