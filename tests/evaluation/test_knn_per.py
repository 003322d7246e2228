"""kNN-Per by hand, against a transcription of the paper's formula, and on the tiny model."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_run

from fedvlm_jax.evaluation.knn_per import (
    EMPTY,
    KERNELS,
    SHARES,
    Datastore,
    KnnAdapter,
    Neighbours,
    build_datastores,
    make_neighbours,
    with_datastore,
)
from fedvlm_jax.training.experiment import open_experiment
from fedvlm_jax.training.loaded_model import load_model


@dataclasses.dataclass(frozen=True)
class Given:
    """A model whose states and logits are its batch."""

    states: Any
    encode: Any = None
    generate: Any = None

    def logits(self, params, adapter, batch):
        return self.states(params, adapter, batch)[1]


class Batch(NamedTuple):
    states: Any
    logits: Any


GIVEN = Given(lambda params, adapter, batch: tuple(batch))


def mix(datastore, states, logits, neighbours=3, temperature=1.0, squared=False):
    model = KnnAdapter(None, Datastore(*map(jnp.asarray, (*datastore, squared))))
    return with_datastore(GIVEN, neighbours, temperature).logits(
        None, model, Batch(jnp.asarray(states), jnp.asarray(logits))
    )


def test_three_neighbours_by_hand():
    """Distances 0, 1 and 2 to tokens 1, 2 and 1, at a share of 0.4, beside a model that finds all four tokens equal."""
    datastore = (np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], np.float32), [1, 2, 1], np.float32(0.4))
    found = np.exp(mix(datastore, np.zeros((1, 2), np.float32), np.zeros((1, 4), np.float32)))[0]
    total = 1 + math.exp(-1) + math.exp(-2)
    remembered = np.array([0, 1 + math.exp(-2), math.exp(-1), 0]) / total
    np.testing.assert_allclose(found, 0.4 * remembered + 0.6 / 4, rtol=1e-5)


def test_three_neighbours_by_the_squared_distance():
    """As above with d² / D, D = 2: exponents 0, 1/2 and 2."""
    datastore = (np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], np.float32), [1, 2, 1], np.float32(1.0))
    found = np.exp(mix(datastore, np.zeros((1, 2), np.float32), np.zeros((1, 4), np.float32), squared=True))[0]
    weights = np.array([1, math.exp(-0.5), math.exp(-2)])
    np.testing.assert_allclose(found[[1, 2]] * weights.sum(), [1 + math.exp(-2), math.exp(-0.5)], rtol=1e-5)


def test_only_the_nearest_k_count():
    datastore = (np.array([[0.0], [1.0], [3.0]], np.float32), [0, 1, 2], np.float32(1.0))
    found = np.exp(mix(datastore, [[0.0]], [[0.0, 0.0, 0.0]], neighbours=2))[0]
    np.testing.assert_allclose(found, [1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1)), 0], atol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_paper_s_formula(temperature, squared):
    """arXiv 2111.09360, equations 5 and 6, written down once more in float64; and its code's exp(-d² / (D scale))."""
    rng = np.random.default_rng(1)
    states, kept = rng.normal(size=(2, 5, 6)), rng.normal(size=(30, 6))
    tokens, logits, share, k = rng.integers(0, 7, 30), rng.normal(size=(2, 5, 7)), 0.3, 4
    wanted = np.zeros((2, 5, 7))
    for row in range(2):
        for place in range(5):
            distance = np.linalg.norm(kept - states[row, place], axis=1)
            for i in np.argsort(distance)[:k]:
                far = distance[i] ** 2 / 6 if squared else distance[i]
                wanted[row, place, tokens[i]] += math.exp(-far / temperature)
    wanted /= wanted.sum(-1, keepdims=True)
    model = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    datastore = (kept.astype(np.float32), tokens, np.float32(share))
    found = mix(datastore, states.astype(np.float32), logits.astype(np.float32), k, temperature, squared)
    np.testing.assert_allclose(np.exp(found), share * wanted + (1 - share) * model, rtol=2e-4, atol=1e-6)


def test_a_share_of_nothing_leaves_the_logits_alone():
    datastore = (np.ones((2, 3), np.float32), [0, 1], np.float32(0.0))
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_array_equal(mix(datastore, np.zeros((4, 3), np.float32), logits), logits)


def test_empty_places_are_nobody_s_neighbours():
    """Padding lies at the origin, nearer than everything that is kept."""
    kept = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]], np.float32)
    found = np.exp(mix((kept, [EMPTY, 3, EMPTY], np.float32(1.0)), [[0.0, 0.0]], [[0.0] * 5]))[0]
    np.testing.assert_allclose(found, [0, 0, 0, 1, 0], atol=1e-6)


def test_both_kernels_are_weighed_at_every_share():
    """The likelihood of the answers, as the mixed model itself has it for that kernel and that λ."""
    rng = np.random.default_rng(2)
    states, logits, labels = rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 4, 7)), rng.integers(0, 7, (3, 4))
    labels[1, 2:] = -100
    batch = {name: jnp.asarray(x)[None] for name, x in (("states", states), ("logits", logits), ("labels", labels))}
    given = Given(lambda params, adapter, batch: (batch["states"], batch["logits"]))
    kept = (rng.normal(size=(30, 6)).astype(np.float32), rng.integers(0, 7, 30))
    model = KnnAdapter({}, Datastore(*(jnp.asarray(x)[None] for x in (*kept, np.float32(0), False))))
    (found,) = make_neighbours(given, 4, 0.5).weigh({}, model, batch)["likelihood"]
    assert found.shape == (3, 2, len(SHARES))
    for (place, kernel), (at, share) in itertools.product(enumerate(KERNELS), enumerate(SHARES)):
        datastore = (*kept, np.float32(share))
        log_probs = jax.nn.log_softmax(mix(datastore, states, logits, 4, 0.5, kernel == "squared"), axis=-1)
        wanted = np.take_along_axis(np.asarray(log_probs), np.maximum(labels, 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(found[:, place, at], (wanted * (labels != -100)).sum(axis=1), rtol=1e-4, atol=1e-4)
    assert np.abs(found[:, 0, 1:] - found[:, 1, 1:]).max() > 1e-2


class GivenLikelihoods:
    """An evaluator of two clients that says how likely the validation answers are, [kernel, λ]."""

    def __init__(self, *best):
        clients = [SimpleNamespace(name=name, rows_of=lambda split: np.arange(1)) for name in ("one", "two")]
        self.examples, self.best = SimpleNamespace(clients=clients), best

    def visit(self, program, params, models, rows):
        (name,) = models
        if program == "keep":
            part = {"states": np.ones((1, 1, 1, 2)), "tokens": np.ones((1, 1, 1), int)}
            return {name: {client: [part] for client in rows}}
        likelihood = np.full((len(rows), 1, len(KERNELS), len(SHARES)), -100.0)
        for client, kernels in enumerate(self.best):
            for kernel, (share, value) in enumerate(kernels):
                likelihood[client, 0, kernel, SHARES.index(share)] = value
        return {name: {client: [{"likelihood": likelihood[client]}] for client in rows}}


@pytest.mark.parametrize(
    ("second", "kernel", "shares"),
    [(((0.1, -6), (0.9, -8)), "distance", (0.3, 0.1)), (((0.1, -6), (0.9, -6.5)), "squared", (0.5, 0.9))],
)
def test_all_clients_have_the_kernel_that_is_likelier_in_all(second, kernel, shares):
    """By hand: -5 and -6 by the distance, -4 and -8 or -6.5 by its square; λ is then that kernel's."""
    evaluator = GivenLikelihoods(((0.3, -5), (0.5, -4)), second)
    programs = Neighbours(None, "keep", "weigh")
    models, found, chosen = build_datastores(evaluator, programs, {}, lambda numbers: numbers, (0, 1), 10)
    assert (chosen, tuple(found.values())) == (kernel, shares)
    assert datastore_of(models, 2).squared.tolist() == [kernel == "squared"] * 2
    alone = build_datastores(evaluator, programs, {}, lambda numbers: numbers, (0, 1), 10, ("squared",))
    assert alone[2] == "squared"


def open_run(run):
    """A run whose clients have models of their own, none of them trained."""
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, neighbours=1, max_answer_tokens=16))
    experiment = open_experiment(run, load_model(run))
    rng = np.random.default_rng(3)
    count = len(experiment.examples.clients)
    adapters = jax.tree.map(
        lambda leaf: (leaf + 0.03 * rng.standard_normal((count, *leaf.shape))).astype(np.float32), experiment.adapter
    )
    return experiment, experiment.evaluator, lambda numbers: jax.tree.map(lambda leaf: leaf[numbers], adapters)


@pytest.fixture(scope="module")
def tiny(model, tmp_path_factory):
    return open_run(tiny_run(model, tmp_path_factory.mktemp("none")))


def remember(tiny, clients=range(4), capacity=10_000, kernels=KERNELS):
    experiment, evaluator, adapters = tiny
    *found, kernel = build_datastores(
        evaluator, experiment.neighbours, experiment.model.params, adapters, clients, capacity, kernels
    )
    assert kernel in kernels
    return found


def datastore_of(models, clients=4):
    return models(np.arange(clients)).datastore


def trust(models, share):
    """The same datastores, with this λ for everybody."""

    def attach(numbers):
        model = models(numbers)
        return model._replace(datastore=model.datastore._replace(share=np.full(len(numbers), share, np.float32)))

    return {"knn": attach}


@pytest.mark.broad
def test_a_client_that_trusts_its_memory_recites_its_training_answers(tmp_path):
    """At λ = 1 and k = 1 every state of a training answer is its own nearest neighbour, so it is said word for word.

    With the shipped model: a random one hardly tells pictures apart.
    """
    shipped = open_run(tiny_run("florence2-nano", tmp_path))
    experiment, evaluator, _ = shipped
    models, _ = remember(shipped)
    said = evaluator(experiment.model.params, trust(models, 1.0), "train", (0, 2))["knn"].texts
    clients = [experiment.examples.clients[number] for number in (0, 2)]
    assert said == {own.name: [experiment.examples.answers[row].strip() for row in own.train] for own in clients}


def test_a_memory_is_its_client_s_own(tiny):
    experiment, _, _ = tiny
    models, _ = remember(tiny)
    for number, client in enumerate(experiment.examples.clients):
        labels = experiment.examples.labels[client.train]
        kept = datastore_of(models).tokens[number]
        np.testing.assert_array_equal(np.sort(kept[kept != EMPTY]), np.sort(labels[labels != -100]))


def test_who_does_not_take_part_remembers_nothing(tiny):
    experiment, _, _ = tiny
    models, shares = remember(tiny, clients=(0, 1, 3))
    assert experiment.examples.clients[2].name not in shares
    assert datastore_of(models).share[2] == 0
    assert (datastore_of(models).tokens[2] == EMPTY).all()


def test_capacity_bounds_what_is_kept(tiny):
    few, whole = (datastore_of(remember(tiny, capacity=capacity)[0]) for capacity in (5, 10_000))
    assert few.tokens.shape[1] == 5
    first, last = whole.states[0][0], whole.states[0][(whole.tokens[0] != EMPTY).sum() - 1]
    np.testing.assert_array_equal(few.states[0][[0, -1]], [first, last])


def test_the_share_is_the_likeliest_on_validation(tiny):
    """Every λ is scored by the evaluator itself, on validation; the one chosen must have the lowest loss."""
    experiment, evaluator, _ = tiny
    models, shares = remember(tiny)
    losses = {}
    for share in SHARES:
        scored = evaluator(experiment.model.params, trust(models, share), "validation", range(4))
        losses[share] = scored["knn"].scores["loss"]
    for name, chosen in shares.items():
        best = min(losses[share][name] for share in SHARES)
        assert losses[chosen][name] == pytest.approx(best, rel=1e-4), name
    assert any(shares.values()), "a random model is worse than its memory somewhere"


def test_without_validation_nothing_is_mixed_in(tiny):
    experiment, evaluator, adapters = tiny
    first, *others = experiment.examples.clients
    examples = dataclasses.replace(
        experiment.examples, clients=(dataclasses.replace(first, validation=first.validation[:0]), *others)
    )
    blind = (experiment, dataclasses.replace(evaluator, examples=examples), adapters)
    models, shares = remember(blind)
    assert first.name not in shares
    assert datastore_of(models).share[0] == 0
