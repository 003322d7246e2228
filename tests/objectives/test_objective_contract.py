"""What every objective must keep, found by name: a new file in objectives/ is tested here without being mentioned."""

import jax
import numpy as np
import pytest
from toy import LABELS, VOCABULARY, make_cohort, make_method, make_toy, run_round, start_states

from fedvlm_jax import lora
from fedvlm_jax.config.run_options import methods_available, objectives_available
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.objectives import load_objective

CLIENTS = 3

ORDINARY = ("local", "fedavg-lora", "plora", "flora", "fedalt")
"""Methods that every objective is tried with; with the others it is a slow test."""

ALIKE = ("classify", "sft", "sft+dpo")
"""Objectives that train as `dpo` does, which is tried with all of those: with plora, and with the others slowly."""

MADE_FOR = ("reward", "pfit")


def add_pairs(examples):
    """Rejected answers, made-up log-probabilities of both under the base, and keys to draw answers with."""
    rng = np.random.default_rng(1)
    shape = examples["labels"].shape
    return examples | {
        "rejected_labels": rng.integers(0, VOCABULARY, shape).astype(np.int32),
        "reference_chosen": rng.normal(-5, 1, shape[:-1]).astype(np.float32),
        "reference_rejected": rng.normal(-5, 1, shape[:-1]).astype(np.float32),
        "sampling_keys": rng.integers(0, 2**32, (*shape[:-1], 2), np.uint32),
        "client": np.zeros(shape[:-1], np.int32),
    }


@pytest.fixture(scope="module", params=objectives_available())
def case(request):
    """-> the objective, its loss with gradient as a function of a batch, a batch of eight."""
    objective = load_objective(request.param)
    vlm, params = make_toy()
    adapter = lora.init(jax.random.key(9), vlm.sites, lora.LoRA(rank=2, alpha=4.0, targets="fc"))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    step = jax.jit(jax.value_and_grad(lambda a, batch: objective.loss(vlm, params, a, batch), has_aux=True))
    batch = {name: rows[0] for name, rows in add_pairs(make_cohort(1, rows=8).examples).items()}
    return objective, lambda batch: step(adapter, batch), batch


def drop_rows(batch, rows):
    """As local training leaves out examples: no label of theirs counts."""
    batch = {name: array.copy() for name, array in batch.items()}
    for name in ("labels", "rejected_labels"):
        batch[name][rows] = -100
    return batch


def test_the_record_says_what_it_is(case):
    objective, run, batch = case
    assert objective.name in objectives_available()
    assert objective.source
    (loss, metrics), _ = run(batch)
    assert loss.shape == ()
    assert metrics["loss"] == loss
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values())


def test_what_it_does_not_ask_for_it_does_not_read(case):
    objective, run, batch = case
    given = dict(batch)
    if not objective.reference:
        given = {name: array for name, array in given.items() if not name.startswith("reference_")}
    if not objective.pairs:
        del given["rejected_labels"]
    if not objective.samples:
        del given["sampling_keys"], given["client"]
    assert run(given)[0][0] == run(batch)[0][0]


def test_nothing_counts_and_loss_and_gradient_are_zero(case):
    _, run, batch = case
    (loss, metrics), gradient = run(drop_rows(batch, slice(None)))
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_examples_that_do_not_count_change_nothing(case):
    _, run, batch = case
    dropped = drop_rows(batch, slice(5, None))
    rest = {name: array[:5] for name, array in batch.items()}
    (one, metrics), gradient = run(dropped)
    (two, wanted), other = run(rest)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for name in wanted:
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient, other)


def test_padding_labels_change_nothing(case):
    """Wider labels, as another answer of the data set may make them; this model has as many places as labels."""
    objective, run, batch = case
    short = {name: array.copy() for name, array in batch.items()}
    for name in ("labels", "rejected_labels"):
        short[name][:, LABELS - 1 :] = -100
    if objective.pairs:
        narrow = short | {"rejected_labels": short["rejected_labels"][:, : LABELS - 1]}
        assert run(narrow)[0][0] == run(short)[0][0]
    assert np.isfinite(run(short)[0][0])


def mark(objective, method):
    broad = (method in ORDINARY and (objective not in ALIKE or method == "plora")) or (objective, method) == MADE_FOR
    return pytest.param(objective, method, marks=pytest.mark.broad if broad else pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "method"),
    [mark(objective, method) for objective in objectives_available() for method in methods_available()],
    indirect=["case"],
)
def test_every_method_trains_it(case, method):
    """Three rounds of three steps at a high rate: the clients' loss falls."""
    _, params, trainer, record, adapter = make_method(method, objective=case[0].name)
    server, cohort = record.init(adapter), make_cohort(CLIENTS)
    cohort = cohort._replace(examples=add_pairs(cohort.examples))
    states, losses, programs = start_states(record, server, CLIENTS), [], []
    program = make_round(record, trainer, make_mesh(1))
    for round_ in range(1, 4):
        base = params if record.base is None else record.base(params, server)
        out, states = run_round(program, base, server, cohort, [1 / CLIENTS] * CLIENTS, states, round_=round_)
        server, cohort = out.server, cohort._replace(new=np.zeros(CLIENTS, bool))
        losses.append(float(out.metrics["loss"].mean()))
        assert all(np.isfinite(values).all() for values in out.metrics.values())
        programs.append(program._cache_size())
    assert losses[-1] < losses[0]
    # A base that the server's state is added to is, in the first round alone, on no device in particular.
    assert programs[-1] == programs[1] <= 1 + (record.base is not None), "all rounds of a phase are one program"
