"""Every family against transformers' numbers in a golden file, without PyTorch; make_family_golden.py makes it.

Tolerances are those of the live comparisons, `test_causal_parity.py` and `test_clip_parity.py`, which find other
weights. Florence-2's are in `test_golden.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from models import causal_cases, clip_cases
from models.cases import mean_log_probs, to_labels, to_settings
from models.test_vlm_contract import Case

from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.objectives.config import PreferenceOptions

GOLDEN = Path(__file__).parent / "golden" / "families.npz"
LENGTH = 8
"""Tokens of generated answers."""
CASES = causal_cases.CASES | clip_cases.CASES
ORDINARY, BROAD = ("smolvlm-tied", "clip"), ("llava", "paligemma2", "gemma3", "internvl", "qwen3-vl", "qwen2.5-vl")
"""An architecture each; a case takes some five seconds, so that variants of them are slow."""


def mark(cases):
    """Parameters of a fixture, all but the ordinary ones marked."""
    others = {name: pytest.mark.broad if name in BROAD else pytest.mark.slow for name in cases if name not in ORDINARY}
    return [pytest.param(name, marks=others.get(name, ())) for name in cases]


def open_case(name, folder):
    """Write a case's folder, and open it."""
    causal_cases.write_sharp_model(name, folder, CASES)
    return Case(folder)


def read_golden(name):
    """Arrays of a case, by kind."""
    with np.load(GOLDEN) as golden:
        return {path.partition("/")[2]: golden[path] for path in golden if path.startswith(f"{name}/")}


def find(vlm, params, batch):
    """Logits of the labels, and the loss of supervised fine-tuning."""
    loss, _ = load_objective("sft", PreferenceOptions()).loss(vlm, params, None, batch)
    return vlm.logits(params, None, batch), loss


class Asked(NamedTuple):
    """A case, its labels filled up to `LENGTH`, `find` compiled for others, too, and what transformers finds."""

    case: Case
    labels: np.ndarray
    find: Callable[[np.ndarray], tuple[jax.Array, jax.Array]]
    wanted: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=mark(causal_cases.CASES))
def asked(request, tmp_path_factory):
    case = open_case(request.param, tmp_path_factory.mktemp(request.param))
    features = jax.jit(lambda params, pixels: case.vlm.image_features(params, None, pixels))
    case.batch["image_features"] = features(case.params, case.batch.pop("pixel_values"))
    room = LENGTH - case.labels.shape[1]
    labels = np.pad(case.labels, ((0, 0), (0, room)), constant_values=IGNORED)
    compiled = jax.jit(lambda params, batch: find(case.vlm, params, batch))
    return Asked(
        case, labels, lambda labels: compiled(case.params, {**case.batch, "labels": labels}), read_golden(request.param)
    )


@pytest.fixture(scope="module", params=mark(clip_cases.CASES))
def clip(request, tmp_path_factory):
    return open_case(request.param, tmp_path_factory.mktemp(request.param)), read_golden(request.param)


def test_features_logits_and_loss_are_those_of_transformers(asked):
    wanted, features = asked.wanted, asked.case.batch["image_features"][0]
    np.testing.assert_allclose(features, wanted["features"], rtol=0, atol=2e-6 * np.abs(wanted["features"]).max())
    logits, loss = asked.find(asked.labels)
    np.testing.assert_allclose(logits[asked.labels != IGNORED], wanted["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)


@pytest.mark.parametrize("search", causal_cases.SEARCHES)
def test_answers_are_those_of_transformers(asked, search):
    """Tokens, and of beams their scores, which are computed as losses are."""
    vlm, wanted, settings = asked.case.vlm, asked.wanted, to_settings(causal_cases.SEARCHES[search])
    found = np.asarray(vlm.generate(asked.case.params, None, asked.case.batch, LENGTH, **settings))
    np.testing.assert_array_equal(found, wanted[search])
    if settings["num_beams"] > 1:
        labels = to_labels(found, settings.get("eos_token_ids", vlm.settings().eos_token_ids))
        scores = mean_log_probs(asked.find(labels)[0], labels)
        np.testing.assert_allclose(scores, wanted[f"{search}_scores"], rtol=1e-5)


def test_embeddings_logits_and_classes_are_those_of_transformers(clip):
    """Of CLIP, whose answers are classes."""
    case, wanted = clip
    memory = jax.jit(case.vlm.encode)(case.params, None, case.batch)
    np.testing.assert_allclose(memory["state"], wanted["images"], rtol=0, atol=1e-6)
    texts = clip_cases.embed_texts(case.vlm, case.params, case.processor.prompt_ids)
    np.testing.assert_allclose(texts, wanted["texts"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(memory["logits"], wanted["logits"], rtol=0, atol=1e-5)
    _, loss = find(case.vlm, case.params, {"memory": memory, "labels": case.labels})
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
    chosen = case.vlm.generate(case.params, None, case.batch, 1)[:, 0]
    np.testing.assert_array_equal(chosen, wanted["greedy"])


def test_golden_answers_are_not_degenerate():
    golden = {name: read_golden(name) for name in CASES}
    for name, wanted in golden.items():
        assert wanted["logits"].std() > 0.3, f"{name}: logits that are all alike show nothing"
    causal = [golden[name] for name in causal_cases.CASES]
    for wanted in causal:
        for search in ("beams", "beams_ends"):
            assert len(np.unique(wanted[f"{search}_scores"])) == 3, "answers must depend on picture and question"
    assert len(np.unique([wanted["greedy"] for wanted in causal])) > 100
    ends = causal_cases.SEARCHES["beams_ends"]["eos_token_id"]
    assert np.mean([np.isin(wanted["beams_ends"][:, :-1], ends).any(1) for wanted in causal]) > 0.5, "few answers end"
