"""Classes as CLIP is asked about them: which answers can be classes, and what is said of those that cannot."""

import json
import shutil

import jax
import numpy as np
import pytest
from models import clip_cases
from PIL import Image

from fedvlm_jax import lora
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.config.run_options import LoraOptions, Run
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.token_arrays import ask_processor
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import load_vlm, open_model, read_vlm
from fedvlm_jax.models.clip import processor as clip_processor

TEMPLATE = "a photo of a {}."


@pytest.fixture(scope="module")
def folder(clip):
    return clip


@pytest.fixture(scope="module")
def processor(folder):
    return open_model(folder)[1]


def test_answers_that_cannot_be_classes_are_left_out(processor):
    answers = ["car", "x" * 60, "a <|endoftext|> b", "Dog", "猫"]
    bound = processor.bind(answers, TEMPLATE)
    assert bound.classes == ("car", "Dog", "猫")
    labels, refused = ask_processor(lambda texts: bound.answers(texts, 4), answers, "answer")
    assert labels.tolist() == [[0], [-100], [-100], [1], [2]]
    assert refused.keys() == {1, 2}
    assert all("it is no class" in reason for reason in refused.values())
    assert bound.decode(np.asarray([[1, 7, 7], [2, -100, 0], [-100, -100, -100]])) == ["Dog", "猫", ""]


def test_a_template_is_text_and_no_format(processor):
    plain, odd = processor.bind(["{0.__class__}"], TEMPLATE), processor.bind(["a"], "{x} %s {}")
    assert processor.tokenise(["a photo of a {0.__class__}."])[0] == plain.prompt_ids[0].tolist()
    assert processor.tokenise(["{x} %s a"])[0] == odd.prompt_ids[0].tolist()


@pytest.mark.parametrize("template", ["", "a photo", "{} or {}"])
def test_a_template_has_one_place_for_the_answer(template):
    with pytest.raises(UserError, match=r"--data\.class-prompt .* once"):
        DataOptions(class_prompt=template)


def test_too_many_classes_or_none_are_refused(processor, monkeypatch):
    monkeypatch.setattr(clip_processor, "MOST_CLASSES", 3)
    with pytest.raises(UserError, match="4 different answers, and CLIP chooses among 3 at most"):
        processor.bind(list("abcd"), TEMPLATE)
    with pytest.raises(UserError, match=r"no class to choose; mend --data\.class-prompt"):
        processor.bind(["a"], "{}" + "x" * 90)


def test_classes_make_another_model_of_the_same_weights(folder):
    vlm, processor = open_model(folder)
    one, two = (vlm.bind(processor, names, TEMPLATE)[0] for names in (["a", "b"], ["a", "c"]))
    assert len({vlm.fingerprint, one.fingerprint, two.fingerprint}) == 3
    assert jax.tree.map(lambda leaf: leaf.shape, one.shapes()) == jax.tree.map(lambda leaf: leaf.shape, vlm.shapes())
    with pytest.raises(UserError, match="does not know temperature"):
        one.generate({}, None, {}, 1, temperature=1.0)
    with pytest.raises(UserError, match="max_tokens=0"):
        one.generate({}, None, {}, 0)


def test_pictures_of_any_shape_become_the_tower_s(processor):
    images = [Image.new(mode, size) for mode, size in (("L", (1, 1)), ("RGBA", (9, 700)), ("P", (50_000, 2)))]
    assert processor.pixels(images).shape == (3, 32, 32, 3)


@pytest.mark.parametrize("name", ["ViT-B/32", pytest.param("ViT-L/14", marks=pytest.mark.broad)])
def test_explain_reads_a_published_shape_from_its_configuration(name, tmp_path, capsys):
    clip_cases.write_published(name, tmp_path)
    main(["explain", "--model", str(tmp_path)])
    told = capsys.readouterr().out
    assert f"{clip_cases.PARAMETERS[name]:,} parameters" in told
    assert "224×224" in told
    assert "chosen among those of the data" in " ".join(told.split())


def change(file, room=None, **values):
    def spoil(folder):
        content = json.loads((folder / file).read_text())
        (content[room] if room else content).update(values)
        (folder / file).write_text(json.dumps(content))

    return spoil


CONFIG, IMAGES = "config.json", "preprocessor_config.json"
SPOILT = {
    "no tower": (change(CONFIG, vision_config=None), r"config\.json has no text_config or no vision_config"),
    "another text model": (
        change(CONFIG, "text_config", model_type="bert"),
        r"bert",
    ),
    "heads": (change(CONFIG, "text_config", num_attention_heads=3), r"hidden size \(16\) is not a multiple"),
    "width": (change(CONFIG, "text_config", hidden_size=0), r"hidden_size"),
    "projection": (change(CONFIG, projection_dim=-1), r"projection_dim is -1"),
    "positions": (change(CONFIG, "text_config", max_position_embeddings=2), r"max_position_embeddings is 2"),
    "epsilon": (change(CONFIG, "text_config", layer_norm_eps=0.0), r"layer_norm_eps is 0\.0"),
    "activation": (change(CONFIG, "text_config", hidden_act="swoosh"), r"activation 'swoosh' is not supported"),
    "end outside": (change(CONFIG, "text_config", eos_token_id=9999), r"eos_token_id is 9999"),
    "another end": (
        change(CONFIG, "text_config", eos_token_id=7),
        r"ends texts with \d+, and .* token 7",
    ),
    "small vocabulary": (change(CONFIG, "text_config", vocab_size=100, eos_token_id=2), r"tokenizer has a token \d+"),
    "pictures of another size": (change(IMAGES, crop_size={"height": 16, "width": 16}), r"32x32 pixels, not 16x16"),
    "no size": (change(IMAGES, crop_size=None, size=None), r"does not say how large pictures are"),
    "a size of words": (change(IMAGES, crop_size={"height": "a", "width": "b"}), r"no size in pixels"),
    "no contrast": (change(IMAGES, image_std=[0, 1, 1]), r"image_std"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_folder_that_cannot_work_is_told_in_one_line(fault, folder, tmp_path):
    spoil, told = SPOILT[fault]
    shutil.copytree(folder, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(UserError, match=told) as caught:
        open_model(tmp_path / "spoilt")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    change(CONFIG, projection_dim=10)(tmp_path / "other")
    with pytest.raises(UserError, match="misshapen: text_projection"):
        load_vlm(tmp_path / "other")
    change(CONFIG, "text_config", num_hidden_layers=3)(tmp_path / "other")
    with pytest.raises(UserError, match=r"missing: text_model\.encoder\.layers\.2"):
        load_vlm(tmp_path / "other")


def test_unread_generation_options_do_not_matter(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sampling")
    (tmp_path / "sampling" / "generation_config.json").write_text('{"do_sample": true}')
    assert read_vlm(tmp_path / "sampling").settings().num_beams == 1


def test_targets_that_reach_both_towers_are_named(folder):
    vlm = read_vlm(folder)
    with pytest.raises(UserError, match=r"say text_model/\.\*\(q_proj\); .* \(vision_tower\|text_model\)/"):
        make_spec(Run(lora=LoraOptions(targets="q_proj")), vlm)
    assert len(lora.select(vlm.sites, make_spec(Run(), vlm).targets)) == 6
