"""The base's log-probabilities: every pair computed once, found again by content, whatever a kill leaves behind."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs.reference_log_probs import (
    ReferenceStore,
    add_reference,
    compute_reference,
    make_score,
)
from fedvlm_jax.models import load_vlm, resolve_folder
from fedvlm_jax.training.round_setup import choose_arithmetic

COUNT, BATCH = 7, 3


def make_examples(seed=0, width=4, count=COUNT):
    """Rows in which everything is drawn; wider arrays only have more padding."""
    rng = np.random.default_rng(seed)

    def draw(fill):
        array = np.full((count, width), fill, np.int32)
        array[:, :3] = rng.integers(3, 50, (count, 3))
        return array

    ids = draw(1)
    return Examples(
        pictures=np.arange(count, dtype=np.int32)[:, None] % 3,
        input_ids=ids,
        attention_mask=(np.arange(width) < 3).astype(np.int32) * np.ones((count, 1), np.int32),
        labels=draw(-100),
        answers=[""] * count,
        rows=np.arange(count),
        clients=(),
        view=(np.arange(count, dtype=np.int32) % 3)[:, None],
        images=SimpleNamespace(keys=("red", "green", "blue")),  # type: ignore[arg-type]
        views=SimpleNamespace(keys=("red", "green", "blue")),  # type: ignore[arg-type]
        skipped=(),
        truncated=0,
        rejected=draw(-100),
    )


class Base:
    """Stands in for the model: the sum of all tokens that count. Remembers how many rows it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, params, batch):
        self.batches.append(len(batch["labels"]))
        sums = {
            name: np.asarray(batch[labels]).clip(min=0).sum(1) + params * np.asarray(batch["input_ids"])[:, 0]
            for name, labels in (("chosen_log_prob", "labels"), ("rejected_log_prob", "rejected_labels"))
        }
        return {name: -values.astype(np.float32) for name, values in sums.items()}


def compute(examples, store, base=None, note=lambda text: None):
    names = {"input_ids": examples.input_ids, "labels": examples.labels, "rejected_labels": examples.rejected}

    def inputs(rows):
        return {name: array[rows] for name, array in names.items()}

    base = base or Base()
    found = compute_reference(base, 2, examples, inputs, store, batch=BATCH, mesh=make_mesh(1), note=note)
    return found, base


def expected(examples):
    sides = (examples.labels, examples.rejected)
    return np.stack([-(side.clip(min=0).sum(1) + 2 * examples.input_ids[:, 0]) for side in sides], axis=1)


def test_every_row_has_the_numbers_of_its_two_answers():
    examples, notes = make_examples(), []
    found, base = compute(examples, ReferenceStore(), note=notes.append)
    np.testing.assert_array_equal(found, expected(examples))
    assert found.dtype == np.float32
    assert base.batches == [BATCH] * 3, "batches of one shape, the last one filled up"
    assert notes == ["reference log-probabilities: 7 of 7 pairs to compute, kept in memory"]


def test_batches_carry_them_in_any_shape():
    examples = make_examples()
    read = add_reference(lambda rows: {"labels": examples.labels[rows]}, expected(examples).astype(np.float32))
    rows = np.asarray([[3, 0], [6, 3]])
    batch = read(rows)
    assert batch["labels"].shape == (2, 2, 4)
    np.testing.assert_array_equal(batch["reference_chosen"], expected(examples)[rows, 0])
    np.testing.assert_array_equal(batch["reference_rejected"], expected(examples)[rows, 1])


def test_a_pair_is_known_by_its_content(tmp_path):
    """The same rows in wider arrays and another order are known; another image or answer is another pair."""
    store = ReferenceStore(tmp_path / "cache" / "reference")
    compute(make_examples(), store)
    _, base = compute(make_examples(width=6), store)
    assert base.batches == []
    for change in ("pictures", "input_ids", "labels", "rejected"):
        examples = make_examples()
        array = getattr(examples, change)
        array[5, ...] = array[4, ...] if change == "pictures" else np.where(array[5] > 2, array[5] + 1, array[5])
        found, base = compute(examples, store)
        assert base.batches == [BATCH], change
        np.testing.assert_array_equal(found, expected(examples))
    twice = make_examples()
    for array in (twice.pictures, twice.input_ids, twice.labels, twice.rejected):
        array[:] = array[:1]
    assert compute(twice, ReferenceStore())[1].batches == [BATCH], "seven times the same pair is one"


def test_on_disk_they_are_found_again(tmp_path):
    folder = tmp_path / "reference"
    examples = make_examples()
    compute(examples, ReferenceStore(folder))
    found, base = compute(examples, ReferenceStore(folder))
    assert base.batches == []
    np.testing.assert_array_equal(found, expected(examples))


@pytest.mark.parametrize("suffix", ["rows", "keys"])
@pytest.mark.parametrize("damage", [1, 13, "flip"])
def test_what_a_kill_cut_short_or_a_disk_changed_is_computed_again(tmp_path, suffix, damage):
    examples = make_examples()
    compute(examples, ReferenceStore(tmp_path))
    file = min(tmp_path.glob(f"*.{suffix}"))
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content if damage == "flip" else file.read_bytes()[:-damage])
    found, base = compute(examples, ReferenceStore(tmp_path))
    np.testing.assert_array_equal(found, expected(examples))
    assert base.batches == [BATCH]
    again, base = compute(examples, ReferenceStore(tmp_path))
    np.testing.assert_array_equal(again, expected(examples))
    assert base.batches == []


@pytest.mark.slow
def test_a_pair_has_the_same_bits_at_every_place_and_beside_any_others():
    """On the shipped model: a resumed run scores what is missing, beside others than the run it goes on with."""
    vlm, params = load_vlm(resolve_folder(Run().model), **choose_arithmetic(Run().system))
    rng, score = np.random.default_rng(0), make_score(vlm)
    tokens = {name: rng.integers(5, 100, (COUNT, 6)).astype(np.int32) for name in ("labels", "rejected_labels")}
    tokens["labels"][::3, 4:] = -100
    pairs = {
        **tokens,
        "input_ids": rng.integers(5, 100, (COUNT, 9)).astype(np.int32),
        "attention_mask": (np.arange(9) < rng.integers(3, 10, (COUNT, 1))).astype(np.int32),
        "image_features": rng.normal(size=(COUNT, 17, vlm.image_width)).astype(np.float32),
    }

    def ask(rows):
        scores = score(params, {name: array[rows] for name, array in pairs.items()})
        return np.stack([scores["chosen_log_prob"], scores["rejected_log_prob"]], axis=1)

    whole = ask(np.arange(COUNT))
    for _ in range(3):
        order = rng.permutation(COUNT)
        np.testing.assert_array_equal(ask(order), whole[order])
    np.testing.assert_array_equal(ask(np.repeat([2], COUNT)), whole[[2] * COUNT])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--system\.cache-dir"):
        ReferenceStore(tmp_path / "file" / "cache" / "reference")
