"""What every family of models owes the rest of the package: inherited by adding a case."""

import re
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import causal_cases, clip_cases
from models.cases import to_labels
from PIL import Image

from fedvlm_jax import lora
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.evaluator import GREEDY
from fedvlm_jax.models import load_weights, open_model, read_size, save_checkpoint
from fedvlm_jax.utils import tree

# What they share takes a minute to compile for each, so one decoder-only model is in the ordinary suite, and in the
# broad one that which is least like it, and CLIP. What a family alone decides, and takes seconds, is broad for more of
# them. Comparisons with transformers, kept (`test_family_golden.py`) and live, cover every case.
NAMES = ["florence2", "toy_decoder", *causal_cases.CASES, *clip_cases.CASES]
ORDINARY, BROAD = ("florence2", "smolvlm-tied"), ("qwen3-vl", "clip")
DESCRIBED = (*BROAD, "gemma3", "llava")
QUESTIONS, ANSWERS = ["what is this?", "a", "is it a red car, or two?"], ["a car", "no", "yes it is one"]


class Case:
    """A tiny model of a family with random weights, and a batch of three rows."""

    def __init__(self, folder, dtype=jnp.float32):
        self.folder = folder
        self.opened, self.processor = open_model(folder, compute_dtype=dtype)
        self.vlm = self.opened
        if self.opened.bind is not None:
            self.vlm, self.processor = self.opened.bind(self.processor, ANSWERS, "a photo of a {}.")
        self.params = load_weights(self.vlm, folder, dtype=dtype)
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in QUESTIONS]
        ids, mask = self.processor.prompts(QUESTIONS)
        self.batch = {"pixel_values": self.processor.pixels(images), "input_ids": ids, "attention_mask": mask}
        self.labels = self.processor.answers(ANSWERS, 8)

    @property
    def chooses(self):
        """Does it choose among classes, so that an answer is one token, which nothing comes before or ends?"""
        return bool(self.vlm.classes)

    def adapt(self, targets, seed=1):
        """An adapter whose every factor is drawn."""
        fresh = lora.init(jax.random.key(0), self.vlm.sites, lora.LoRA(rank=2, alpha=2, targets=targets))
        leaves, structure = jax.tree.flatten(fresh)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    def logits(self, adapter=None, **changes):
        batch = {**self.batch, "labels": self.labels, **changes}
        return jax.jit(self.vlm.logits)(self.params, adapter, batch)


@pytest.fixture(scope="module")
def make(request, tmp_path_factory):
    """Name -> its case, made once."""
    homes = {"florence2": "model", "toy_decoder": "toy_decoder"}

    @cache
    def make(name):
        if name in homes:
            return Case(request.getfixturevalue(homes[name]))
        folder = tmp_path_factory.mktemp(name)
        cases = causal_cases.CASES if name in causal_cases.CASES else clip_cases.CASES
        causal_cases.write_model(name, folder, cases=cases)
        return Case(folder)

    return make


def mark(broad):
    rest = [name for name in NAMES if name not in ORDINARY]
    marked = [pytest.param(name, marks=pytest.mark.broad if name in broad else pytest.mark.slow) for name in rest]
    return [*ORDINARY, *marked]


@pytest.fixture(scope="module", params=mark(BROAD))
def case(request, make):
    return make(request.param)


@pytest.fixture(scope="module", params=mark(DESCRIBED))
def described(request, make):
    return make(request.param)


def assert_close(found, wanted, atol=2e-5):
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=atol), found, wanted)


def test_shapes_are_those_of_the_contract(described):
    vlm, tokens = described.vlm, described.processor.image_tokens
    features = jax.eval_shape(vlm.image_features, described.params, None, described.batch["pixel_values"])
    assert features.shape == (3, tokens, vlm.image_width)
    assert read_size(described.folder) == described.processor.size
    memory = jax.eval_shape(vlm.encode, described.params, None, described.batch)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(memory)} == {3}
    states, logits = jax.eval_shape(vlm.states, described.params, None, described.batch | {"labels": described.labels})
    assert states.shape[:-1] == described.labels.shape
    assert (logits.shape, logits.dtype) == ((*described.labels.shape, vlm.vocabulary), jnp.float32)
    shapes = tree.flatten(vlm.shapes())
    assert {path: leaf.shape for path, leaf in tree.flatten(described.params).items()} == {
        path: leaf.shape for path, leaf in shapes.items()
    }
    jax.eval_shape(vlm.states, vlm.shapes(), None, vlm.example_batch())


def test_features_in_the_place_of_pixels_are_the_same(case):
    features = case.vlm.image_features(case.params, None, case.batch["pixel_values"])
    batch = {name: value for name, value in case.batch.items() if name != "pixel_values"}
    found = case.vlm.logits(case.params, None, batch | {"image_features": features, "labels": case.labels})
    assert_close(found, case.logits())
    others = np.flip(case.batch["pixel_values"], 0)
    assert np.abs(case.logits(pixel_values=others) - case.logits())[0].max() > 1e-4, "pictures are not looked at"


@pytest.mark.parametrize("targets", [pytest.param("default", marks=pytest.mark.broad), ".*"])
def test_a_memory_in_the_place_of_a_prompt_is_the_same(case, targets):
    """In float64: adapters everywhere make so much of float32's rounding that another processor's is too far off.

    Tables of rotary positions stay float32, so a millionth of difference is left.
    """
    with jax.enable_x64(True):
        exact = Case(case.folder, jnp.float64)
        adapter = exact.adapt(exact.vlm.targets if targets == "default" else targets)
        memory = exact.vlm.encode(exact.params, adapter, exact.batch)
        prompt = {"memory": memory, "attention_mask": exact.batch["attention_mask"]}
        found, wanted = (
            exact.vlm.logits(exact.params, adapter, {**prompt, "labels": exact.labels}),
            exact.logits(adapter),
        )
        given = [exact.vlm.generate(exact.params, adapter, batch, 5, **GREEDY) for batch in (prompt, exact.batch)]
    assert wanted.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(*given)


def test_several_answers_are_answered_as_one_by_one(case):
    several = np.stack([case.labels, np.roll(case.labels, 1, 0), np.full_like(case.labels, -100)], 1)
    found = case.logits(labels=several)
    for number in range(2):
        assert_close(found[:, number], case.logits(labels=several[:, number]))


def test_an_answer_s_tokens_are_predicted_from_those_before_them(case):
    if case.chooses:
        pytest.skip("an answer is one token")
    other = case.labels.copy()
    other[:, 2] = case.vlm.vocabulary - 2
    found, changed = case.logits(), case.logits(labels=other)
    np.testing.assert_array_equal(found[:, :3], changed[:, :3])
    assert np.abs(found[:, 3] - changed[:, 3]).max() > 1e-4


def test_rows_and_padding_do_not_touch_each_other(case):
    wide = {name: np.pad(case.batch[name], ((0, 0), (0, 5))) for name in ("input_ids", "attention_mask")}
    assert_close(case.logits(**wide), case.logits())
    alone = {name: value[1:2] for name, value in case.batch.items()}
    assert_close(case.logits(labels=case.labels[1:2], **alone), case.logits()[1:2])


def test_vmapped_clients_are_each_alone(case):
    adapters = [case.adapt(case.vlm.targets, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    batch = {**case.batch, "labels": case.labels}
    found = jax.jit(jax.vmap(case.vlm.logits, in_axes=(None, 0, None)))(case.params, stacked, batch)
    for one, adapter in zip(found, adapters, strict=True):
        assert_close(one, case.logits(adapter))
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize("targets", [None, ".*"])
def test_greedy_answers_are_the_likeliest_tokens_one_after_another(case, targets):
    adapter = targets and case.adapt(targets)
    free = {**GREEDY, "forced_bos_token_id": None, "forced_eos_token_ids": ()}
    ids = np.asarray(case.vlm.generate(case.params, adapter, case.batch, 6, **free))
    labels = to_labels(ids, case.vlm.settings().eos_token_ids)
    labels = np.where(ids < case.vlm.vocabulary, labels, IGNORED)  # what ends a class is no class
    likeliest = case.logits(adapter, labels=labels).argmax(-1)
    np.testing.assert_array_equal(np.where(labels == IGNORED, IGNORED, likeliest), labels)


def test_drawn_answers_are_the_likeliest_under_their_noise(case):
    """Each token of two answers a prompt, again from the logits of the answer so far and the noise of its step."""
    if case.chooses:
        pytest.skip("objectives that draw answers refuse a model that chooses among them")
    keys, length = jax.random.split(jax.random.key(3), len(case.labels)), 5
    adapter = case.adapt(case.vlm.targets)
    ids = np.asarray(case.vlm.generate(case.params, adapter, case.batch, length, samples=2, keys=keys))
    ends = np.isin(ids, case.vlm.settings().eos_token_ids)
    counts = np.cumsum(ends, -1) - ends == 0
    logits = case.logits(adapter, labels=np.where(counts, ids, -100))
    shape = (2, case.vlm.vocabulary)
    noise = [[jax.random.gumbel(jax.random.fold_in(key, step), shape) for step in range(1, length + 1)] for key in keys]
    likeliest = (logits + np.moveaxis(np.asarray(noise), 1, 2)).argmax(-1)
    np.testing.assert_array_equal(np.where(counts, likeliest, 0), np.where(counts, ids, 0))
    assert not np.array_equal(ids[:, 0], ids[:, 1])


def test_the_best_of_two_beams_is_as_likely_as_it_says(case):
    """Of all continuations of two tokens two beams find at least one that is no less likely than the greedy one."""
    if case.chooses:
        pytest.skip("of one token the likeliest is the answer, however many beams there are")
    free = {**GREEDY, "forced_bos_token_id": None, "forced_eos_token_ids": (), "eos_token_ids": (case.vlm.vocabulary,)}

    def score(beams):
        ids = case.vlm.generate(case.params, None, case.batch, 3, **free | {"num_beams": beams})
        log_probs = jax.nn.log_softmax(case.logits(labels=ids))
        return np.take_along_axis(np.asarray(log_probs), np.asarray(ids)[..., None], -1).sum((1, 2))

    assert (score(4) >= score(1) - 1e-5).all()


def test_components_part_the_parameters(described):
    for path in tree.flatten(described.vlm.shapes()):
        matching = [name for name, pattern in described.vlm.components.items() if re.match(pattern, path)]
        assert len(matching) == 1, (path, matching)
    text = "encoder" if described.chooses else "decoder"  # what reads classes answers nothing
    assert {"vision", "connector", text} <= described.vlm.components.keys()


def test_default_targets_are_sites_of_the_text_model(described):
    chosen = lora.select(described.vlm.sites, described.vlm.targets)
    assert {described.vlm.component(site.path) for site in chosen} <= {"encoder", "decoder"}
    assert not lora.find_dead_targets(described.vlm.sites, described.vlm.targets)


@pytest.mark.broad
def test_every_site_moves_the_answers(described):
    adapter = described.adapt(".*")
    batch = {**described.batch, "labels": described.labels}

    def loss(adapter):
        return jnp.square(described.vlm.logits(described.params, adapter, batch)).mean()

    for path, gradient in tree.flatten(jax.jit(jax.grad(loss))(adapter)).items():
        if not path.endswith("scale"):
            assert float(jnp.abs(gradient).max()) > 0, path


def test_cuts_name_parameters(described):
    shapes = tree.flatten(described.vlm.shapes())
    for pattern, axes, _ in described.vlm.cuts:
        named = [leaf for path, leaf in shapes.items() if re.fullmatch(pattern, path)]
        assert named, pattern
        assert all(-leaf.ndim <= axis < 0 for leaf in named for axis in axes)


def test_names_in_checkpoints_and_paths_determine_each_other(described, tmp_path):
    for path, leaf in tree.flatten(described.vlm.shapes()).items():
        for name, slot in described.vlm.table.find_names(path, leaf.shape[0] if leaf.shape else 1):
            assert (described.vlm.table.find_slot(name), slot.path) == (slot, path)
    shutil.copytree(described.folder, tmp_path / "again")
    save_checkpoint(described.vlm, described.params, tmp_path / "again")
    again, _ = open_model(tmp_path / "again")
    assert again.fingerprint == described.opened.fingerprint
    jax.tree.map(np.testing.assert_array_equal, load_weights(again, tmp_path / "again"), described.params)


def test_the_processor_keeps_its_contract(described):
    processor, vlm = described.processor, described.vlm
    assert processor.image_tokens == vlm.image_tokens(*processor.size)
    assert processor.pixels([]).shape == (0, *processor.size, 3)
    ids, mask = processor.prompts(QUESTIONS)
    assert ((ids == processor.image_token_id).sum(1) == processor.image_tokens).all()
    assert (np.diff(mask, axis=1) <= 0).all(), "padding stands on the right"
    assert processor.decode(processor.answers(ANSWERS, 64)) == ANSWERS
    if not described.chooses:  # among whose answers there is no long one
        cut = processor.answers(["a long answer of many words"], 4)
        assert cut.shape == (1, 4)
        assert cut[0, -1] == processor.eos_token_id
    with pytest.raises(UserError):
        vlm.image_tokens(1, 1)
