"""The smallest run there is: a random Florence-2 of a few thousand parameters over four small emoji clients."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file
from transformers import BartConfig, Florence2Config

import fedvlm_jax
from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, Run, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.models import save_checkpoint
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.utils.progress import SilentProgress

NANO = Path(fedvlm_jax.__file__).parent / "assets" / "florence2-nano"


def make_folder(folder: Path) -> Path:
    """Write a complete Florence-2 folder: random weights, the shipped model's tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(NANO / name, folder / name)
    shipped = Florence2Config.from_pretrained(NANO)
    text = BartConfig(
        vocab_size=shipped.text_config.vocab_size, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    vision = {
        "embed_dim": [8], "depths": [1], "num_heads": [2], "num_groups": [2], "patch_size": [16], "patch_stride": [16],
        "patch_padding": [0], "patch_prenorm": [False], "window_size": 4, "projection_dim": 16,
        "max_position_embeddings": 4, "max_temporal_embeddings": 1,
    }  # fmt: skip
    vlm = build(Florence2Config(text_config=text, vision_config=vision, image_token_id=shipped.image_token_id))
    save_checkpoint(vlm, jax.jit(vlm.init)(jax.random.key(5)), folder)
    return folder


def tiny_run(model: Path, out: Path, **changes: object) -> Run:
    """Four clients, a handful of examples, four rounds of two steps, partial participation."""
    run = Run(
        model=str(model),
        cohort=3,
        seed=1,
        data=make_options(
            languages=("en", "de"), vendors=("noto", "fluent"), images_per_client=5, validation_per_client=2,
            test_per_client=3,
        ),
        train=TrainOptions(rounds=4, local_steps=2, batch_size=4),
        lora=LoraOptions(rank=2),
        evaluation=EvaluationOptions(every=2, max_answer_tokens=4, batch_size=6),
        out=out,
    )  # fmt: skip
    return replace(run, **changes)


class StopError(Exception):
    """Stands in for whatever ends a process."""


class StopAfter(SilentProgress):
    """Stops the run at a round, after its line and its checkpoint are written."""

    def __init__(self, round_):
        super().__init__()
        self.last = round_

    def round(self, line):
        super().round(line)
        if line["round"] == self.last:
            raise StopError


def read_adapters(folder):
    """Arrays by file; global models, whose names are digests, are numbered as the list of clients has them."""
    listed = json.loads((folder / "adapters" / "clients.json").read_text())["clients"].values()
    digests = dict.fromkeys(entry["global"] for entry in listed if "global" in entry)
    numbers = {f"{digest}.safetensors": str(number) for number, digest in enumerate(digests)}
    files = sorted((folder / "adapters").rglob("*.safetensors"))
    return {
        str(path.relative_to(folder).with_name(numbers.get(path.name, path.name))): load_file(path) for path in files
    }


def assert_same_adapters(one, two):
    one, two = read_adapters(one), read_adapters(two)
    assert one.keys() == two.keys()
    for name, arrays in one.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, two[name][path], err_msg=f"{name} {path}")
