"""What holds for the model whatever its weights: adapters, clients at once, batches, refused configurations."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.cases import CASES, make_batch, make_config

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.models.florence2.model import shift_right
from fedvlm_jax.models.layers import place_features

GOLDEN = Path(__file__).parent / "golden"
CLIENTS = 3


@pytest.fixture(scope="module")
def loaded() -> Any:
    vlm, params = load_vlm(GOLDEN / "single")
    batch = make_batch("single", vlm.image_tokens(*CASES["single"][2]))
    features = jax.jit(lambda params, x: vlm.image_features(params, None, x))(params, batch.pop("pixel_values"))
    return vlm, params, {**batch, "image_features": features}


def make_adapter(vlm: Any, targets: str, seed: int = 0) -> Any:
    adapter = lora.init(jax.random.key(seed), vlm.sites, lora.LoRA(rank=2, alpha=2, targets=targets))
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def test_image_features_take_the_places_of_image_tokens_in_order() -> None:
    embedded, features = jnp.zeros((2, 5, 1)), jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    is_image = jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]], bool)
    placed = place_features(embedded, features, is_image)[..., 0]
    np.testing.assert_array_equal(placed, [[1, 2, 3, 0, 0], [0, 4, 0, 5, 6]])


def test_labels_are_shifted_right() -> None:
    np.testing.assert_array_equal(shift_right(jnp.array([[5, 6, -100, -100]]), pad=1, start=2), [[2, 5, 6, 1]])


@pytest.mark.broad
@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_several_answers_to_a_prompt_are_answered_as_one_by_one(loaded: Any, adapted: bool) -> None:
    vlm, params, batch = loaded
    adapter = make_adapter(vlm, "language_model.*(q_proj|v_proj|fc1)|shared") if adapted else None
    answers = np.random.default_rng(3).integers(3, 98, (3, 4, 6)).astype(np.int32)
    for example, answer, length in ((0, 1, 2), (1, 3, 5), (2, 0, 0)):
        answers[example, answer, length:] = -100
    logits = jax.jit(lambda batch: vlm.logits(params, adapter, batch))
    together = logits({**batch, "labels": answers})
    assert together.shape == (3, 4, 6, vlm.config.text_config.vocab_size)
    for number in range(answers.shape[1]):
        alone = logits({**batch, "labels": answers[:, number]})
        np.testing.assert_allclose(together[:, number], alone, atol=2e-5)


def test_several_answers_to_a_prompt_share_the_encoder_and_its_keys(loaded: Any) -> None:
    """With 29 tokens to a prompt, nothing in the program is 29 long once for each of the 15 answers."""
    vlm, params, batch = loaded
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    for name in ("input_ids", "attention_mask"):
        batch[name] = jnp.pad(batch[name], ((0, 0), (0, 29 - batch[name].shape[1])))

    def find_shapes(batch: Any) -> set[tuple[int, ...]]:
        text = jax.jit(lambda params, batch: vlm.logits(params, None, batch)).lower(params, batch).as_text()
        shapes = {tuple(map(int, found.split("x"))) for found in re.findall(r"tensor<([\dx]+)xf32>", text)}
        return {shape for shape in shapes if 29 in shape}

    shared = find_shapes({**batch, "labels": jnp.full((3, 5, 6), 7)})
    assert (3, 29, vlm.config.text_config.d_model) in shared
    assert not [shape for shape in shared if 15 in shape or 5 in shape]
    repeated = {name: jnp.repeat(array, 5, axis=0) for name, array in batch.items()}
    assert [shape for shape in find_shapes(repeated) if 15 in shape], "the search itself finds nothing any more"


def test_sites_are_found_without_weights_and_count_layers() -> None:
    vlm = build(make_config("windows"))
    sites = vlm.sites
    assert sites["language_model/decoder/layers/encoder_attn/out_proj"].stack == (2,)
    assert sites["language_model/decoder/layers/encoder_attn/out_proj"].stack_at == (3,)
    assert sites["vision_tower/blocks_1/channel_block/channel_attn/qkv"].stack == (2,)
    assert sites["vision_tower/convs_0/conv"].inputs == (7, 7, 3)
    assert {"language_model/shared", "image_projector/row_embeddings", "image_projector/image_projection"} <= set(sites)
    assert not any("conv1" in path for path in sites), "depthwise convolutions take no adapter"


@pytest.mark.broad
@pytest.mark.parametrize(
    "targets", ["decoder.*(k|v|q)_proj", pytest.param("encoder/.*fc1|shared", marks=pytest.mark.slow)]
)
def test_adapted_generation_equals_merged_generation(loaded: Any, targets: str) -> None:
    vlm, params, batch = loaded
    adapter = make_adapter(vlm, targets)
    merged = lora.merge(params, adapter)
    logits = jax.jit(vlm.logits)
    np.testing.assert_allclose(logits(params, adapter, batch), logits(merged, None, batch), atol=1e-4)
    adapted = vlm.generate(params, adapter, batch, 7, num_beams=1)
    np.testing.assert_array_equal(adapted, vlm.generate(merged, None, batch, 7, num_beams=1))
    assert (adapted != vlm.generate(params, None, batch, 7, num_beams=1)).any()


def test_an_adapter_in_the_vision_tower_does_not_pass_by_cached_features(loaded: Any) -> None:
    vlm, params, batch = loaded
    adapter = make_adapter(vlm, "vision_tower.*fc1")
    with pytest.raises(lora.LoraError, match="vision_tower"):
        vlm.logits(params, adapter, batch)
    with pytest.raises(lora.LoraError, match="vision_tower"):
        vlm.generate(params, adapter, batch, 3)


@pytest.mark.broad
@pytest.mark.parametrize(
    "targets",
    [
        *(pytest.param(half, marks=pytest.mark.slow) for half in ("encoder/.*fc1", "decoder/.*(q_proj|v_proj)")),
        "(q|v)_proj|shared|fc2",
    ],
)
def test_a_prompt_may_be_encoded_once_for_several_uses(loaded: Any, targets: str) -> None:
    vlm, params, batch = loaded
    adapter = make_adapter(vlm, f"language_model.*({targets})")
    memory = {"memory": vlm.encode(params, adapter, batch), "attention_mask": batch["attention_mask"]}
    labels = {"labels": batch["labels"]}
    np.testing.assert_allclose(
        vlm.logits(params, adapter, memory | labels), vlm.logits(params, adapter, batch), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(vlm.generate(params, adapter, memory, 5), vlm.generate(params, adapter, batch, 5))
    other = vlm.encode(params, None, batch)
    assert np.array_equal(other, memory["memory"]) == targets.startswith("decoder")


@pytest.mark.broad
@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_clients_at_once_generate_as_one_by_one(loaded: Any, beams: int) -> None:
    vlm, params, batch = loaded
    adapters = [make_adapter(vlm, "q_proj|v_proj", seed) for seed in range(CLIENTS)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)

    def generate(adapter: Any) -> Any:
        return vlm.generate(params, adapter, batch, 5, num_beams=beams, eos_token_ids=tuple(range(2, 30)))

    together = jax.vmap(generate)(stacked)
    for index, adapter in enumerate(adapters):
        np.testing.assert_array_equal(together[index], generate(adapter))


def test_no_base_matmul_is_batched_over_clients(loaded: Any) -> None:
    vlm, params, batch = loaded
    adapters = jax.tree.map(lambda x: jnp.stack([x] * CLIENTS), make_adapter(vlm, "language_model.*(q|v)_proj"))
    batches = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * CLIENTS), batch)

    def loss(params: Any, adapter: Any, batch: Any) -> Any:
        return vlm.logits(params, adapter, batch).var()

    step = jax.vmap(jax.value_and_grad(loss, argnums=1), in_axes=(None, 0, 0))
    text = jax.jit(step).lower(params, adapters, batches).as_text()
    products = re.findall(r"dot_general ([^:]*) : \(tensor<([\dx]+)xf32>, tensor<([\dx]+)xf32>\)", text)
    width, hidden = vlm.config.text_config.d_model, vlm.config.text_config.encoder_ffn_dim
    weights = {f"{width}x{width}", f"{width}x{hidden}", f"{hidden}x{width}"}
    assert len([1 for _, *sides in products if weights & set(sides)]) >= 10
    for how, *sides in products:
        bases = {f"{CLIENTS}x{weight}" for weight in weights}
        assert not bases & set(sides), f"a base weight per client: {how} {sides}"


def test_a_row_without_any_token_gives_numbers(loaded: Any) -> None:
    vlm, params, batch = loaded
    logits = jax.jit(vlm.logits)(params, None, {**batch, "attention_mask": np.zeros_like(batch["attention_mask"])})
    assert np.isfinite(logits).all()


def test_ids_outside_the_vocabulary_are_no_nan(loaded: Any) -> None:
    vlm, params, batch = loaded
    ids = np.where(np.arange(batch["input_ids"].shape[1]) == 3, 10_000, batch["input_ids"])
    assert np.isfinite(jax.jit(vlm.logits)(params, None, {**batch, "input_ids": ids})).all()


@pytest.mark.broad
def test_init_fills_the_shapes_with_small_numbers() -> None:
    vlm = build(make_config("single"))
    params = jax.jit(vlm.init)(jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), vlm.shapes()
    )
    kernel = params["language_model"]["encoder"]["layers"]["fc1"]["kernel"]
    assert float(kernel.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("text_config", {"d_model": 12}, "projection_dim=24"),
        ("text_config", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("vision_config", {"depths": (1,)}, "one entry per stage"),
        ("vision_config", {"num_heads": (3, 4)}, "3 heads"),
        ("text_config", {"activation_function": "mish"}, "mish"),
    ],
)
def test_configurations_that_are_refused(where: str, change: dict[str, Any], message: str) -> None:
    config = make_config("windows")
    for name, value in change.items():
        setattr(getattr(config, where), name, value)
    with pytest.raises(UserError, match=message):
        build(config).shapes()


def test_too_much_for_the_positions(loaded: Any) -> None:
    vlm, params, batch = loaded
    with pytest.raises(UserError, match="max_position_embeddings=80"):
        vlm.generate(params, None, batch, 81)
    with pytest.raises(UserError, match="max_position_embeddings=12"):
        jax.eval_shape(lambda p, x: vlm.image_features(p, None, x), params, jnp.zeros((1, 80, 80, 3)))
    with pytest.raises(UserError, match="leaves no features"):
        build(make_config("windows")).image_tokens(0, 0)


def test_generation_options_that_are_not_implemented_are_refused(loaded: Any) -> None:
    from transformers import GenerationConfig

    vlm, params, batch = loaded
    with pytest.raises(UserError, match="temperature"):
        vlm.generate(params, None, batch, 3, temperature=2.0)
    other = build(vlm.config, generation_config=GenerationConfig(repetition_penalty=1.3))
    with pytest.raises(UserError, match=r"repetition_penalty=1\.3"):
        other.generate(params, None, batch, 3)
