"""Several pictures in a prompt, pictures that are cut into tiles, and the turns of conversations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import causal_cases
from PIL import Image

from fedvlm_jax.data.prompts import Prompt, Tiles
from fedvlm_jax.errors import UserError
from fedvlm_jax.models import open_processor
from fedvlm_jax.records.conversations import Turn

TALK = (
    Turn("system", "be brief"),
    Turn("user", "", (None, "what is this?")),
    Turn("assistant", "a car"),
    Turn("user", "", ("or is it", None, "two?")),
)
WHOLE = (Tiles(), Tiles())


def open_case(name, folder, **options):
    causal_cases.CASES[name](folder)
    return open_processor(folder, **options)


def read_prompt(processor, prompt):
    """The text that a prompt's tokens stand for."""
    ids, mask = processor.prompts([prompt])
    assert mask.all()
    return processor.tokenizer.decode(ids[0], skip_special_tokens=False)


EXPECTED = {
    "smolvlm": (
        "<|im_start|>System: be brief<end_of_utterance>\nUser:{0}what is this?<end_of_utterance>\n"
        "Assistant: a car<end_of_utterance>\nUser: or is it{0}two?<end_of_utterance>\nAssistant:",
        "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nbe brief\n\n{0}what is this?<end_of_turn>\n"
        "<start_of_turn>model\na car<end_of_turn>\n<start_of_turn>user\n"
        "or is it{0}two?<end_of_turn>\n<start_of_turn>model\n",
        "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n",
    ),
    "qwen3-vl": (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{0}what is this?<|im_end|>\n"
        "<|im_start|>assistant\na car<|im_end|>\n<|im_start|>user\nor is it{0}two?<|im_end|>\n<|im_start|>assistant\n",
        "<|vision_start|>" + "<|image_pad|>" * 25 + "<|vision_end|>",
    ),
}
EXPECTED["gemma3-narrow"] = EXPECTED["gemma3"]  # its folder has no template, and ours is used
EXPECTED["qwen2.5-vl"] = EXPECTED["qwen3-vl"]


@pytest.mark.parametrize("name", EXPECTED)
def test_turns_are_written_as_the_template_has_them(name, tmp_path):
    processor = open_case(name, tmp_path)
    text, picture = EXPECTED[name]
    assert read_prompt(processor, Prompt("", TALK, WHOLE)) == text.format(picture)


@pytest.mark.parametrize("name", ["smolvlm", "gemma3", "qwen3-vl", "llava", "llava_onevision"])
def test_pictures_stand_before_a_question(name, tmp_path):
    processor = open_case(name, tmp_path)
    one, two = (processor.write(Prompt("why?", pictures=(Tiles(),) * count)) for count in (1, 2))
    picture = processor.write_picture(Tiles())
    head, tail = one.split(picture)
    assert two.startswith(head + picture)
    assert two.endswith(picture + tail)
    assert two.count(picture) == 2


def test_a_text_alone_is_asked_of_one_whole_picture(tmp_path):
    processor = open_case("smolvlm", tmp_path)
    one = Prompt("why?", (Turn("user", "", (None, "why?")),))
    for array, other in zip(processor.prompts(["why?"]), processor.prompts([one]), strict=True):
        np.testing.assert_array_equal(array, other)


def test_prompts_that_no_template_writes_are_refused(tmp_path):
    processor = open_case("gemma3", tmp_path)
    with pytest.raises(UserError, match="roles must alternate"):
        processor.prompts([Prompt("", (Turn("user", "", (None, "a")), Turn("user", "b")))])
    with pytest.raises(UserError, match="the text holds <bos>, which stands for something else"):
        processor.prompts([Prompt("", (*TALK[:2], Turn("assistant", "a <bos>"), TALK[3]), WHOLE)])
    with pytest.raises(UserError, match="the chat template refuses the turns: UndefinedError"):
        processor.prompts([Prompt("", (Turn("system", "", (None, "a")), Turn("user", "b")))])


def test_a_model_of_one_question_is_asked_no_turns(tmp_path):
    processor = open_case("paligemma2", tmp_path)
    assert (processor.most_pictures, processor.reads_turns) == (1, False)
    with pytest.raises(UserError, match="the model takes one question about one picture"):
        processor.prompts([Prompt("", TALK, WHOLE)])


# --- Tiles ---


def test_tiles_are_written_as_transformers_does(tmp_path):
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    processor = open_case("smolvlm", tmp_path, image_tiles=2)
    for tiles in (Tiles(), Tiles(1, 2), Tiles(2, 1), Tiles(2, 2)):
        wanted = get_image_prompt_string(*tiles, 4, "<fake_token_around_image>", "<image>", "<global-img>")
        assert processor.write_picture(tiles) == wanted
        ids, _ = processor.prompts([Prompt("why?", pictures=(tiles,))])
        assert (ids == processor.image_token_id).sum() == 4 * tiles.views


@pytest.fixture(scope="module")
def cutting(tmp_path_factory):
    return open_case("smolvlm", tmp_path_factory.mktemp("tiles"), image_tiles=2)


@given(st.integers(1, 300), st.integers(1, 300))
def test_there_are_as_many_views_as_said(cutting, width, height):
    picture = Image.new("RGB", (width, height))
    assert len(cutting.pixels([picture])) == cutting.cut(height, width).views


def test_tiles_are_those_of_transformers(cutting):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (20, 50, 3), dtype=np.uint8))
    made = cutting.images(  # by the folder's own settings, which are two tiles a side
        [[picture]], do_pad=False, return_row_col_info=True, return_tensors="np"
    )
    tiles = cutting.cut(20, 50)
    assert (made["rows"][0][0], made["cols"][0][0]) == tiles == (1, 2)
    np.testing.assert_array_equal(cutting.pixels([picture]), np.asarray(made["pixel_values"])[0].transpose(0, 2, 3, 1))


def test_tiles_that_cannot_be_are_refused(tmp_path):
    for name, tiles, why in (
        ("smolvlm", 3, "--image-tiles 3: the tokenizer in .* has no token for so many"),
        ("smolvlm", 1000, "cuts pictures into 128 a side at most"),
        ("qwen3-vl", 2, "sees every picture whole: leave --image-tiles out"),
    ):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=why):
            open_case(name, folder, image_tiles=tiles)
