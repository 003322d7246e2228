"""Adapters as PEFT folders and back: bit for bit for every family, and folders that PEFT itself wrote."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from models import causal_cases, clip_cases
from models.cases import CASES, make_batch
from peft_cases import draw
from safetensors.numpy import load_file, save_file

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm, read_vlm
from fedvlm_jax.peft.folder import list_factors, make_uniform, place_factors, read_peft, write_peft
from fedvlm_jax.peft.format import Factors
from fedvlm_jax.utils import tree

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
PEFT = Path(__file__).parent / "golden"
WRITTEN_BY_PEFT = ("layers", "tied")
FAMILIES = (
    "smolvlm",
    "smolvlm-tied",
    "llava",
    "llava_onevision",
    "paligemma2",
    "gemma3",
    "internvl",
    "qwen3-vl",
    "qwen2.5-vl",
)
NO_MODULE = {"gemma3": ("image_projector/linear",), "internvl": ("vision_tower/position_embedding",)}
"""Sites that are no module in transformers."""


def assert_equal(one, two):
    one, two = tree.flatten(one), tree.flatten(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)


@pytest.fixture(scope="module")
def florence():
    return read_vlm(GOLDEN / "windows")


def adaptable(vlm, name=""):
    left_out = NO_MODULE.get(name, ())
    return [
        s for s in vlm.sites.values() if not s.obstacle and s.path not in left_out and "embed_positions" not in s.path
    ]


@pytest.mark.parametrize("name", ["florence2", "clip", *FAMILIES])
def test_every_site_of_a_family_comes_back_bit_for_bit(name, tmp_path):
    if name == "florence2":
        vlm = read_vlm(GOLDEN / "windows")
    else:
        (clip_cases.CASES if name == "clip" else causal_cases.CASES)[name](tmp_path)
        vlm = read_vlm(tmp_path)
    adapter = draw(adaptable(vlm, name))
    modules = list_factors(vlm, adapter)
    back, unread = place_factors(vlm, modules)
    assert_equal(back, adapter)
    assert not unread
    # Every module is one of the checkpoint's, by the name that transformers gives its weight.
    shapes = {path: leaf.shape for path, leaf in tree.flatten(vlm.shapes()).items()}
    named = [vlm.table.find_names(path, shape[0] if shape else 1) for path, shape in shapes.items()]
    weights = {f"{vlm.table.prefix}{name}" for names in named for name, _ in names}
    others = {*vlm.table.lookups, vlm.table.head}
    assert {f"{module}.weight" for module in modules if module not in others} <= weights


@pytest.mark.parametrize("name", NO_MODULE)
def test_what_is_no_module_is_refused(name, tmp_path):
    causal_cases.CASES[name](tmp_path)
    vlm = read_vlm(tmp_path)
    with pytest.raises(UserError, match=r"is a parameter, and no module.*--to merged"):
        list_factors(vlm, draw([vlm.sites[NO_MODULE[name][0]]]))


def test_positions_that_count_themselves_are_refused(florence):
    site = florence.sites["language_model/decoder/embed_positions"]
    with pytest.raises(UserError, match=r"counts positions itself.*--to merged"):
        list_factors(florence, draw([site]))


def test_a_gate_is_refused(florence):
    adapter = draw([florence.sites["image_projector/image_projection"]])
    adapter["image_projector"]["image_projection"]["gate"] = np.zeros((16, 2))
    with pytest.raises(lora.LoraError, match="depends on the token"):
        list_factors(florence, adapter)


def test_layouts_and_names_by_hand(florence):
    """A convolution's, a table's, a stack's."""
    paths = ("vision_tower/convs_1/conv", "image_projector/row_embeddings", "language_model/encoder/layers/fc1")
    adapter = draw([florence.sites[path] for path in paths])
    modules, flat = list_factors(florence, adapter), tree.flatten(adapter)
    conv = modules["model.vision_tower.convs.1.conv"]
    assert conv.a.shape == (2, 8, 3, 3)
    a = flat["vision_tower/convs_1/conv/a"].reshape(3, 3, 8, 2)
    np.testing.assert_array_equal(conv.a[1, 5, 2, 0], a[2, 0, 5, 1])
    assert conv.b.shape == (16, 2, 1, 1)
    rows = modules["model.multi_modal_projector.image_position_embed.row_embeddings"]
    assert rows.table
    np.testing.assert_array_equal(rows.a, flat["image_projector/row_embeddings/a"].T)
    second = modules["model.language_model.encoder.layers.1.fc1"]
    np.testing.assert_array_equal(second.b, flat["language_model/encoder/layers/fc1/b"][1].T)
    assert second.scale == flat["language_model/encoder/layers/fc1/scale"][1]
    assert len(modules) == 4


def test_a_tied_table_is_three_modules(florence):
    adapter = draw([florence.sites["language_model/shared"]])
    modules, site = list_factors(florence, adapter), adapter["language_model"]["shared"]
    assert sorted(modules) == ["lm_head", "model.language_model.decoder.embed_tokens", "model.language_model.shared"]
    np.testing.assert_array_equal(modules["lm_head"].a, site["b"])
    np.testing.assert_array_equal(modules["lm_head"].b, site["a"])
    assert not modules["lm_head"].table
    with pytest.raises(LookupError, match=r"lm_head, which has the same weight, is not"):
        place_factors(florence, {name: pair for name, pair in modules.items() if name != "lm_head"})
    modules["lm_head"] = modules["lm_head"]._replace(scale=9.0)
    with pytest.raises(LookupError, match="unlike factors"):
        place_factors(florence, modules)


def test_lower_ranks_are_trimmed_and_filled_up_again(florence):
    """Of two layers one has a direction less: its module has rank 1, and it comes back as zeros."""
    adapter = draw([florence.sites["language_model/encoder/layers/fc1"]])
    site = adapter["language_model"]["encoder"]["layers"]["fc1"]
    site["a"][1, :, 1], site["b"][1, 1] = 0, 0
    modules = list_factors(florence, adapter)
    assert [pair.a.shape[0] for _, pair in sorted(modules.items())] == [2, 1]
    assert_equal(place_factors(florence, modules)[0], adapter)
    del modules["model.language_model.encoder.layers.1.fc1"]
    half = place_factors(florence, modules)[0]["language_model"]["encoder"]["layers"]["fc1"]
    assert not half["a"][1].any()
    np.testing.assert_array_equal(half["a"][0], site["a"][0])


def test_one_rank_and_alpha_for_all_changes_no_product(florence):
    modules = list_factors(florence, draw(adaptable(florence)))
    name = "model.language_model.encoder.layers.1.fc1"
    modules[name] = Factors(modules[name].a[:1], modules[name].b[:, :1], modules[name].scale)
    even = make_uniform(modules)
    assert {(pair.a.shape[0], pair.scale) for pair in even.values()} == {(2, 1.0)}
    for name, pair in modules.items():
        flat = [x.reshape(len(x), -1) for x in (pair.a, even[name].a)]
        product = pair.scale * pair.b.reshape(len(pair.b), -1) @ flat[0]
        np.testing.assert_allclose(even[name].b.reshape(len(pair.b), -1) @ flat[1], product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_can_be_read_by_everybody(florence, tmp_path, dtype):
    import jax.numpy as jnp

    adapter = draw([florence.sites["language_model/encoder/layers/fc1"]])
    write_peft(tmp_path / "out", florence, adapter, "base", dtype=jnp.dtype(dtype), weights="0f")
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o777 == 0o644
    found = read_peft(tmp_path / "out", florence)
    assert (found.base, found.weights) == ("base", "0f")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), adapter)
    for name in "ab":
        site, wanted = (x["language_model"]["encoder"]["layers"]["fc1"][name] for x in (found.adapter, expected))
        np.testing.assert_array_equal(site, wanted)


@pytest.mark.parametrize("name", WRITTEN_BY_PEFT)
def test_a_folder_that_peft_wrote_gives_its_logits(name):
    """As close as bare logits are (test_golden.py); and the adapter is not lost."""
    vlm, params = load_vlm(GOLDEN / "single")
    found = read_peft(PEFT / name, vlm)
    batch = make_batch("single", vlm.image_tokens(*CASES["single"][2]))
    logits = jax.jit(vlm.logits)
    wanted = np.load(PEFT / name / "logits.npy")
    np.testing.assert_allclose(logits(params, found.adapter, batch), wanted, atol=1e-4)
    assert np.abs(logits(params, None, batch) - wanted).max() > 0.1


@pytest.mark.parametrize("name", WRITTEN_BY_PEFT)
def test_what_peft_wrote_goes_out_under_the_same_names(name, tmp_path):
    vlm = read_vlm(GOLDEN / "single")
    write_peft(tmp_path, vlm, read_peft(PEFT / name, vlm).adapter, "single")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (PEFT / name, tmp_path))
    theirs = {key: tensor for key, tensor in theirs.items() if "base_layer" not in key}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


def copy_golden(folder):
    shutil.copytree(PEFT / "layers", folder)
    return folder


def test_a_folder_of_another_base_is_refused_in_a_line(tmp_path):
    causal_cases.CASES["smolvlm"](tmp_path)
    with pytest.raises(UserError, match="does not fit a model of the family smolvlm: its base is single") as caught:
        read_peft(PEFT / "layers", read_vlm(tmp_path))
    assert "\n" not in str(caught.value)
    assert "; and " in str(caught.value)


def test_another_width_is_refused_with_both_shapes(florence):
    with pytest.raises(UserError, match=r"has factors of \[\d.*this model needs"):
        read_peft(PEFT / "layers", florence)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "so it is no PEFT folder"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "expected an object"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x01" * 30), "no whole safetensors file"),
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, reason):
    folder = copy_golden(tmp_path / "peft")
    damage(folder)
    with pytest.raises(UserError, match=reason):
        read_peft(folder, read_vlm(GOLDEN / "single"))


def test_an_export_or_a_run_is_told_from_a_folder_of_peft_s(tmp_path):
    vlm = read_vlm(GOLDEN / "single")
    copy_golden(tmp_path / "out" / "clients" / "ann")
    with pytest.raises(UserError, match=r"it is no PEFT folder: name one of those in it, such as .*out/clients/ann$"):
        read_peft(tmp_path / "out", vlm)
    (tmp_path / "run" / "adapters").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(UserError, match=r"it is a run's, of which `fedvlm export .*run` makes such folders"):
        read_peft(tmp_path / "run", vlm)


def test_names_that_fit_nothing_are_refused_by_name(tmp_path):
    folder = copy_golden(tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    odd = {key.replace("q_proj", "query"): tensor for key, tensor in tensors.items()}
    save_file(odd, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"self_attn\.query is none of its modules"):
        read_peft(folder, read_vlm(GOLDEN / "single"))


def rename(folder, old, new, kind=np.float32):
    """Add what is called like `old` once more, by another name, or of another type."""
    config = json.loads((folder / "adapter_config.json").read_text()) | {"rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if "q_proj" in key}
    more = {key.replace(old, new): tensor.astype(kind) for key, tensor in tensors.items() if old in key}
    assert more
    save_file(tensors | more, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("base_model.model.model.", "base_model.model."), "is there twice, by two names"),
        (("layers.0.", "layers.00."), r"layers\.00\.\S+ is none of its modules"),
        (("layers.0.", "layers.\u0660."), "is none of its modules"),  # int() would take it
        (("layers.0.", f"layers.{'9' * 900}."), "is none of its modules"),
        (("q_proj", "q_proj", np.int64), "is of type I64, expected one of F64"),
        (("q_proj", "q_proj", ml_dtypes.float8_e4m3fn), "is of type F8_E4M3"),
    ],
)
def test_names_and_types_that_are_not_peft_s_are_refused(tmp_path, words, reason):
    folder = copy_golden(tmp_path / "peft")
    rename(folder, *words)
    with pytest.raises(UserError, match=reason) as caught:
        read_peft(folder, read_vlm(GOLDEN / "single"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_larger_than_any_adapter_is_not_read(tmp_path):
    """A terabyte that takes no place on the disk."""
    folder = copy_golden(tmp_path / "peft")
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, .*: is it a whole model\?"):
        read_peft(folder, read_vlm(GOLDEN / "single"))
