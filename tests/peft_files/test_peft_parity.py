"""Exported folders in PEFT itself, live: `pytest -m parity` with the extra `parity`."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export.method_adapters import REFUSED, make_client_adapter
from models import causal_cases, clip_cases
from models.cases import CASES, make_batch
from peft_cases import draw
from PIL import Image
from toy import WRITING

from fedvlm_jax.models import load_vlm, load_weights, open_model
from fedvlm_jax.peft import write_peft

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "peft")),
        reason="needs the extra `parity`: pip install -e '.[parity]'",
    ),
]
GOLDEN = Path(__file__).parents[1] / "models" / "golden"
QUESTIONS, ANSWERS = ["what is this?", "is it a red car, or two?"], ["a car", "yes it is one"]
GROUPS = {
    "text": r"language_model/.*(layers/|lm_head)",
    "vision": r"vision_tower/.*(qkv|fc1|q_proj|conv$|patch_embed)|image_projector/(?!.*embeddings)",
    "tables": r"row_embeddings|column_embeddings|language_model/(shared|embed_tokens)|pos_embed|position_embedding",
}
"""Sites that are adapted together: every kind of layer is in one of them."""


class Florence:
    """The shipped golden model, by transformers and here, in float64."""

    def __init__(self, _):
        self.folder = GOLDEN / "windows"
        self.vlm, self.params = load_vlm(self.folder, dtype=jnp.float64, compute_dtype=jnp.float64)
        self.batch = make_batch("windows", self.vlm.image_tokens(*CASES["windows"][2]))
        self.labels = self.batch["labels"]

    def open(self):
        import torch
        from transformers import Florence2ForConditionalGeneration

        return Florence2ForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float64)

    def answer(self, model):
        import torch
        from models import reference

        inputs = reference.to_torch(self.batch)
        with torch.no_grad():
            return model(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits.numpy()


class Causal:
    """A tiny decoder-only model; `causal_reference` hands its logits over in float32."""

    def __init__(self, folder, name):
        from models import causal_reference

        self.folder = folder
        causal_cases.CASES[name](folder)
        causal_reference.make_model(folder)
        self.vlm, processor = open_model(folder, compute_dtype=jnp.float64)
        self.params = load_weights(self.vlm, folder, dtype=jnp.float64)
        random = np.random.default_rng(0)
        images = [Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in QUESTIONS]
        ids, mask = processor.prompts(QUESTIONS)
        self.labels = processor.answers(ANSWERS, 8)
        self.batch = {"pixel_values": processor.pixels(images), "input_ids": ids, "attention_mask": mask}
        self.batch["labels"] = self.labels

    def open(self):
        import torch
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float64)

    def answer(self, model):
        from models import causal_reference

        return causal_reference.find_logits(model, self.batch, self.labels)


class Clip:
    """A tiny CLIP, in float64: logits of pictures over classes."""

    def __init__(self, folder, name):
        from models.test_clip_parity import TEMPLATE, make_model

        self.folder = folder
        clip_cases.CASES[name](folder)
        make_model(folder)
        vlm, processor = open_model(folder, compute_dtype=jnp.float64)
        self.vlm, processor = vlm.bind(processor, clip_cases.CLASSES, TEMPLATE)
        self.params = load_weights(vlm, folder, dtype=jnp.float64)
        random = np.random.default_rng(0)
        images = [Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in QUESTIONS]
        self.batch = {"pixel_values": processor.pixels(images), "labels": np.zeros((2, 1), np.int32)}
        self.labels = self.batch["labels"]
        self.texts = [TEMPLATE.replace("{}", name) for name in clip_cases.CLASSES]

    def open(self):
        import torch
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(self.folder, dtype=torch.float64)

    def answer(self, model):
        import torch
        from transformers import CLIPTokenizer

        told = CLIPTokenizer.from_pretrained(self.folder)(self.texts, padding=True, return_tensors="pt")
        pixels = torch.tensor(self.batch["pixel_values"]).permute(0, 3, 1, 2).double()
        with torch.no_grad():
            return model(**told, pixel_values=pixels).logits_per_image[:, None].numpy()


def make_world(name, folder):
    """A model twice over, and its bare error."""
    kind = {"florence2": Florence, "clip": Clip}.get(name)
    if name == "florence2":
        made = Florence(folder)
    else:
        made = (kind or Causal)(folder, name)
    made.logits = jax.jit(made.vlm.logits)
    counted = True if kind else made.labels[..., None] != -100
    made.ours = lambda adapter: np.where(counted, made.logits(made.params, adapter, made.batch), 0)
    made.bare = np.abs(made.ours(None) - made.answer(made.open().eval())).max()
    return made


@pytest.fixture(scope="module", params=["florence2", "smolvlm-tied", "qwen3-vl"])
def world(request, tmp_path_factory):
    with jax.enable_x64(True):
        yield make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", ["clip", "llava", "llava_onevision", "qwen2.5-vl"])
def test_every_family_s_logits_are_those_of_peft(name, tmp_path):
    """Every site that is a module, at once: vision, text and tables."""
    from peft import PeftModel

    with jax.enable_x64(True):
        world = make_world(name, tmp_path)
        sites = [s for s in world.vlm.sites.values() if not s.obstacle]
        adapter = jax.tree.map(lambda leaf: 0.05 * leaf if leaf.ndim > 1 else leaf, draw(sites))
        write_peft(tmp_path / "peft", world.vlm, adapter, str(world.folder))
        model = PeftModel.from_pretrained(world.open(), tmp_path / "peft", autocast_adapter_dtype=False).eval()
        found, wanted = world.answer(model.double()), world.ours(adapter)
        assert np.abs(wanted - world.ours(None)).max() > 0.05
        assert np.abs(found - wanted).max() <= 3 * max(world.bare, 1e-12)


@pytest.mark.parametrize("uniform", [False, True], ids=["patterns", "uniform"])
@pytest.mark.parametrize("group", GROUPS)
def test_logits_of_peft_are_ours(world, group, uniform, tmp_path):
    """Within three times what the bare base differs by; of adapters that move every logit."""
    from peft import PeftModel

    sites = [s for s in world.vlm.sites.values() if re.search(GROUPS[group], s.path) and not s.obstacle]
    assert sites
    adapter = jax.tree.map(lambda leaf: 0.1 * leaf if leaf.ndim > 1 else leaf, draw(sites))
    write_peft(tmp_path, world.vlm, adapter, str(world.folder), uniform=uniform)
    model = PeftModel.from_pretrained(world.open(), tmp_path, autocast_adapter_dtype=False).eval()
    found, wanted = world.answer(model.double()), world.ours(adapter)
    effect = np.abs(wanted - world.ours(None)).max()
    assert effect > 0.05
    # One rank and alpha for all rounds scale into b, in float32.
    assert np.abs(found - wanted).max() <= 3 * max(world.bare, 1e-12) + (1e-6 * max(effect, 1) if uniform else 0)


@pytest.fixture(scope="module")
def florence():
    with jax.enable_x64(True):
        yield make_world("florence2", None)


@pytest.mark.parametrize("name", [name for name in WRITING if name not in REFUSED])
def test_every_method_s_clients_have_peft_s_logits(name, florence, tmp_path):
    """Whatever they are assembled from: two adapters, a small matrix between two factors, a mixture of factors."""
    from peft import PeftModel

    adapter = make_client_adapter(name, florence.vlm, r"language_model/.*layers/(self_attn/q_proj|fc1)|qkv")
    adapter = jax.tree.map(lambda leaf: np.float32(0.3 * leaf if leaf.ndim > 1 else leaf), adapter)
    write_peft(tmp_path, florence.vlm, adapter, str(florence.folder))
    model = PeftModel.from_pretrained(florence.open(), tmp_path, autocast_adapter_dtype=False).eval()
    found, wanted = florence.answer(model.double()), florence.ours(adapter)
    assert np.abs(wanted - florence.ours(None)).max() > 0.05
    assert np.abs(found - wanted).max() <= 3 * max(florence.bare, 1e-12)
