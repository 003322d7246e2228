"""Photographs of different shapes on grids of their own, from `fedvlm train --image-pixels` to the report."""

import dataclasses
import json

import numpy as np
import pytest
from models.causal_cases import write_model, write_qwen3
from PIL import Image
from tiny_run import StopAfter, StopError, assert_same_adapters, read_adapters, tiny_run

from fedvlm_jax.asking.asker import open_asker
from fedvlm_jax.asking.question import look_at
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, SystemOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs.batch_reader import make_blank_inputs, make_inputs
from fedvlm_jax.reporting.report import write_report
from fedvlm_jax.run_dir.reader import read_finished, read_run
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
def straight(folder, rows, loaded, tmp_path_factory):
    """The run that nothing happened to."""
    return federated_run.train(make_run(folder, rows, tmp_path_factory.mktemp("runs") / "run"), model=loaded[0])


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
    # 24 x 24, 64 x 16, 16 x 56 and 32 x 24 pixels.
    counts = np.asarray([9, 16, 14, 12])
    wanted = [counts[row % 4] + (0 if row % 2 else counts[(12 + row) % 4]) for row in examples.rows.tolist()]
    assert (examples.input_ids == model.vlm.image_token_id).sum(1).tolist() == wanted
    assert examples.image_tokens == 28
    assert "prompts have up to 2 pictures, 28 image tokens" in told
    assert "1 × a picture's side is more than 200 times the other" in told
    sizes = store.count_bytes(examples.views)
    assert sorted(set(sizes.tolist())) == [count * model.vlm.image_width * 4 for count in (9, 12, 14, 16)]
    assert f"{len(examples.views)} images, {sizes.sum() / 2**20:.1f} MiB in memory" in store.announce(examples.views)
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


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(folder, rows, loaded, straight, tmp_path):
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


@pytest.mark.broad
def test_questions_are_asked_about_pictures_of_other_shapes(straight, tmp_path):
    asker = open_asker(straight, read_finished(straight), SilentProgress())
    client, pictures, folder = asker.clients[0], [], tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(90, 30), (32, 32), (30, 90), (4, 900)]):
        pictures.append(folder / f"{number}.png")
        Image.new("RGB", size, (60 * number, 10, 90)).save(pictures[-1])
    together = asker.ask(client, "what is it?", look_at([folder]))
    assert set(together[0]) == {"zero_shot", "global", "personal"}
    assert "a picture's side is more than 200 times the other" in together[3]
    for picture, answers in zip(pictures[:3], together, strict=False):
        assert asker.ask(client, "what is it?", look_at([picture])) == [answers]
    (answers,) = asker.ask(client, "what is it?", look_at(pictures[:3]))  # more image tokens than any row of the run
    assert set(answers) == set(together[0])
    with pytest.raises(UserError, match="a picture's side is more than 200 times the other"):
        asker.ask(client, "what is it?", look_at(pictures[3:]))


def test_fedvlm_data_counts_the_tokens_of_every_picture(folder, rows, tmp_path, capsys):
    words = ["data", "--data", str(rows), "--model", str(folder), "--image-pixels", str(PIXELS)]
    main([*words, "--data.max-prompt-tokens", "200", "--out", str(tmp_path / "data")])
    found = json.loads((tmp_path / "data" / "data.json").read_text())["tokens"]
    assert (found["image_tokens"], found["most_pictures"], found["most_image_tokens"]) == (16, 2, 28)
    assert "up to 28 tokens are pictures', of each up to 16" in " ".join(capsys.readouterr().out.split())
    assert sum(found["left_out"].values()) == 1


@pytest.mark.broad
def test_preferences_neighbours_and_newcomers_read_grids_too(folder, rows, tmp_path):
    records = json.loads(rows.read_text())
    pairs = [
        {
            "images": record["image"], "client": record["client"],
            "prompt": [{"role": "user", "content": "what is it?"}],
            "chosen": [{"role": "assistant", "content": record["conversations"][1]["value"]}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for record in records
    ]  # fmt: skip
    file = rows.parent / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    run = make_run(folder, file, tmp_path / "dpo", objective="dpo", train=TrainOptions(rounds=1, local_steps=1))
    evaluation = dataclasses.replace(run.evaluation, every=1, neighbours=2)
    run = dataclasses.replace(run, evaluation=evaluation)
    experiment = open_experiment(run, load_model(run))
    examples, store = experiment.examples, experiment.store
    reference = experiment.find_reference()
    assert np.isfinite(reference).all()
    means = experiment.data.client_means(inputs=experiment.inputs)
    rows_of = examples.clients[0].train
    features = [store.gather(examples.views, examples.view[[row]], count)[0] for row, count in
                zip(rows_of, examples.views.count_tokens(examples.view[rows_of]).tolist(), strict=True)]  # fmt: skip
    np.testing.assert_allclose(means[0], np.concatenate(features).mean(0), rtol=1e-4, atol=1e-5)
    results = read_run(federated_run.train(run)).results
    assert "neighbours" in results


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
    shown = np.unique(experiments[1].examples.view[:6])
    assert len(shown) < len(views)
    assert len(experiments[1].store) == (0 if cache == "off" else (shown >= 0).sum())


def test_an_adapter_in_the_tower_or_the_projector_is_refused(folder, rows, loaded, tmp_path):
    for targets in ("vision_tower/.*qkv|language_model/.*q_proj", "image_projector/.*|language_model/.*q_proj"):
        run = make_run(folder, rows, tmp_path, lora=LoraOptions(rank=2, targets=targets))
        for start in (lambda run: load_model(run), lambda run: open_experiment(run, loaded[0])):
            with pytest.raises(UserError, match=r"--image-pixels needs a frozen tower, and --lora\.targets reach"):
                start(run)
