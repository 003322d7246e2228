"""Rows of several pictures, tiles and turns through the whole engine, by kept features and by pixels alike."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from models.causal_cases import write_model, write_smolvlm
from PIL import Image
from tiny_run import read_adapters, tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, SystemOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs.batch_reader import make_inputs
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model
from fedvlm_jax.utils.progress import SilentProgress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm")
    write_model("long", folder, cases={"long": partial(write_smolvlm, max_position_embeddings=500)})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Conversations in LLaVA's form about one and two pictures, square ones, wide ones and high ones."""
    folder = tmp_path_factory.mktemp("rows")
    for number in range(48):
        size = [(20, 20), (40, 20), (20, 40)][number % 3] if number < 24 else (40, 20)
        Image.new("RGB", size, (5 * number, 30, 200)).save(folder / f"{number}.png")
    records = []
    for number in range(24):
        pictures = [f"{number}.png"] if number % 2 else [f"{number}.png", f"{24 + number}.png"]
        said = [
            {"from": "human", "value": "<image>\n" * len(pictures) + "what is it?"},
            {"from": "gpt", "value": "a car"},
            {"from": "human", "value": "and how many?"},
            {"from": "gpt", "value": ["one", "two", "three"][number % 3]},
        ]
        records.append({"id": number, "image": pictures, "conversations": said, "client": "ab"[number % 2]})
    (folder / "rows.json").write_text(json.dumps(records))
    return folder / "rows.json"


def make_run(model, rows, out, **changes):
    data = make_options(str(rows), max_prompt_tokens=400)
    base = tiny_run(
        model, out, data=data, cohort=None, train=TrainOptions(rounds=1, local_steps=2, batch_size=2),
        evaluation=EvaluationOptions(every=1, max_answer_tokens=4, batch_size=4, examples=1),
        lora=LoraOptions(rank=2, targets=r"language_model/layers/.*(q|v)_proj"),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_a_row_s_pictures_and_tiles_are_in_its_prompt(folder, rows, tmp_path):
    run = make_run(folder, rows, tmp_path / "run", image_tiles=2)
    show = SilentProgress()
    experiment = open_experiment(run, load_model(run), show)
    examples, processor = experiment.examples, experiment.model.processor
    assert len(examples) == 24
    assert not examples.skipped
    # 2 x 2 and the whole of the square picture, 1 x 2 and 2 x 1 of the others.
    views = [[5, 3, 3][number % 3] + (0 if number % 2 else 3) for number in examples.rows]
    assert (examples.view >= 0).sum(1).tolist() == views
    counted = (examples.input_ids == processor.image_token_id).sum(1)
    assert counted.tolist() == [4 * count for count in views]
    assert "prompts have up to 8 pictures and tiles, 32 image tokens" in "\n".join(show.notes)
    nothing = make_inputs(examples, processor, None)(np.empty((3, 0), np.int64))
    assert nothing["pixel_values"].shape == (3, 0, 8, *processor.size, 3)
    text = processor.tokenizer.decode(examples.input_ids[0][examples.attention_mask[0] > 0])
    assert text.endswith("Assistant: a car<end_of_utterance>\nUser: and how many?<end_of_utterance>\nAssistant:")


@pytest.mark.broad
@pytest.mark.parametrize("tiles", [None, 2])
def test_features_and_pixels_train_alike(folder, rows, tmp_path, tiles):
    kept = make_run(folder, rows, tmp_path / "kept", image_tiles=tiles)
    read = dataclasses.replace(kept, out=tmp_path / "read", system=SystemOptions(cache="off"))
    one, two = (federated_run.train(run, model=load_model(run)) for run in (kept, read))
    adapters = read_adapters(one)
    assert any(np.abs(array).max() > 0 for array in adapters["adapters/shared.safetensors"].values())
    for name, arrays in read_adapters(two).items():
        for path, array in arrays.items():
            np.testing.assert_allclose(array, adapters[name][path], atol=1e-4)
    results = read_run(one).results
    assert set(results["personal"]["test"]["exact_match"]) == {"a", "b"}


def test_models_of_one_picture_leave_others_out(model, rows, tmp_path):
    run = make_run(model, rows, tmp_path / "run", lora=LoraOptions(rank=2))
    with pytest.raises(UserError, match="2 pictures, the model takes 1"):
        open_experiment(run, load_model(run), SilentProgress())
    data = run.data.replace(max_bad_share=0.6)
    run = dataclasses.replace(run, data=data)
    examples = open_experiment(run, load_model(run), SilentProgress()).examples
    assert len(examples) == 12
    assert examples.view.shape == (12, 1)
