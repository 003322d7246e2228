"""The small CLIP that ships: complete, small, read alike by transformers and by us, and not random."""

import dataclasses
import importlib.util
import json
import struct

import jax
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from assets.shipped_folders import ASSETS, EMOJI, NAMES, read_unseen
from tiny_run import tiny_run

from fedvlm_jax.config.run_options import EvaluationOptions, TrainOptions
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.models import load_weights, open_model
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import federated_run

FOLDER = ASSETS / "clip-nano"
FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXTS = ("food & drink", "Tiere & Natur", "visage avec bouche en cœur")
GOLDEN = [[1.6284, -1.4042, -0.2482], [1.4238, 1.0594, 0.9171], [-1.6651, 1.401, -1.0955]]
"""Of transformers' CLIPModel: the logits of three pictures and TEXTS in the default prompt."""


@pytest.fixture(scope="module")
def model():
    vlm, processor = open_model(FOLDER)
    return vlm, processor, load_weights(vlm, FOLDER)


def test_folder_is_complete_and_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == FILES
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000
    with (FOLDER / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} == {"F16"}


@pytest.mark.parametrize("language", NAMES)
def test_tokenizer_keeps_every_language_but_for_case(language: str, model) -> None:
    _, processor, _ = model
    (ids,) = processor.tokenise([NAMES[language]])
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.replace(" ", "") == NAMES[language].lower().replace(" ", "")


def test_every_shipped_answer_is_a_class(model) -> None:
    _, processor, _ = model
    answers = pc.unique(pq.read_table(EMOJI, columns=["chosen"])["chosen"]).to_pylist()
    rows = processor.tokenise([DataOptions.class_prompt.replace("{}", answer) for answer in answers])
    assert len(answers) > 10_000
    assert max(map(len, rows)) <= processor.positions
    words = processor.tokenizer.convert_ids_to_tokens(sorted({token for row in rows for token in row[1:-1]}))
    assert not set(words) & {"<|startoftext|>", "<|endoftext|>"}, "<|endoftext|> is also what stands for the unknown"


def bind(vlm, processor, answers):
    return vlm.bind(processor, answers, DataOptions.class_prompt)


def test_logits_are_those_that_transformers_found(model) -> None:
    vlm, processor, params = model
    bound, _ = bind(vlm, processor, TEXTS)
    found = bound.encode(params, None, {"pixel_values": read_unseen(processor)[0]["pixel_values"][:3]})["logits"]
    np.testing.assert_allclose(found, GOLDEN, atol=2e-4)


def test_names_the_group_of_unseen_pictures(model) -> None:
    """Far above the share of the commonest answer."""
    vlm, processor, params = model
    batch, answers = read_unseen(processor)
    bound, asked = bind(vlm, processor, sorted(set(answers)))
    given = asked.decode(np.asarray(bound.generate(params, None, {"pixel_values": batch["pixel_values"]}, 1)))
    right = np.mean([answer == wanted for answer, wanted in zip(given, answers, strict=True)])
    chance = max(answers.count(answer) for answer in answers) / len(answers)
    assert right > chance + 0.15, f"{right:.2f} against a chance of {chance:.2f}"


@pytest.mark.broad
def test_it_goes_from_train_to_report(tmp_path) -> None:
    from fedvlm_jax.cli.main import main

    data = make_options(
        languages=("en", "de"), vendors=("noto",), tasks=("group",), images_per_client=12, validation_per_client=4,
        test_per_client=8,
    )  # fmt: skip
    run = tiny_run(FOLDER, tmp_path / "run", data=data, cohort=None)
    evaluation, train = EvaluationOptions(every=2, batch_size=8), TrainOptions(rounds=2, local_steps=2, batch_size=4)
    record = read_run(federated_run.train(dataclasses.replace(run, evaluation=evaluation, train=train)))
    assert record.config["resolved"]["classes"] == 16
    assert np.isfinite(record.rounds[-1]["loss"])
    main(["report", str(tmp_path / "run")])
    assert "clip-nano" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parity
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
)
def test_transformers_loads_clip_nano_and_compares_alike(model) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    reference, info = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    vlm, processor, params = model
    bound, asked = bind(vlm, processor, list(NAMES.values()))
    pixels = read_unseen(processor)[0]["pixel_values"][:12]
    theirs = CLIPProcessor.from_pretrained(FOLDER, backend="pil")
    texts = theirs.tokenizer(
        [DataOptions.class_prompt.replace("{}", name) for name in asked.classes], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = reference.eval()(**texts, pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits_per_image
    found = jax.jit(bound.encode)(params, None, {"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
