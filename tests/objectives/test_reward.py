"""The reward objective: its gradient against the exact one, its parts against NumPy, and how answers are drawn."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import LABELS, SPEC, VOCABULARY, make_cohort, make_toy

from fedvlm_jax import lora
from fedvlm_jax.evaluation.metrics.cider import cider, weigh_corpus, weigh_documents
from fedvlm_jax.objectives import PreferenceOptions, load_objective
from fedvlm_jax.objectives.answer_rewards import SCORES, cut_at_end
from fedvlm_jax.objectives.reward import follow_reward
from fedvlm_jax.objectives.reward_tables import tabulate_answers, tabulate_rarity

WORDS, PLACES = 3, 2
ANSWERS = np.asarray(list(itertools.product(range(WORDS), repeat=PLACES)))  # all that can be said
BETA = 0.3


def log_prob(theta):
    """Of every answer, under logits [places, words]."""
    each = theta - np.log(np.exp(theta).sum(axis=-1, keepdims=True))
    return sum(each[place, ANSWERS[:, place]] for place in range(PLACES))


def test_the_expected_gradient_is_that_of_reward_minus_kl():
    """Over all pairs of answers that a policy may draw, against differences of E[r] − β KL(π ‖ π₀) in float64."""
    rng = np.random.default_rng(0)
    theta, base = rng.normal(size=(2, PLACES, WORDS))
    rewards = rng.random(len(ANSWERS))

    def exact(at):
        ours = log_prob(at)
        return np.sum(np.exp(ours) * (rewards - BETA * (ours - log_prob(base))))

    wanted = np.zeros_like(theta)
    for place in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[place] = 1e-5
        wanted[place] = (exact(theta + step) - exact(theta - step)) / 2e-5
    pairs = np.asarray(list(itertools.product(range(len(ANSWERS)), repeat=2)))  # two samples each
    chances = np.exp(log_prob(theta))[pairs].prod(axis=1)

    def loss(at, pair):
        each = jax.nn.log_softmax(at)
        ours = sum(each[place, ANSWERS[:, place]] for place in range(PLACES))
        theirs = jnp.asarray(log_prob(base), jnp.float32)
        drawn = jnp.asarray(rewards, jnp.float32)[pair][None], ours[pair][None], theirs[pair][None]
        return follow_reward(*drawn, jnp.ones(1, bool), BETA)

    values, gradients = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(jnp.asarray(theta, jnp.float32), pairs)
    np.testing.assert_allclose(-np.einsum("p,p...->...", chances, gradients), wanted, atol=2e-6)
    assert -np.sum(chances * values) == pytest.approx(exact(theta), abs=1e-5)


@pytest.mark.parametrize("name", ["exact-match", "token-f1", "brevity"])
def test_rewards_are_those_of_plain_python(name):
    rng = np.random.default_rng(1)

    def draw():
        rows = rng.integers(0, 4, (300, 4))
        return np.where(np.arange(4) < rng.integers(0, 5, (300, 1)), rows, -100)

    def score(drawn, gold):
        drawn, gold = ([x for x in row if x >= 0] for row in (drawn, gold))
        common = (Counter(drawn) & Counter(gold)).total()
        return {
            "exact-match": float(drawn == gold),
            "token-f1": 2 * common / (len(drawn) + len(gold)) if drawn or gold else 1.0,
            "brevity": 1 / len(drawn) if drawn else 0.0,
        }[name]

    drawn, gold = draw(), draw()
    gold[:60] = drawn[:60]
    wanted = [score(*both) for both in zip(drawn, gold, strict=True)]
    assert len(set(wanted)) > 1
    np.testing.assert_allclose(SCORES[name](jnp.asarray(drawn), jnp.asarray(gold), {}), wanted, rtol=1e-6)


@pytest.fixture(scope="module")
def drawn():
    """The objective on the toy: its batch, the answers that it draws, its value, metrics and gradient."""
    vlm, params = make_toy()
    options = PreferenceOptions(rewards=("token-f1", "brevity"), mix=(0.25, 0.75), beta=BETA, samples=3)
    adapter = jax.tree.map(lambda x: x + 0.3, lora.init(jax.random.key(9), vlm.sites, SPEC))
    batch = {name: rows[0] for name, rows in make_cohort(1, rows=6).examples.items()}
    batch["labels"][:, -1] = [0, 0, -100, 0, -100, -100]
    batch["labels"][4] = -100  # does not count
    batch |= {
        "sampling_keys": np.random.default_rng(2).integers(0, 2**32, (6, 2), np.uint32),
        "client": np.asarray([0, 1, 1, 0, 0, 1], np.int32),
    }
    loss = load_objective("reward", options).loss
    step = jax.jit(jax.value_and_grad(lambda a: loss(vlm, params, a, batch), has_aux=True))
    (value, metrics), gradient = step(adapter)
    keys = jax.random.wrap_key_data(jnp.asarray(batch["sampling_keys"]))
    answers = vlm.generate(params, adapter, batch, LABELS, samples=3, keys=keys)
    return params, adapter, batch, np.asarray(answers), float(value), metrics, gradient


def test_value_metrics_and_gradient_against_numpy(drawn):
    """REINFORCE with leave-one-out baselines written down for two dense layers, of the answers that were drawn."""
    params, adapter, batch, answers, value, metrics, gradient = drawn

    def forward(with_adapter):
        parts = []
        for part, name in (("encoder", "fc1"), ("decoder", "fc2")):
            layer, site = params[part][name], adapter[part][name]
            x = parts[-1] if parts else batch["image_features"]
            y = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
            y = y + with_adapter * float(site["scale"]) * (x @ np.asarray(site["a"])) @ np.asarray(site["b"])
            parts.append(np.tanh(y) if not parts else y)
        logits = parts[1].reshape(-1, LABELS, VOCABULARY)
        return parts[0], logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    (hidden, ours), (_, theirs) = forward(1), forward(0)
    ends = np.cumsum(answers == 0, axis=-1) - (answers == 0)
    said = ends == 0  # the token that ends an answer is said, too
    np.testing.assert_array_equal(np.where(said, answers, -100), cut_at_end(jnp.asarray(answers), (0,)))
    rows, _, places = np.indices(answers.shape)
    log_ours, log_theirs = ((part[rows, places, answers] * said).sum(axis=-1) for part in (ours, theirs))
    gold = [[x for x in row if x > 0] for row in batch["labels"].tolist()]
    reward = np.zeros(answers.shape[:2])
    for row, sample in np.ndindex(reward.shape):
        bare = [x for x in answers[row, sample][said[row, sample]].tolist() if x > 0]
        common, both = (Counter(bare) & Counter(gold[row])).total(), len(bare) + len(gold[row])
        f1, brief = 2 * common / both if both else 1.0, 1 / len(bare) if bare else 0.0
        mix = (0.25, 0.75)[batch["client"][row]]
        reward[row, sample] = mix * f1 + (1 - mix) * brief
    counts = np.asarray([1, 1, 1, 1, 0, 1], bool)
    penalised = reward - BETA * (log_ours - log_theirs)
    assert value == pytest.approx(-penalised[counts].mean(), rel=1e-4)
    assert float(metrics["reward"]) == pytest.approx(reward[counts].mean(), rel=1e-5)
    per_place = (np.exp(ours) * (ours - theirs)).sum(axis=-1)[:, None]
    assert float(metrics["kl"]) == pytest.approx((per_place * said).sum(axis=-1)[counts].mean(), rel=1e-3)
    assert float(metrics["kl"]) > 0.01
    advantage = penalised - (penalised.sum(axis=1, keepdims=True) - penalised) / 2
    slope = np.zeros((len(answers), LABELS, VOCABULARY))
    for row, sample, place in np.ndindex(answers.shape):
        if counts[row] and said[row, sample, place]:
            score = np.eye(VOCABULARY)[answers[row, sample, place]] - np.exp(ours[row, place])
            slope[row, place] -= advantage[row, sample] * score / (counts.sum() * 3)
    site = adapter["decoder"]["fc2"]
    wanted = float(site["scale"]) * (hidden @ np.asarray(site["a"])).T @ slope.reshape(len(answers), -1)
    assert np.abs(wanted).max() > 1e-2
    np.testing.assert_allclose(gradient["decoder"]["fc2"]["b"], wanted, atol=1e-5)


def test_rewards_of_tables_are_looked_up_for_what_is_drawn(drawn, tmp_path):
    """By dictionary and by the text metric, of the very answers that the module's batch gets."""
    params, adapter, batch, answers, *_ = drawn
    vlm, _ = make_toy()
    listed = {(0, 0, (word,)): word / 5 for word in range(1, 5)} | {(0, 0, ()): 0.7, (1, 0, (2,)): 0.9, (0, 2, ()): 0.1}
    documents = [[[1, 2]], [[2]], [[3, 4, 4]]]
    rarity = weigh_documents(documents)
    questions = np.asarray([0, 1, 0, 1, 0, 1], np.int32)
    known = tabulate_answers(listed, 0.3) | tabulate_rarity(rarity.weights, rarity.most)
    options = PreferenceOptions(rewards=("file", "cider"), reward_file=tmp_path, mix=(1.0,), beta=BETA, samples=3)
    loss = load_objective("reward", options).loss
    run = jax.jit(lambda known, asked: loss(vlm, params, adapter, batch | {"reward_question": asked} | known)[1])
    metrics, counts = run(known, questions), (batch["labels"] >= 0).any(axis=-1)
    bare = [[tuple(word for word in cut_words(one) if word) for one in row] for row in answers.tolist()]
    wanted = []
    for row, said in enumerate(bare):
        client, question = int(batch["client"][row]) + 1, int(questions[row])
        keys = ((question, client), (question, 0), (0, client), (0, 0))
        wanted.append([next((listed[*key, one] for key in keys if (*key, one) in listed), 0.3) for one in said])
    assert len({*np.ravel(wanted)}) > 3
    assert float(metrics["first_reward"]) == pytest.approx(np.asarray(wanted)[counts].mean(), rel=1e-5)
    gold = [" ".join(str(word) for word in row if word > 0) for row in batch["labels"].tolist()]
    texts = [[" ".join(map(str, one)) for one in row] for row in bare]
    corpus = weigh_corpus([[" ".join(map(str, one)) for one in each] for each in documents])
    scores = np.stack([cider([row[one] for row in texts], [[text] for text in gold], corpus) / 10 for one in range(3)])
    assert float(metrics["second_reward"]) == pytest.approx(scores.T[counts].mean(), rel=1e-5)
    assert scores.any()


def cut_words(row):
    """Up to the token 0 that ends an answer."""
    return row[: row.index(0)] if 0 in row else row


def test_answers_are_drawn_from_the_model_s_distribution():
    """Frequencies of 6,000 answers' tokens, within four standard errors."""
    vlm, params = make_toy()
    features = np.random.default_rng(3).normal(size=(1, 6)).astype(np.float32)
    batch = {"image_features": np.repeat(features, 1500, axis=0), "labels": np.zeros((1500, LABELS), np.int32)}
    answers = np.asarray(
        vlm.generate(params, None, batch, LABELS, samples=4, keys=jax.random.split(jax.random.key(0), 1500))
    )
    chances = np.asarray(jax.nn.softmax(vlm.logits(params, None, batch)[0]))
    going = np.ones(answers.shape[:2], bool)
    for place in range(LABELS):
        found = np.bincount(answers[going, place], minlength=VOCABULARY) / going.sum()
        error = np.sqrt(chances[place] * (1 - chances[place]) / going.sum())
        assert (np.abs(found - chances[place]) < 4 * error).all()
        going &= answers[..., place] != 0
    assert not np.array_equal(answers[:, 0], answers[:, 1])
