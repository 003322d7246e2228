"""CLIP live, against transformers + PyTorch: `pytest -m parity` with the extra `parity`."""

import copy
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import clip_cases
from PIL import Image

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_weights, open_model, save_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]
TEMPLATE = "a photo of a {}."


def make_model(folder, seed=0):
    """A random model of a folder's configuration, written into it; its logits lie in about ±10."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    generator = torch.Generator().manual_seed(seed)
    model = CLIPModel(CLIPConfig.from_pretrained(folder)).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                continue
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=clip_cases.CASES)
def case(request, tmp_path_factory):
    """Folder, reference, bound model, weights, processor, and pixels of three pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    clip_cases.CASES[request.param](folder)
    reference = make_model(folder)
    vlm, processor = open_model(folder)
    vlm, processor = vlm.bind(processor, clip_cases.CLASSES, TEMPLATE)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 40 + 100 * n, (20, 30 + n, 3), dtype=np.uint8)) for n in range(3)]
    return folder, reference, vlm, load_weights(vlm, folder), processor, images


def ask(reference, pixels, ids, mask):
    import torch

    with torch.no_grad():
        return reference(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
            pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2),
        )  # fmt: skip


def test_embeddings_and_logits_are_those_of_transformers(case):
    from transformers import CLIPProcessor

    folder, reference, vlm, params, processor, images = case
    made = CLIPProcessor.from_pretrained(folder, backend="pil")(
        text=[TEMPLATE.replace("{}", name) for name in vlm.classes], images=images, padding=True, return_tensors="np"
    )
    np.testing.assert_allclose(processor.pixels(images), made["pixel_values"].transpose(0, 2, 3, 1), atol=1e-6)
    theirs = ask(reference, processor.pixels(images), made["input_ids"], made["attention_mask"])
    memory = jax.jit(vlm.encode)(params, None, {"pixel_values": processor.pixels(images)})
    wanted = theirs.logits_per_image.numpy()
    assert min(wanted.std(0).min(), wanted.std(1).min()) > 0.3, "logits that are all alike show nothing"
    np.testing.assert_allclose(memory["logits"], wanted, atol=1e-5)
    np.testing.assert_allclose(memory["state"], theirs.image_embeds.numpy(), atol=1e-6)
    texts = clip_cases.embed_texts(vlm, params, processor.prompt_ids)
    np.testing.assert_allclose(texts, theirs.text_embeds.numpy(), atol=1e-6)
    answers = vlm.generate(params, None, {"pixel_values": processor.pixels(images)}, 1)[:, 0]
    np.testing.assert_array_equal(answers, wanted.argmax(-1))


def test_a_text_is_known_by_the_token_that_ends_it(case):
    """Rows whose end stands anywhere, twice, and before what is padded, as transformers reads them; in float64."""
    _, reference, vlm, params, processor, images = case
    rng = np.random.default_rng(1)
    largest = vlm.config.text_config.vocab_size - 1
    ids = rng.integers(0, largest, (5, 9))
    for row, place in enumerate((8, 4, 2, 6, 5)):
        ids[row, place] = largest
    ids[2, 5] = ids[4, 8] = largest
    module = clip_cases.open_module(vlm, jnp.float64)
    pixels = processor.pixels(images).astype(np.float64)
    with jax.enable_x64(True):
        exact = {"params": jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)}
        found = module.apply(exact, {"pixel_values": pixels}, jnp.asarray(ids), method="compare")["logits"]
    theirs = ask(copy.deepcopy(reference).double(), pixels, ids, np.ones_like(ids)).logits_per_image
    np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=1e-6)


def test_transformers_loads_what_is_saved(case, tmp_path):
    from transformers import CLIPModel

    _, reference, vlm, params, *_ = case
    save_checkpoint(vlm, params, tmp_path)
    again, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = reference.state_dict()
    assert all((value == wanted[name]).all() for name, value in again.state_dict().items())
    assert again.config.to_dict().items() >= {"model_type": "clip", "projection_dim": 12}.items()


def test_files_of_the_hub_hold_the_numbers_of_positions(case, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder, _, vlm, params, *_ = case
    shutil.copytree(folder, tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(file)
    for name, count in (("text_model", 40), ("vision_model", 17)):
        tensors[f"{name}.embeddings.position_ids"] = torch.arange(count)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_weights(vlm, tmp_path / "hub"), params)
    tensors["text_model.embeddings.position_ids"] = torch.arange(40).flip(0)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not as the model has it.*position_ids"):
        load_weights(vlm, tmp_path / "hub")


def test_bfloat16_is_as_close_as_that_of_pytorch(case):
    import torch

    from fedvlm_jax.models import read_vlm

    folder, reference, vlm, params, processor, images = case
    narrow, _ = read_vlm(folder, compute_dtype=jnp.bfloat16).bind(processor, clip_cases.CLASSES, TEMPLATE)
    pixels, ids = processor.pixels(images), processor.prompt_ids
    exact = np.asarray(vlm.encode(params, None, {"pixel_values": pixels})["logits"])
    ours = jax.jit(narrow.encode)(params, None, {"pixel_values": pixels})["logits"]
    try:
        with torch.no_grad():
            theirs = reference.to(torch.bfloat16)(
                input_ids=torch.tensor(ids).long(), pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2).bfloat16()
            ).logits_per_image.float().numpy()  # fmt: skip
    finally:
        reference.to(torch.float32)

    def distance(found):
        return float(np.sqrt(np.mean((np.asarray(found, np.float32) - exact) ** 2)))

    print(f"bfloat16: ours {distance(ours):.3g}, PyTorch's {distance(theirs):.3g}")  # noqa: T201
    assert 0 < distance(ours) <= 1.6 * distance(theirs)


@pytest.mark.parametrize("name", clip_cases.PARAMETERS)
def test_published_shapes_have_as_many_parameters(name, tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPModel

    from fedvlm_jax.models import read_vlm

    clip_cases.write_published(name, tmp_path)
    with torch.device("meta"):
        theirs = sum(p.numel() for p in CLIPModel(CLIPConfig.from_pretrained(tmp_path)).parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(read_vlm(tmp_path).shapes())) == theirs
