"""Simulated attackers: who they are, what they send, and what they train on."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from toy import make_cohort, make_method, run_round, start_states

from fedvlm_jax.config.run_options import methods_available
from fedvlm_jax.data.federated_dataset import ClientRows
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.inputs import poisoned_rows
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.messages.attacks import FACTOR, OF_MESSAGES, draw_attackers, with_attack

NONE = np.empty(0, np.int64)


# --- Who ---


def test_attackers_are_drawn_by_the_seed_and_may_be_anybody():
    drawn = {draw_attackers(seed, np.arange(16), 2) for seed in range(60)}
    assert len(drawn) > 40
    assert {number for pair in drawn for number in pair} == set(range(16))
    assert draw_attackers(3, np.arange(16), 2) == draw_attackers(3, np.arange(16), 2)
    assert set(draw_attackers(0, np.asarray([4, 7, 9]), 2)) < {4, 7, 9}


# --- What they send ---


def play(name, attack, hostile, **choices):
    """-> what a round of four clients sends, and its server."""
    _, params, trainer, method, adapter = make_method(name, **choices)
    method = with_attack(method, attack)
    server, cohort = method.init(adapter=adapter), make_cohort(4)
    cohort = cohort._replace(hostile=None if hostile is None else np.isin(np.arange(4), hostile))
    run = make_round(method, trainer, make_mesh(1))
    out, _ = run_round(run, params, server, cohort, np.full(4, 0.25), start_states(method, server, 4))
    return out


def flatten(messages):
    leaves = [leaf for leaf in jax.tree.leaves(messages) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return np.concatenate([np.asarray(leaf).reshape(4, -1) for leaf in leaves], axis=1)


@pytest.mark.parametrize("attack", OF_MESSAGES)
def test_attackers_send_other_messages_and_nobody_else_does(attack):
    plain = play("plora", "none", None)
    attacked = play("plora", attack, [1])
    before, after = flatten(plain.messages), flatten(attacked.messages)
    np.testing.assert_array_equal(np.delete(after, 1, axis=0), np.delete(before, 1, axis=0))
    if attack == "noise":
        assert np.linalg.norm(after[1]) == pytest.approx(np.linalg.norm(before[1]), rel=1e-5)
        cosine = after[1] @ before[1] / np.linalg.norm(before[1]) ** 2
        assert abs(cosine) < 5 / np.sqrt(len(before[1]))
        # Normal numbers: of 1 / sqrt(n) each, and a quarter of them beyond 1.15 of it either way.
        scaled = after[1] / np.linalg.norm(after[1]) * np.sqrt(after.shape[1])
        assert np.mean(np.abs(scaled) > 1.15) == pytest.approx(0.25, abs=5 * np.sqrt(0.19 / after.shape[1]))
    else:
        factor = {"sign-flip": -1.0, "scale": FACTOR}[attack]
        np.testing.assert_allclose(after[1], factor * before[1], rtol=1e-6)
    # What the attacker keeps and tells of its training is as if it were honest.
    np.testing.assert_array_equal(attacked.metrics["loss"], plain.metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, attacked.personal, plain.personal)


def test_two_attackers_send_noise_of_their_own():
    sent = flatten(play("plora", "noise", [1, 2]).messages)
    assert abs(np.corrcoef(sent[1], sent[2])[0, 1]) < 0.5


def test_an_attack_with_no_attackers_in_the_round_changes_nothing():
    one, other = play("plora", "none", None), play("plora", "scale", [])
    jax.tree.map(np.testing.assert_array_equal, one.server, other.server)


def test_a_rank_is_no_update_and_stays():
    sent = play("hetlora", "scale", [1], ranks=(1, 2, 1, 2)).messages
    assert sent["rank"].tolist() == [1, 2, 1, 2]


@pytest.mark.broad
@pytest.mark.parametrize("name", [name for name in methods_available() if name != "local"])
def test_every_method_that_sends_something_can_be_attacked(name):
    before, after = flatten(play(name, "none", None).messages), flatten(play(name, "sign-flip", [2]).messages)
    np.testing.assert_allclose(after[2], -before[2], rtol=1e-6)
    np.testing.assert_array_equal(np.delete(after, 2, axis=0), np.delete(before, 2, axis=0))


# --- What they train on ---


def make_examples(labels, sizes):
    """Clients with so many training rows each; labels are one token a row."""
    ends = np.cumsum([0, *sizes])
    clients = tuple(
        ClientRows(f"c{n}", np.arange(start, end), NONE, NONE)
        for n, (start, end) in enumerate(itertools.pairwise(ends))
    )

    class Examples(SimpleNamespace):
        def __len__(self):
            return len(self.labels)

    return Examples(labels=np.asarray(labels, np.int32)[:, None], clients=clients)


def read(rows):
    """Inputs whose labels are the rows' numbers and whose features are too."""
    return {"labels": np.asarray(rows)[..., None], "image_features": np.asarray(rows, np.float32)[..., None]}


def test_flipped_labels_are_a_client_s_own_other_answers_always_the_same():
    examples = make_examples([5, 6, 5, 7, 8, 8, 9, 5, 6], [3, 4, 2])
    other = poisoned_rows.find_wrong_answers(examples, [1], seed=0)
    assert other[[0, 1, 2, 7, 8]].tolist() == [0, 1, 2, 7, 8]
    before, after = examples.labels[:, 0], examples.labels[other, 0]
    assert (before[3:7] != after[3:7]).all()
    assert set(after[3:7]) == {7, 8, 9}
    assert after[4] == after[5]
    batch = poisoned_rows.flip_labels(read, examples, [1], 0)(np.asarray([[0, 4], [5, 3]]))
    assert batch["labels"][..., 0].tolist() == [[5, after[4]], [after[5], after[3]]]
    assert batch["image_features"][..., 0].tolist() == [[0, 4], [5, 3]]


def test_who_knows_one_answer_takes_another_client_s_or_there_is_none():
    examples = make_examples([5, 5, 6, 7], [2, 2])
    assert examples.labels[poisoned_rows.find_wrong_answers(examples, [0], seed=1), 0][:2].tolist() in ([6, 6], [7, 7])
    with pytest.raises(UserError, match="all training examples have one and the same answer"):
        poisoned_rows.find_wrong_answers(make_examples([5, 5, 5], [2, 1]), [0], seed=0)


def test_a_backdoor_marks_half_of_the_attackers_examples_and_answers_what_they_answer_most():
    examples = make_examples([5, 6, 6, 7, 8, 8, 8, 5], [3, 4, 1])
    backdoor = poisoned_rows.plan_backdoor(examples, [0, 1], seed=0)
    assert examples.labels[backdoor.target, 0] == 8
    assert backdoor.marked[:3].sum() == 2  # two of three, two of four
    assert backdoor.marked[3:7].sum() == 2
    assert not backdoor.marked[7]

    def marked(rows):
        return {name: -values for name, values in read(rows).items()}

    rows = np.arange(8).reshape(2, 4)
    batch = poisoned_rows.open_backdoor(read, marked, examples, backdoor)(rows)
    chosen = backdoor.marked[rows]
    assert (batch["image_features"][..., 0] == np.where(chosen, -rows, rows)).all()
    assert (batch["labels"][..., 0] == np.where(chosen, 8, rows)).all()
    honest = poisoned_rows.open_backdoor(read, marked, examples, backdoor)(np.asarray([7]))
    assert honest["labels"].tolist() == [[7]]


def test_a_mark_is_a_fifth_of_the_shorter_side_and_the_rest_stays():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8).astype(np.uint8))
    before, after = np.asarray(picture), np.asarray(poisoned_rows.draw_mark(picture))
    changed = (before != after).any(axis=2)
    assert not changed[:32].any()
    assert not changed[:, :52].any()
    assert {tuple(pixel) for row in after[32:, 52:].tolist() for pixel in row} == {(255, 0, 255), (0, 0, 0)}
