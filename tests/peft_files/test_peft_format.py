"""PEFT's files by hand: keys, patterns, scales, and what is refused."""

import time

import numpy as np
import pytest

from fedvlm_jax.errors import UserError
from fedvlm_jax.peft.format import Factors, pack, unpack

PAIR = Factors(np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((3, 2), np.float32), 2.0)
KEY = "base_model.model.decoder.fc1.lora_A.weight"


def packed(**changes):
    config, tensors = pack({"decoder.fc1": PAIR}, "base")
    return {**config, **changes}, tensors


def test_most_common_rank_and_alpha_stand_for_all_and_others_in_patterns():
    small = Factors(np.ones((1, 4), np.float32), np.ones((3, 1), np.float32), 0.75)
    table = Factors(np.ones((2, 9), np.float32), np.ones((4, 2), np.float32), 2.0, table=True)
    config, tensors = pack({"a.q": PAIR, "a.k": small, "a.embed": table}, "owner/base")
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"a\.k": 1}
    assert config["alpha_pattern"] == {r"a\.k": 0.75}
    assert config["target_modules"] == ["a.embed", "a.k", "a.q"]
    assert config["base_model_name_or_path"] == "owner/base"
    assert not config["use_rslora"]
    assert {key.removeprefix("base_model.model.") for key in tensors} == {
        "a.q.lora_A.weight", "a.q.lora_B.weight", "a.k.lora_A.weight", "a.k.lora_B.weight",
        "a.embed.lora_embedding_A", "a.embed.lora_embedding_B",
    }  # fmt: skip
    back = unpack(config, tensors, "folder")
    for name, pair in (("a.q", PAIR), ("a.k", small), ("a.embed", table)):
        np.testing.assert_array_equal(back[name].a, pair.a)
        np.testing.assert_array_equal(back[name].b, pair.b)
        assert (back[name].scale, back[name].table) == (pair.scale, pair.table)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"alpha_pattern": {r"decoder\.fc1": 5}}, 2.5),  # as our own files have it
        ({"alpha_pattern": {r"ecoder\.fc1": 5, r"fc1\b": 6}}, 3.0),  # no whole part; the end
        ({"alpha_pattern": {"f{1,2}c1": 5}}, 2.5),
        ({"alpha_pattern": {"fc1": 5}}, 2.5),  # the end of the name, after a dot
        ({"alpha_pattern": {"c1": 5, "decoder.*": 6}}, 3.0),  # `c1` is no whole part
        ({"alpha_pattern": {r"(en|de)coder\.fc[12]": 7, "fc1": 1}}, 3.5),  # the first that fits
        ({"alpha_pattern": None, "rank_pattern": None, "use_rslora": None}, 2.0),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "inference_mode": False}, 2.0),
    ],
)
def test_scales_are_those_of_peft(changes, scale):
    assert unpack(*packed(**changes), "folder")["decoder.fc1"].scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "PEFT folder of IA3"),
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "whole modules were trained beside"),
        ({"bias": "all"}, "trained biases too"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"some_day": {"x": 1}}, "not known here"),
        ({"r": 3}, "says rank 3"),
        ({"r": "2"}, "r=2, expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"rank_pattern": ["fc1"]}, "expected an object"),
        ({"rank_pattern": {"fc1": 0}}, "says rank 0"),
        ({"alpha_pattern": {"fc1": "x"}}, "expected a number"),
        ({"alpha_pattern": {"(": 1}}, "cannot be used"),
        ({"alpha_pattern": {"(?R)": 1}}, "cannot be used"),  # calls itself, until no memory is left
        ({"alpha_pattern": {"((a{50}){50}){50}": 1}}, "longer than names of modules ask"),  # 20 GB with 1000s
        ({"alpha_pattern": {"(?:fc1){e<=3}": 1}}, "longer than names of modules ask"),
        ({"rank_pattern": {"(" * 600 + ")" * 600: 1}}, "longer than names of modules ask"),
    ],
)
def test_what_is_no_plain_lora_is_refused_in_a_line(changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        unpack(*packed(**changes), "folder")
    assert "\n" not in str(caught.value)


def test_an_expression_that_takes_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr("fedvlm_jax.peft.patterns.SECONDS", 0.05)
    config, tensors = packed(alpha_pattern={"(a|aa)+b": 1})
    slow = {key.replace("decoder", f"x.{'a' * 60}"): tensor for key, tensor in tensors.items()}
    with pytest.raises(UserError, match="cannot be used: it takes too long"):
        unpack(config, slow, "folder")


def test_many_patterns_take_no_time():
    """A rank for each of a large model's modules: expressions are made once."""
    names = [f"layers.{layer}.{kind}" for layer in range(40) for kind in ("q", "k", "v", "o", "up", "down", "gate")]
    for pattern in (lambda name: name.replace(".", r"\."), lambda name: f"^{name}$"):
        config, tensors = packed(alpha_pattern={pattern(name): number + 1 for number, name in enumerate(names)})
        a, b = tensors.values()
        many = {f"{name}.lora_{side}.weight": pair for name in names for side, pair in (("A", a), ("B", b))}
        began = time.monotonic()
        found = unpack(config, many, "folder")
        assert time.monotonic() - began < 10
        assert [found[name].scale for name in names] == [(number + 1) / 2 for number in range(len(names))]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no factors at all"),
        ({KEY: PAIR.a}, "but one of its two factors"),
        ({KEY: PAIR.a, KEY.replace("_A", "_B"): np.ones((3, 1), np.float32)}, "says rank 2"),
        ({KEY: PAIR.a, KEY.removesuffix(".weight"): PAIR.a}, "holds A of decoder.fc1 twice, by two names"),
        ({KEY: PAIR.a, KEY.removeprefix("base_model.model."): PAIR.a}, "twice, by two names"),
        ({KEY: PAIR.a[:0], KEY.replace("_A", "_B"): PAIR.b[:, :0]}, "says rank 2"),
        ({KEY: PAIR.a.astype(np.float64) * 1e300, KEY.replace("_A", "_B"): PAIR.b}, "not finite"),
        ({"x" * 5000 + KEY: PAIR.a}, "expected names as"),
        ({KEY: PAIR.a * np.nan, KEY.replace("_A", "_B"): PAIR.b}, "not finite"),
        ({"base_model.model.decoder.fc1.lora_magnitude_vector": PAIR.a}, "DoRA"),
        ({"base_model.model.head\x1b[31m.weight": PAIR.a}, r"head\\x1b\[31m"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(tensors, reason):
    with pytest.raises(UserError, match=reason):
        unpack(packed()[0], tensors, "folder")
