"""Every method with every pool: refused with the reason, or the round's contract."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import SPEC, make_cohort, make_method, run_round, start_states, take

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_setup import make_method as make_run_method
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import LoraOptions, Run, TrainOptions, methods_available
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.client_round import Frame, make_client_round
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.messages.robust import make_pool
from fedvlm_jax.methods import Setup
from fedvlm_jax.methods.base import Context
from fedvlm_jax.methods.config import LocalOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.training.local_baseline import make_baseline

POOLS = ("median", "trimmed", "krum", "multi-krum", "geometric", "bound")
CLIENTS = 7
WEIGHTS = np.arange(1, CLIENTS + 1, dtype=np.float32) / np.float32(28)
ALL = (
    *("flora", "fedex-lora", "hetlora", "flexlora", "lora-fair", "fedrpca", "fedalt", "fedmosaic", "ce-lora"),
    *("fedlease", "hilora", "fedtreelora", "pfedmoap"),
)
"""Methods whose servers need every message; `test_contract.py` holds that they do."""
EVERY_TIME = [*itertools.product(("plora",), POOLS), ("rolora", "krum"), ("apfl", "trimmed"), ("fedsvd", "geometric")]


@pytest.mark.parametrize("name", methods_available())
def test_a_method_takes_every_pool_or_says_why_none(name):
    for pool in POOLS:
        run = Run(method=name, messages=MessageOptions(pool=pool))
        if name == "local":
            with pytest.raises(UserError, match=f"--messages.pool does not go with --method {name}, because no client"):
                validate(run)
        elif name in ALL:
            with pytest.raises(UserError, match=f"{pool} does not go with --method {name}, because its server needs"):
                validate(run)
            with pytest.raises(ValueError, match="needs every client's message"):
                with_pool(make_method(name)[3], make_pool(run.messages))
        else:
            validate(run)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"messages": MessageOptions(hostile=2)}, "--messages.hostile means nothing to --messages.pool mean"),
        (
            {"messages": MessageOptions(pool="median", hostile=2)},
            "--messages.hostile .* use --messages.pool trimmed or",
        ),
        (
            {"messages": MessageOptions(pool="krum", bound=2.0)},
            "--messages.bound means nothing to --messages.pool krum",
        ),
        (
            {"messages": MessageOptions(pool="krum"), "privacy": PrivacyOptions(noise=1.0, sampling="all")},
            "--messages.pool does not go with --privacy",
        ),
        ({"messages": MessageOptions(pool="median", secure=True)}, "--messages.pool median and --messages.secure"),
        (
            {"messages": MessageOptions(pool="krum", hostile=2), "cohort": 6},
            "--messages.pool krum needs 7 clients in a round .* there are 6",
        ),
        ({"messages": MessageOptions(pool="trimmed", hostile=3), "cohort": 6}, "trimmed needs 7 clients"),
        (
            {
                "messages": MessageOptions(pool="krum"),
                "lora": LoraOptions(rank=8, ranks=(2, 8)),
                "method": "fedsa-lora",
            },
            "--messages.pool krum .* because with --lora.ranks",
        ),
        (
            {
                "messages": MessageOptions(pool="krum"),
                "local": LocalOptions(scaffold=True),
                "train": TrainOptions(optimizer="sgd"),
            },
            "--messages.pool krum .* because with --local.scaffold",
        ),
        ({"participation": ParticipationOptions(attack="scale")}, "say how many attack with --participation.attackers"),
        (
            {"participation": ParticipationOptions(attack="scale", attackers=2), "method": "local"},
            "--participation.attack does not go with --method local, because no client sends anything",
        ),
        (
            {"participation": ParticipationOptions(attack="backdoor", attackers=2), "objective": "dpo"},
            "--participation.attack backdoor does not go with --objective dpo",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(changes, expected):
    with pytest.raises(UserError, match=expected) as refusal:
        validate(Run(**changes))
    assert "\n" not in str(refusal.value)


def test_what_goes_together_is_let_through():
    for changes in (
        {"messages": MessageOptions(pool="bound", bound=0.5)},
        {"messages": MessageOptions(pool="krum", hostile=2), "cohort": 7},
        {"participation": ParticipationOptions(attackers=2)},  # who behave, for the sake of comparison
        {"participation": ParticipationOptions(attack="backdoor", attackers=2)},
    ):
        validate(Run(**changes))


def test_training_alone_is_compared_with_whatever_happens_to_messages():
    """Nothing of it is sent; who would attack is scored in neither."""
    attacked = ParticipationOptions(attack="scale", attackers=2)
    base = Run(messages=MessageOptions(pool="krum", hostile=2), participation=attacked, out=Path("unused"))
    validate_comparison(Compare(methods=("local", "plora"), base=base))
    alone = make_baseline(base)
    assert alone.participation == ParticipationOptions(attackers=2)
    assert alone.messages == MessageOptions()
    for changes in ({"messages": base.messages}, {"participation": attacked}):
        with pytest.raises(UserError, match="means nothing to any of --methods local"):
            validate_comparison(Compare(methods=("local",), base=Run(**changes)))


# --- The contract, on the method's own aggregate ---


class Case:
    """A method with a pool, messages of the shapes that its clients send, and its aggregate, compiled once."""

    def __init__(self, name, pool):
        _, params, trainer, plain, adapter = make_method(name, population=CLIENTS, cohort=CLIENTS, places=CLIENTS)
        self.plain, self.method = plain, with_pool(plain, make_pool(MessageOptions(pool=pool, hostile=2, bound=0.1)))
        self.server = self.method.init(adapter=adapter)
        one = jax.eval_shape(self.send(params, trainer, self.method), jax.random.key(0))
        rng, self.compiled = np.random.default_rng(3), 0
        self.messages = jax.tree.map(lambda leaf: rng.normal(size=(CLIENTS, *leaf.shape)).astype(np.float32) / 10, one)

        def aggregate(server, messages, weights, numbers):
            self.compiled += 1
            ctx = Context(params, jnp.int32(1), 0, {}, None, jax.random.key(1), numbers)
            return self.method.aggregate(ctx, server=server, messages=messages, weights=weights)

        self.aggregate = jax.jit(aggregate)

    def send(self, params, trainer, method):
        cohort = jax.tree.map(jnp.asarray, take(make_cohort(1), 0))

        def play(key):
            frame = Frame(params, self.server, {"a": jnp.float32(0), "b": jnp.float32(0)}, jnp.int32(1), key)
            personal = method.init_client(key=key, server=self.server, number=jnp.int32(0))
            return make_client_round(method, trainer)(frame, personal, cohort).message

        return play

    def run(self, messages=None, weights=WEIGHTS, numbers=None):
        messages = self.messages if messages is None else messages
        return self.aggregate(self.server, messages, weights, np.arange(CLIENTS) if numbers is None else numbers)


make_case = functools.cache(Case)
# What pools do is theirs alone, so most methods meet one of them.
BROAD = [
    pytest.param(name, "krum", marks=pytest.mark.broad)
    for name in methods_available()
    if name not in (*ALL, "local") and (name, "krum") not in EVERY_TIME
]


def assert_close(got, want, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6, **tolerance}
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), got, want)


@pytest.mark.parametrize(("name", "pool"), [*EVERY_TIME, *BROAD])
def test_the_contract_of_a_round_holds(name, pool):
    case = make_case(name, pool)
    server, told = case.run()
    described = [jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype), part) for part in (server, case.server)]
    assert described[0] == described[1]
    moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), server, case.server)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert told["selection"].shape == (CLIENTS,)
    # It is the method's own step, with the pooled message as all that there is.
    pooled = make_pool(MessageOptions(pool=pool, hostile=2, bound=0.1)).run(
        Context({}, jnp.int32(1), 0, {}, None, jax.random.key(1), jnp.arange(CLIENTS)),
        state={}, messages=case.messages, weights=jnp.asarray(WEIGHTS),
    )  # fmt: skip
    single = jax.tree.map(lambda leaf: leaf[None], pooled.message)
    ctx = Context({}, jnp.int32(1), 0, {}, None, jax.random.key(1))
    server_of_plain = {part: value for part, value in case.server.items() if part != "pool"}
    want, _ = case.plain.aggregate(ctx, server=server_of_plain, messages=single, weights=jnp.ones(1))
    assert_close({part: value for part, value in server.items() if part != "pool"}, want)
    # Another order of the clients.
    order = np.random.default_rng(2).permutation(CLIENTS)
    other, permuted = case.run(take(case.messages, order), WEIGHTS[order], order)
    assert_close(other, server)
    np.testing.assert_allclose(permuted["selection"], np.asarray(told["selection"])[order], atol=1e-4)
    # Whoever has no weight, whatever it holds; all the others as if it were not there.
    weights = np.where(np.arange(CLIENTS) == 3, 0, WEIGHTS)
    weights = (weights / weights.sum()).astype(np.float32)
    results = []
    for poison in (np.nan, 1e30):
        messages = jax.tree.map(np.array, case.messages)
        jax.tree.map(lambda leaf, poison=poison: leaf.__setitem__(3, poison), messages)
        results.append(case.run(messages, weights))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0][1]["selection"][3] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[0]))
    # Nobody.
    nobody, _ = case.run(messages, np.zeros(CLIENTS, np.float32))
    assert_close(nobody, case.server, rtol=0, atol=0)
    assert case.compiled == 1


# --- The same inside of a compiled round ---


@pytest.fixture(scope="module")
def whole():
    """plora with a trimmed mean of sixteen: -> (cohort, weights, waves) -> the round's output."""
    _, params, trainer, plain, adapter = make_method("plora", population=16, cohort=16, places=16)
    method = with_pool(plain, make_pool(MessageOptions(pool="trimmed", hostile=3)))
    run, server = make_round(method, trainer, make_mesh(1)), method.init(adapter=adapter)
    states = start_states(method, server, 16)
    return lambda cohort, weights, **more: run_round(run, params, server, cohort, weights, states, **more), server


def test_nan_from_one_client_of_sixteen_changes_nothing_but_who_counts(whole):
    play, _ = whole
    cohort, weights = make_cohort(16), np.full(16, 1 / 16, np.float32)
    broken = jax.tree.map(np.array, cohort)
    broken.examples["image_features"][5] = np.nan
    out, personal = play(broken, weights)
    without, others = play(cohort, np.where(np.arange(16) == 5, 0, 1 / 15).astype(np.float32))
    assert out.weights[5] == 0
    assert out.finite
    assert_close(out.server, without.server, rtol=0, atol=0)
    assert_close(take(personal, np.arange(16) != 5), take(others, np.arange(16) != 5), rtol=0, atol=0)
    assert out.health["selection"][5] == 0
    waved, _ = play(broken, weights, waves=2)
    assert_close(waved.server, out.server)


def test_sixteen_of_sixteen_nan_leave_the_server_as_it_was(whole):
    play, server = whole
    cohort = jax.tree.map(np.array, make_cohort(16))
    cohort.examples["image_features"][:] = np.nan
    out, _ = play(cohort, np.full(16, 1 / 16, np.float32))
    assert out.weights.tolist() == [0.0] * 16
    assert_close(out.server, server, rtol=0, atol=0)


def test_a_run_has_the_pool_that_its_options_name_or_none():
    vlm, _, trainer, _, adapter = make_method("plora")
    setup = Setup(sites=vlm.sites, spec=SPEC, start_optimizer=trainer.start)
    assert "pool" not in make_run_method(Run(), setup).init(adapter=adapter)
    pooled = make_run_method(Run(messages=MessageOptions(pool="median")), setup)
    assert "pool" in pooled.init(adapter=adapter)
