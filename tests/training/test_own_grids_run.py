"""Photographs of different shapes on grids of their own, from `fedvlm train --image-pixels` to the report."""

import dataclasses
import json

import numpy as np
import pytest
from models.causal_cases import write_model, write_qwen3
from PIL import Image
from tiny_run import StopAfter, StopError, assert_same_adapters, read_adapters, tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, SystemOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs.batch_reader import make_blank_inputs, make_inputs
from fedvlm_jax.reporting.report import write_report
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import evaluate, federated_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import SilentProgress

PIXELS = 1024
"""16 image tokens at most."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_model("long", folder, cases={"long": lambda made: write_qwen3(made, max_position_embeddings=300)})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Photographs of four shapes, some of 201 x 1 pixels; every other row has two."""
    folder, records, rng = tmp_path_factory.mktemp("rows"), [], np.random.default_rng(0)
    for number in range(36):
        width, height = [(24, 24), (60, 16), (18, 70), (300, 200)][number % 4] if number != 35 else (201, 1)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    for number in range(24):
        pictures = [f"{number}.png"] if number % 2 else [f"{number}.png", f"{12 + number}.png"]
        said = [
            {"from": "human", "value": "<image>\n" * len(pictures) + "what is it?"},
            {"from": "gpt", "value": ["a car", "one", "two"][number % 3]},
        ]
        if number == 11:
            pictures = ["35.png"]
        records.append({"id": number, "image": pictures, "conversations": said, "client": "ab"[number % 2]})
    (folder / "rows.json").write_text(json.dumps(records))
    return folder / "rows.json"


def make_run(model, rows, out, **changes):
    base = tiny_run(
        model, out, data=make_options(str(rows), max_prompt_tokens=200, max_bad_share=0.1), cohort=None,
        train=TrainOptions(rounds=3, local_steps=2, batch_size=2), image_pixels=PIXELS,
        evaluation=EvaluationOptions(every=3, max_answer_tokens=4, batch_size=4, examples=1),
        lora=LoraOptions(rank=2, targets=r"language_model/layers/.*(q|v)_proj"),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def loaded(folder, rows, tmp_path_factory):
    run = make_run(folder, rows, tmp_path_factory.mktemp("none"))
    show = SilentProgress()
    return load_model(run, show.note), show.notes


def test_rows_have_the_tokens_and_grids_of_their_pictures(folder, rows, loaded, tmp_path):
    model, notes = loaded
    assert "pictures of up to 1,024 pixels on grids of their own, at most 16 image tokens each" in notes[-1]
    show = SilentProgress()
    experiment = open_experiment(make_run(folder, rows, tmp_path), model, show)
    examples, store = experiment.examples, experiment.store
    told = "\n".join(show.notes)
    # 24 x 24, 56 x 16, 16 x 56 and 32 x 24 pixels.
    counts = np.asarray([9, 14, 14, 12])
    wanted = [counts[row % 4] + (0 if row % 2 else counts[(12 + row) % 4]) for row in examples.rows.tolist()]
    assert (examples.input_ids == model.vlm.image_token_id).sum(1).tolist() == wanted
    assert examples.image_tokens == 28
    assert "prompts have up to 2 pictures, 28 image tokens" in told
    assert "1 × picture of 201x1 pixels: one side is more than 200 times the other" in told
    sizes = store.count_bytes(examples.views)
    assert sorted(set(sizes.tolist())) == [count * model.vlm.image_width * 4 for count in (9, 12, 14)]
    assert f"{len(examples.views)} images, {sizes.sum() / 2**20:.1f} MiB in memory" in told
    asked = np.asarray([[0, 3], [5, 1]])
    batch = make_inputs(examples, model.processor, store)(asked)
    blank = make_blank_inputs(examples, model.processor, store)(asked)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in blank.items()
    }
    assert batch["image_features"].shape == (2, 2, 28, model.vlm.image_width)
    assert batch["image_grids"].prod(-1).sum(-1).tolist() == [[wanted[row] for row in line] for line in asked.tolist()]
    for array, row in zip(batch["image_features"].reshape(4, 28, -1), asked.ravel(), strict=True):
        assert array.any(1).tolist() == [place < wanted[row] for place in range(28)]


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(folder, rows, loaded, tmp_path):
    straight = federated_run.train(make_run(folder, rows, tmp_path / "straight"), model=loaded[0])
    adapters = read_adapters(straight)
    assert any(np.abs(array).max() > 0 for array in adapters["adapters/shared.safetensors"].values())
    run = make_run(folder, rows, tmp_path / "stopped")
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(1), model=loaded[0])
    again = federated_run.resume(run.out, SilentProgress(), load_model(run))
    assert_same_adapters(straight, again)
    results = read_run(again).results
    assert results["personal"] == read_run(straight).results["personal"]
    assert set(results["personal"]["test"]["exact_match"]) == {"a", "b"}
    assert "image_pixels" in write_report([again]).read_text(encoding="utf-8")
    assert evaluate.evaluate(again)["personal"] == results["personal"]


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_what_is_kept_changes_nothing(folder, rows, loaded, tmp_path, cache):
    place = tmp_path / "cache" if cache == "disk" else None
    system = SystemOptions(cache=cache, cache_dir=place)
    experiments = [
        open_experiment(make_run(folder, rows, tmp_path, system=each), loaded[0]) for each in (SystemOptions(), system)
    ]
    first, second = (experiment.inputs(np.arange(6)) for experiment in experiments)
    np.testing.assert_array_equal(first["image_features"], second["image_features"])
    views = experiments[1].examples.views
    shown = len(np.unique(experiments[1].examples.view[:6])) - 1
    assert len(views) > shown
    assert len(experiments[1].store) == (0 if cache == "off" else shown)


def test_an_adapter_in_the_tower_or_the_projector_is_refused(folder, rows, loaded, tmp_path):
    for targets in ("vision_tower/.*qkv|language_model/.*q_proj", "image_projector/.*|language_model/.*q_proj"):
        run = make_run(folder, rows, tmp_path, lora=LoraOptions(rank=2, targets=targets))
        for start in (lambda run: load_model(run), lambda run: open_experiment(run, loaded[0])):
            with pytest.raises(UserError, match=r"--image-pixels needs a frozen tower, and --lora\.targets reach"):
                start(run)
