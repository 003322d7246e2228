"""Bases of published shapes with random weights, because real ones could not be had: what a round of each is."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from transformers import Florence2Config

from fedvlm_jax.models import read_vlm, resolve_folder, save_checkpoint
from fedvlm_jax.models.florence2 import build
from harness.published import write_config
from harness.world import Shape

BATCHES = (1, 2, 8)


@dataclass(frozen=True)
class Base:
    """A base and the rounds that are measured on it.

    Attributes:
        make: writes its checkpoint into a folder.
        picture: height and width in pixels.
        rounds: batch -> a round's shape, and clients side by side in it.
        accelerated: the same on an accelerator.
        unroll: `--system.unroll` on a CPU.
        prompt: tokens after the picture's.
        answer: tokens.
    """

    make: Callable[[Path], None]
    picture: tuple[int, int]
    rounds: Mapping[int, tuple[Shape, int]]
    accelerated: Mapping[int, tuple[Shape, int]]
    unroll: int
    prompt: int = 32
    answer: int = 24

    def open_folder(self, name: str, work: Path) -> Path:
        """Give the checkpoint's folder below `work`, where it is made if it is not there."""
        folder = work / name
        if not (folder / "model.safetensors").exists():
            self.make(folder)
        return folder


def make_florence(folder: Path) -> None:
    """Write a folder of Florence-2-base's shape with random weights, and the tokenizer of the model that ships."""
    nano = resolve_folder("florence2-nano")
    folder.mkdir(parents=True)
    shutil.copy(nano / "tokenizer.json", folder)
    tokenizer = json.loads((nano / "tokenizer_config.json").read_text()) | {"model_max_length": 1024}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    processor = json.loads((nano / "processor_config.json").read_text())
    processor["image_processor"] |= {"size": {"height": 768, "width": 768}, "image_seq_length": 577}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    text = {
        "model_type": "bart",
        "vocab_size": 51290,
        "d_model": 768,
        **{f"{half}_layers": 6 for half in ("encoder", "decoder")},
        **{f"{half}_attention_heads": 12 for half in ("encoder", "decoder")},
        **{f"{half}_ffn_dim": 3072 for half in ("encoder", "decoder")},
        "max_position_embeddings": 1024,
    }
    image_token = json.loads((nano / "config.json").read_text())["image_token_id"]
    config = Florence2Config(vision_config={"projection_dim": 768}, text_config=text, image_token_id=image_token)
    vlm = build(config)
    save_checkpoint(vlm, jax.jit(vlm.init)(jax.random.key(0)), folder)


def make_smolvlm(folder: Path) -> None:
    """Write a folder of SmolVLM-256M's shape with random weights, without tokenizer and processor."""
    vlm = read_vlm(write_config("HuggingFaceTB/SmolVLM-256M-Instruct", folder))
    save_checkpoint(vlm, jax.jit(vlm.init)(jax.random.key(0)), folder)


BASES = {
    "base": Base(
        make_florence,
        (768, 768),
        # Many long rows fill the cores by themselves.
        {1: (Shape(2, 2, 1), 2), 2: (Shape(2, 2, 2), 1), 8: (Shape(1, 1, 8), 1)},
        {batch: (Shape(16, 2, batch), wave) for batch, wave in {1: 16, 2: 16, 8: 4}.items()},
        unroll=6,  # all its layers are written out, which pays on a CPU
    ),
    "smolvlm": Base(
        make_smolvlm,
        (512, 512),
        {2: (Shape(4, 2, 2), 4)},
        {2: (Shape(16, 2, 2), 16)},
        unroll=3,
    ),
}
"""Name -> base: Florence-2-base's and SmolVLM-256M's shapes."""
