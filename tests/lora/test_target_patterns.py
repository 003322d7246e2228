"""Targets that match nothing are found among those that do, by name."""

import re

import pytest

from fedvlm_jax import lora
from fedvlm_jax.lora.target_patterns import find_dead_targets, split_alternatives

PATHS = (
    "vision_tower/convs_0/conv", "language_model/encoder/layers/self_attn/q_proj",
    "language_model/encoder/layers/self_attn/k_proj", "language_model/encoder/layers/self_attn/out_proj",
    "language_model/decoder/layers/self_attn/v_proj", "language_model/decoder/layers/fc2",
)  # fmt: skip
SITES = {path: lora.Site(path, "dense", (), (), (4,), (4,)) for path in PATHS}
NOTEBOOK = "q_proj|o_proj|k_proj|v_proj|linear|Conv2d|lm_head|fc2"
"""As in the notebooks that fine-tune Florence-2, joined."""


@pytest.mark.parametrize(
    ("targets", "dead"),
    [
        (NOTEBOOK, ["o_proj", "linear", "Conv2d", "lm_head"]),
        (NOTEBOOK.split("|"), ["o_proj", "linear", "Conv2d", "lm_head"]),
        ("q_proj|k_proj", []),
        ("q_proj", []),
        ("o_proj", ["o_proj"]),
        ("(q|o|out)_proj", ["o"]),
        (r"language_model/.*(encoder|middle|decoder)/.*(q_proj|fc9|fc2)$", ["middle", "fc9"]),
        ("(?:q_proj|fc9)", ["fc9"]),
        ("(?P<which>fc9|fc2)/kernel", ["fc9"]),
        ("(?i:Q_PROJ|FC9)", ["FC9"]),
        ("q_proj|decoder/(layers|blocks)/(fc1|fc2)", ["blocks", "fc1"]),
        ("q_proj|decoder/layers/(fc8|fc9)", ["decoder/layers/(fc8|fc9)"]),
        (r"fc[|(]?2|q_proj", []),
        (r"fc2\||q_proj", [r"fc2\|"]),
        (r"fc[]|]|fc2", ["fc[]|]"]),
        (r"fc[^]|]|fc9", ["fc9"]),
        ("fc(1|9)?", []),
        ("(fc1|fc2)+$", []),
        ("(x(fc1|fc2))?fc2", []),
        (r"(?!fc1|fc9)fc\d", []),
        ("(?<=a|b)_proj", ["(?<=a|b)_proj"]),
        ("q_proj|", []),
        ("(?i)FC1|FC2", ["FC1"]),
        ("(?i)(FC1|FC2)|Q_PROJ", ["FC1"]),
        ("(?i)(?s)FC2|Q_PROJ", []),
        ("(?x) fc2 | fc9", [" fc9"]),
        ("(?x) fc2 | q_proj  # not fc8|fc9", []),
        ("(?x) fc2  # (or\n | q_proj", []),
    ],
)
def test_dead_alternatives(targets, dead):
    assert find_dead_targets(SITES, targets) == dead


@pytest.mark.parametrize("pattern", [NOTEBOOK, "(a|(b|c)d)|e", "(?:a|b)[c|d](e|f)"])
def test_alternatives_are_expressions(pattern):
    for start, end, alone in split_alternatives(pattern):
        re.compile(alone)
        assert "|" not in pattern[start:end] or "(" in pattern[start:end]


def test_nothing_at_all_is_an_error_and_not_a_list():
    with pytest.raises(lora.LoraError, match="no site matches"):
        lora.select(SITES, "o_proj|lm_head")


def test_what_is_no_expression_is_told():
    with pytest.raises(lora.LoraError, match="not a regular expression"):
        find_dead_targets(SITES, "q_proj|(")
