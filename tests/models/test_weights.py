"""Loading is strict, in both directions, and says names."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.cases import make_config
from safetensors.numpy import load_file, save_file

from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm, save_checkpoint
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.utils.tree import flatten

GOLDEN = Path(__file__).parent / "golden"
QUERY = "model.language_model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "single", tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_parameter_is_filled_and_nothing_else() -> None:
    vlm, params = load_vlm(GOLDEN / "single")
    assert jax.tree.structure(params) == jax.tree.structure(vlm.shapes())
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, vlm.shapes())
    assert set(params) == {"vision_tower", "image_projector", "language_model"}
    tensors = load_file(GOLDEN / "single" / "model.safetensors")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(
        tensor.size for name, tensor in tensors.items() if "pos_idx_to_embed" not in name
    )


def test_a_name_and_a_path_determine_each_other() -> None:
    vlm = build(make_config("windows"))
    for path, shape in flatten(vlm.shapes()).items():
        for name, slot in vlm.table.find_names(path, shape.shape[0]):
            assert vlm.table.find_slot(name) == slot
            assert slot.path == path
    assert len({rule.name for rule in vlm.table.rules}) == len(vlm.table.rules)


def test_missing_extra_and_misshapen_tensors_are_all_named(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[QUERY]
        tensors["model.vision_tower.convs.7.conv.bias"] = np.zeros(3, np.float32)
        tensors["model.adapter.down"] = np.zeros((2, 2), np.float32)
        tensors["model.language_model.decoder.layers.0.fc1.weight"] = np.zeros((5, 24), np.float32)
        tensors["model.language_model.shared.weight"] = np.zeros(5, np.float32)

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        load_vlm(folder)
    message = str(caught.value)
    assert f"missing: {QUERY}" in message
    assert "unexpected: model.vision_tower.convs.7.conv.bias" in message
    assert "unexpected: model.adapter.down" in message
    assert "misshapen: model.language_model.decoder.layers.0.fc1.weight is [5, 24]" in message
    assert "[48, 24]" in message
    assert "misshapen: model.language_model.shared.weight" in message


def test_more_layers_than_the_configuration_says_are_unexpected(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[QUERY.replace(".0.", ".1.")] = tensors[QUERY]

    rewrite(folder, change)
    with pytest.raises(UserError, match=r"unexpected: .*layers\.1\.self_attn"):
        load_vlm(folder)


def test_tied_tensors_may_be_there_and_must_agree(folder: Path) -> None:
    _, before = load_vlm(folder)
    head = "lm_head.weight"
    rewrite(folder, lambda t: t.update({head: t["model.language_model.shared.weight"].copy()}))
    _, after = load_vlm(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    rewrite(folder, lambda t: t.update({head: t[head] + 1}))
    with pytest.raises(UserError, match=head):
        load_vlm(folder)


def test_names_without_the_prefix_load_too(folder: Path) -> None:
    _, before = load_vlm(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    _, after = load_vlm(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_sharded_checkpoint(folder: Path) -> None:
    _, before = load_vlm(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, after = load_vlm(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)

    twice = load_file(folder / "model-00002-of-00002.safetensors") | {QUERY: tensors[QUERY]}
    twice = twice | {name: tensors[name] for name in list(weight_map)[:1]}
    save_file(twice, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="twice: "):
        load_vlm(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00001-of-00002"):
        load_vlm(folder)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_saved_loads_again(tmp_path: Path, dtype: Any) -> None:
    vlm, params = load_vlm(GOLDEN / "single")
    save_checkpoint(vlm, params, tmp_path, dtype)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(GOLDEN / "single" / "model.safetensors").keys()
    again, loaded = load_vlm(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(dtype).astype(jnp.float32), b), params, loaded)
    assert again.config.to_dict() == vlm.config.to_dict()


def test_folders_that_are_no_model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_vlm(tmp_path)
    with pytest.raises(UserError, match="florence2-nano"):
        load_vlm("no-such-model")
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"owner/model.*no route to host"):
        load_vlm("owner/model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_vlm(folder)
    (folder / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(UserError, match="blip-2"):
        load_vlm(folder)
    (folder / "config.json").write_text('{"model_type": "florence2", "auto_map": {}}')
    with pytest.raises(UserError, match="is it cut short"):
        load_vlm(folder)
