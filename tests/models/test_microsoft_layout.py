"""Florence-2's folders as Microsoft published them are the same models, and their code is not run."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from models.microsoft_folder import VOCABULARY, make_tensors, write_config
from models.pickles import write_pickle
from safetensors.numpy import load_file, save_file

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm, open_processor, read_vlm, save_checkpoint

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("microsoft")
    write_config(GOLDEN / "windows", folder)
    write_pickle(folder / "pytorch_model.bin", make_tensors(GOLDEN / "windows"))
    (folder / "configuration_florence2.py").write_text("raise RuntimeError('this is run')")
    return folder


def split(params):
    """The token table, and all other parameters."""
    table = params["language_model"]["shared"]["embedding"]
    return table, {**params, "language_model": {**params["language_model"], "shared": {}}}


def test_the_same_weights_are_loaded_as_in_transformers_layout(folder):
    vlm, params = load_vlm(folder)
    theirs, wanted = load_vlm(GOLDEN / "windows")
    (table, others), (small, wanted) = split(params), split(wanted)
    jax.tree.map(np.testing.assert_array_equal, others, wanted)
    np.testing.assert_array_equal(table[: len(small)], small)
    assert (len(table), vlm.vocabulary, vlm.image_token_id) == (VOCABULARY, VOCABULARY, 50264)
    assert vlm.config.vision_config.to_dict() == theirs.config.vision_config.to_dict() | {"drop_path_rate": 0.1}


def test_what_is_saved_of_it_is_as_transformers_has_it(folder, tmp_path):
    vlm, params = load_vlm(folder)
    save_checkpoint(vlm, params, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(GOLDEN / "windows/model.safetensors").keys()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_vlm(tmp_path)[1], params)


def test_safetensors_and_a_single_copy_of_the_table_are_as_good(folder, tmp_path):
    tensors = make_tensors(GOLDEN / "windows")
    for copy in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        del tensors[f"language_model.{copy}.weight"]
    write_config(GOLDEN / "windows", tmp_path)
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_vlm(tmp_path)[1], load_vlm(folder)[1])


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "vision_config",
            "image_feature_source",
            ["last_frame"],
            r"image_feature_source=\['last_frame'\] is not supported",
        ),
        ("vision_config", "image_pos_embed", {"type": "sine"}, r"image_pos_embed\.type='sine' is not supported"),
        ("vision_config", "image_pos_embed", None, r"image_pos_embed is None, expected an object"),
        ("vision_config", "visual_temporal_embedding", {"type": "LEARNED"}, "visual_temporal_embedding.type='LEARNED'"),
        ("vision_config", "dim_embed", None, "no configuration that transformers reads"),
        ("text_config", "vocab_size", 99, "vocab_size=99 has no token 50264, <mask>"),
        ("text_config", "vocab_size", "many", "vocab_size='many' has no token"),
    ],
)
def test_what_is_built_otherwise_is_named(tmp_path, part, name, value, message):
    write_config(GOLDEN / "windows", tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values[part][name] = value
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_vlm(tmp_path)


def test_a_wrong_tensor_is_named(folder, tmp_path):
    write_config(GOLDEN / "windows", tmp_path)
    tensors = make_tensors(GOLDEN / "windows")
    tensors["image_projection"] = tensors["image_projection"].T
    tensors["vision_tower.norms.weight"] = tensors.pop("image_proj_norm.weight")
    write_pickle(tmp_path / "pytorch_model.bin", tensors)
    with pytest.raises(
        UserError, match=r"(?s)image_projection is \[24, 16\].*(unexpected|missing).*(unexpected|missing)"
    ):
        load_vlm(tmp_path)


def write_processor(folder):
    """BART's tokenizer with few merges, as the hub has it: no token of Florence-2's is in it."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "ca", "cat"])
    }
    vocabulary |= {f"madeupword{number}": number for number in range(len(vocabulary), 50264)} | {"<mask>": 50264}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    images = {
        "auto_map": {"AutoProcessor": "processing_florence2.Florence2Processor"}, "do_center_crop": False,
        "image_processor_type": "CLIPImageProcessor", "image_seq_length": 9, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
        "size": {"height": 40, "width": 52}, "crop_size": {"height": 40, "width": 52},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def test_its_tokenizer_gets_the_tokens_that_its_code_would_add(tmp_path):
    write_config(GOLDEN / "windows", tmp_path)
    write_processor(tmp_path)
    processor = open_processor(tmp_path)
    assert (processor.image_token_id, processor.largest_id, processor.eos_token_id) == (50264, VOCABULARY - 1, 2)
    labels = processor.answers(["cat<loc_0><loc_999>", "<od><and>"], 9)
    assert labels[0, -3:].tolist() == [50269, 51268, 2]
    assert labels[1, :4].tolist() == [0, 50265, 51288, 2]
    assert processor.decode(labels) == ["cat<loc_0><loc_999>", "<od><and>"]
    ids, _ = processor.prompts(["cat"])
    assert ids[0, :10].tolist() == [50264] * 9 + [0]
    with pytest.raises(UserError, match="the text holds <mask>"):
        processor.prompts(["a <mask>"])


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_transformers_answers_alike_with_what_is_saved(folder, tmp_path):
    import torch
    from models.cases import IMAGE_TOKEN, make_batch
    from models.reference import to_torch
    from transformers import Florence2ForConditionalGeneration

    vlm, params = load_vlm(folder)
    save_checkpoint(vlm, params, tmp_path)
    theirs, info = Florence2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = make_batch("windows", vlm.image_tokens(40, 52))
    batch["input_ids"] = np.where(batch["input_ids"] == IMAGE_TOKEN, vlm.image_token_id, batch["input_ids"])
    with torch.no_grad():
        wanted = theirs.eval()(**to_torch(batch)).logits.numpy()
    assert np.abs(wanted).max() > 3, "logits that are all alike show nothing"
    np.testing.assert_allclose(jax.jit(vlm.logits)(params, None, batch), wanted, atol=1e-4)
