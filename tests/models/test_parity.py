"""Live, against transformers + PyTorch in the same process: `pytest -m parity` with the extra `parity`."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from models.cases import CASES, MAX_TOKENS, OPTIONS, make_batch, make_config, to_settings

from fedvlm_jax.models import load_vlm, save_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [11, 12])
def test_a_fresh_random_model_agrees(tmp_path: Path, name: str, seed: int) -> None:
    from models import reference

    model = reference.make_model(make_config(name), seed)
    model.save_pretrained(tmp_path)
    vlm, params = load_vlm(tmp_path)
    batch = make_batch(name, vlm.image_tokens(*CASES[name][2]))
    expected = reference.answer(model, batch)
    logits = jax.jit(lambda params, batch: vlm.logits(params, None, batch))(params, batch)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    for option in ("greedy", "greedy_ends", "beams_early", "beams_never"):
        tokens = vlm.generate(params, None, batch, MAX_TOKENS, **to_settings(OPTIONS[option]))
        np.testing.assert_array_equal(tokens, expected[f"tokens/{option}"], err_msg=option)


def test_transformers_loads_what_we_save(tmp_path: Path) -> None:
    import torch
    from models import reference
    from transformers import Florence2ForConditionalGeneration

    model = reference.make_model(make_config("odd"), 5)
    model.save_pretrained(tmp_path / "theirs")
    vlm, params = load_vlm(tmp_path / "theirs")
    save_checkpoint(vlm, params, tmp_path / "ours")
    again, info = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = reference.to_torch(make_batch("odd", vlm.image_tokens(*CASES["odd"][2])))
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_base_size(tmp_path: Path) -> None:
    """231 M parameters, random weights, one picture of 768x768."""
    import torch
    from models import reference
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    text = {
        "model_type": "bart",
        "vocab_size": 51290,
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024,
    }
    config = Florence2Config(vision_config={"projection_dim": 768}, text_config=text, image_token_id=51289)
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(231.4e6, rel=2e-3)
    model.save_pretrained(tmp_path)
    vlm, params = load_vlm(tmp_path)
    assert vlm.image_tokens(768, 768) == 577
    random = np.random.default_rng(0)
    ids = random.integers(3, 50000, (1, 577 + 12)).astype(np.int32)
    ids[:, :577] = 51289
    batch = {
        "pixel_values": random.standard_normal((1, 768, 768, 3)).astype(np.float32),
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": random.integers(3, 50000, (1, 8)).astype(np.int32),
    }
    inputs = reference.to_torch(batch)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output.numpy()
        expected = model(**inputs).logits.numpy()
        tokens = model.generate(
            **{k: v for k, v in inputs.items() if k != "labels"},
            max_new_tokens=6,
            min_new_tokens=5,
            num_beams=1,
            do_sample=False,
        )
    del model
    ours = jax.jit(lambda p, x: vlm.image_features(p, None, x))(params, batch["pixel_values"])
    logits = jax.jit(lambda p, b: vlm.logits(p, None, b))(params, batch)
    print(f"features {np.abs(ours - features).max():.2e}, logits {np.abs(logits - expected).max():.2e}")  # noqa: T201
    np.testing.assert_allclose(ours, features, atol=1e-3)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(vlm.generate(params, None, batch, 6, min_new_tokens=5, num_beams=1), tokens[:, 1:])
