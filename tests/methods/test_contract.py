"""What every method must keep, found by name: a new file in methods/ is tested here without being mentioned."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import RATES, WIDTH, make_cohort, make_method, run_round, start_states, take, trace_rounds

from fedvlm_jax import lora
from fedvlm_jax.config.run_options import methods_available
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.federation.client_round import Frame, make_client_round, start_personal
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.methods import Setup, load_method
from fedvlm_jax.methods.base import AVERAGING, Context, is_factor
from fedvlm_jax.methods.config import LocalOptions, ServerOptions, find_method_options, list_method_flags
from fedvlm_jax.methods.zoo import fedrpca, pfedmma
from fedvlm_jax.utils import tree

CLIENTS = 4
WEIGHTS = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
SENT = {
    **dict.fromkeys(("local",), ()),
    **dict.fromkeys(("plora", "plora-reset-a", "ffa-lora", "rolora", "fedsvd"), ("b",)),
    **dict.fromkeys(("fedsa-lora",), ("a",)),
    **dict.fromkeys(("fed-sb",), ("r",)),
    **dict.fromkeys(("ce-lora",), ("c",)),
    **dict.fromkeys(("fedavg-lora", "iat", "iat-inverted", "hetlora", "lora-fair", "flexlora", "fedrpca"), ("a", "b")),
    **dict.fromkeys(("flora", "fedex-lora", "ditto", "apfl", "pfedme", "feddpa-t", "feddpa-f"), ("a", "b")),
    **dict.fromkeys(("feddat", "hilora", "fedtreelora"), ("a", "b")),
    "fedlease": ("a", "b", "gate"),
    **dict.fromkeys(("fedalt", "fedmosaic", "pfit"), ("a", "b")),
    **dict.fromkeys(("pftt",), ("down", "up")),
    **dict.fromkeys(("promptfl", "fedotp", "fedpgp", "pfedmoap"), ("prompt",)),
    **dict.fromkeys(("pfedmma",), ("middle",)),
}
"""What a message holds, by the methods' papers; of rolora in its first phase."""

TRAINED_APART = {
    "apfl": "its two models step side by side inside a scan: held against the paper in test_papers.py",
    "feddpa-t": "its model joins the pairs of two trainings: held against the paper in test_papers.py",
    "feddat": "its two adapters step in turn inside a scan: held against the paper in test_papers.py",
}
"""Methods whose model at the end is not that of one training, the last: name -> why, and where it is tested."""

POOLED = ("fedmosaic", "ce-lora")
"""Methods that weigh what others sent in earlier rounds anew, by how alike it is to what the client sent last."""

LIKE_LOCAL = (
    *("fedavg-lora", "plora", "plora-reset-a", "fedsa-lora", "iat", "iat-inverted"),
    *("fedex-lora", "flexlora", "hetlora", "lora-fair", "fedrpca"),
)
"""Methods that train both factors and average, so that with one client they are local training."""

BEGIN_ANEW = ("flexlora", "plora-reset-a")
"""Those of them whose second round begins with another basis, or another A, than the first ended with."""

KEEP_NOTHING = {"hilora": (0, 1)}
"""Phases in which clients train what all or a cluster share, and keep nothing of it: name -> phases."""

CHOICES = {
    "fedrpca": {"options": fedrpca.Options(beta=1.0)},  # above 1 it amplifies, with one client too
    "pfedmma": {"options": pfedmma.Options(scale=1.0)},  # at its default a few steps hardly move the model
    # A gate between nearly equal experts has gradients of the size of rounding, of which AdamW makes whole steps.
    "fedlease": {"optimizer": "sgd"},
    "pfedmoap": {"optimizer": "sgd"},
}

OTHER_FORWARD = ("fedotp",)
"""Methods that compare pictures and classes otherwise than the base does, so that a fresh client is not the base."""

VALUES = {
    ("hilora", "--method.root"): 0.7,  # with the others' shares not more than all rounds
    ("hilora", "--method.cluster"): 0.6,
    ("pfedmoap", "--method.experts"): 2,
    ("pfedmoap", "--method.gate-width"): 8,
    ("pfedmma", "--method.layers"): 1,
}
"""Values of options at which a tiny model differs from what it does at the default."""


@pytest.mark.parametrize("name", methods_available())
def test_a_client_begins_with_the_adapter_that_is_given_or_the_method_refuses_it(name):
    vlm, params, _, method, adapter = make_method(name)
    if method.classes:  # what it trains is in no folder of PEFT's
        assert "start" in method.refuses
        return
    given = {path: leaf + 0.5 if path.endswith("/b") else leaf for path, leaf in tree.flatten(adapter).items()}
    server = method.init(adapter=tree.unflatten(given))
    personal = start_personal(method, jax.random.key(3), server, jnp.int32(0))
    used = method.personalise(server=server, personal=personal)
    batch = {"image_features": INPUTS, "labels": np.zeros((len(INPUTS), 3), np.int32)}
    wanted, found = (vlm.logits(params, one, batch) for one in (tree.unflatten(given), used))
    kept = np.allclose(found, wanted, atol=1e-5)
    # A client of flora has it until its first round, in which it draws factors of its own.
    assert (kept and name != "flora") == ("start" not in method.refuses)


INPUTS = np.random.default_rng(5).normal(size=(7, WIDTH)).astype(np.float32)


ROUNDS = 4


class Moment(NamedTuple):
    """A round of a method: what it began with, what it read, and what came of it."""

    number: int
    phase: int
    server: Any
    states: Any
    cohort: Any
    out: Any
    personal: Any


class Case:
    """A method on the toy model with its compiled round, and four rounds in a row; made once per method.

    The first round and the third are looked at, and the first one of every other phase.
    """

    def __init__(self, name, change=lambda method: method, **choices):
        self.name = name
        choices = {**CHOICES.get(name, {}), **choices}
        self.vlm, self.params, self.trainer, method, self.adapter = make_method(name, **choices)
        self.method = change(method)
        self.round = make_round(self.method, self.trainer, make_mesh(1))
        self.server = self.method.init(adapter=self.adapter)
        self.states = start_states(self.method, self.server, CLIENTS)
        self.fresh = self.method.init_client(key=jax.random.key(0), server=self.server, number=jnp.int32(0))
        self.rounds = list(self.play())
        others = {at.phase: at for at in reversed(self.rounds)}
        self.moments = [at for at in self.rounds if at.number in (1, 3) or others[at.phase] is at]
        self.out, self.personal, self.cohort = self.rounds[0].out, self.rounds[0].personal, self.rounds[0].cohort

    def phase_of(self, number):
        return self.method.phase(number)

    def play(self):
        server, states = self.server, self.states
        for number in range(1, ROUNDS + 1):
            cohort = make_cohort(CLIENTS, seed=number)._replace(new=np.full(CLIENTS, number == 1))
            out, personal = self.run(cohort, WEIGHTS, states, server=server, round_=number)
            yield Moment(number, self.phase_of(number), server, states, cohort, out, personal)
            server, states = jax.tree.map(np.asarray, out.server), personal

    def run(self, cohort, weights, states, server=None, round_=1, **options):
        server, phase = self.server if server is None else server, self.phase_of(round_)
        options = {"round_": round_, "phase": phase, **options}
        return run_round(self.round, self.base(server), server, cohort, weights, states, **options)

    def again(self, at, cohort=None, weights=WEIGHTS, states=None, **options):
        """The moment's round once more, with something else about it."""
        cohort, states = (at.cohort if cohort is None else cohort), (at.states if states is None else states)
        return self.run(cohort, weights, states, **{"server": at.server, "round_": at.number, **options})

    def before(self, at, k):
        """A client's state when the round began."""
        if at.number == 1:
            return start_personal(self.method, jax.random.key(3), at.server, jnp.int32(k))
        return row(at.states, k)

    def base(self, server):
        mesh = make_mesh(1)
        return (
            self.params
            if self.method.base is None
            else self.method.base(params=self.params, server=replicate(mesh, server))
        )

    def model(self, server, adapter):
        """What a client with this adapter says to a few inputs."""
        batch = {"image_features": INPUTS, "labels": np.zeros((len(INPUTS), 3), np.int32)}
        return np.asarray(self.vlm.logits(self.base(server), adapter, batch))


def make_context(params, train, number=1, phase=0):
    key = jax.random.key(number)
    return Context(params=params, round=jnp.int32(number), phase=phase, rates=RATES, train=train, key=key)


def row(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


make_case = functools.cache(Case)


EVERY_TIME = ("plora", "local", "flora", "pfedme", "fedalt")
"""One of each kind, in the ordinary suite: one part shared, nothing shared, a base that moves, a model beside the
shared one, what others sent delivered. All others that ship are broad tests; a new file is tried every time."""

RULES = ("fedavg-lora", "fedsa-lora", "ffa-lora", "iat", "iat-inverted", "plora-reset-a")
"""Rules of what is shared and no code beside: what takes another program to compile is a slow test of them."""

UNLIKE = ("rolora", "apfl", "fedmosaic", "fedrpca")
"""Two phases, two models in one scan, what was sent kept by the clients' numbers, an average of its own: with those
of every time they stand for all methods where the engine makes all alike."""


def each(methods, slow=()):
    def mark(name):
        return pytest.mark.slow if name in slow else pytest.mark.broad

    broad = SENT.keys() - set(EVERY_TIME)
    return [pytest.param(name, marks=mark(name)) if name in broad else name for name in methods]


unless_a_rule = pytest.mark.parametrize("case", each(methods_available(), slow=RULES), indirect=True)
of_each_kind = pytest.mark.parametrize("case", each(methods_available(), slow=SENT.keys() - set(UNLIKE)), indirect=True)


@pytest.fixture(scope="module", params=each(methods_available()))
def case(request):
    return make_case(request.param)


def is_moment(path):
    """A leaf of the state that optax's Adam keeps."""
    return any(getattr(key, "name", "") in ("count", "mu", "nu") for key in path)


def sites(adapter):
    return {path.rpartition("/")[0] for path in tree.flatten(adapter)}


def assert_close(got, want, **options):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    options = {"rtol": 2e-5, "atol": 2e-6, **options}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), got, want)


def later(at):
    """Rounding of one round grows in those that follow: AdamW divides by the size of a gradient, however small."""
    return {} if at.number == 1 else {"rtol": 2e-4, "atol": 2e-5}


def test_structure_shapes_and_types_are_kept(case):
    def describe(part):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), part)

    for at in case.moments:
        assert describe(at.out.server) == describe(case.server)
        assert describe(at.personal) == describe(case.states)
        own, message = row(at.personal, 0), row(at.out.messages, 0)
        adapter = case.method.personalise(server=at.out.server, personal=own)
        assert describe(adapter) == describe(case.method.trained(server=at.server, personal=own, message=message))
        assert describe(adapter) == describe(case.method.personalise(server=case.server, personal=case.fresh))
        assert {site for site in sites(adapter) if not site.startswith("head/")} == sites(case.adapter)


def test_a_fresh_client_has_the_bare_base(case):
    if case.name in OTHER_FORWARD:
        pytest.skip("it compares pictures and classes otherwise")
    adapter = case.method.personalise(server=case.server, personal=case.fresh)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if case.method.classes else {"atol": 1e-6}  # of logits up to 20
    np.testing.assert_allclose(case.model(case.server, adapter), case.model(case.server, None), **tolerance)


def test_training_moves_the_model_and_never_the_scale(case):
    for at in case.moments:
        old = case.method.personalise(server=at.server, personal=case.before(at, 1))
        new = case.method.personalise(server=at.out.server, personal=row(at.personal, 1))
        moved = np.abs(case.model(at.out.server, new) - case.model(at.server, old)).max()
        assert moved > 1e-3, f"round {at.number}"
        scales = (tree.partition(part, lambda path: path.endswith("scale"))[0] for part in (new, old))
        assert_close(*scales, rtol=0, atol=0)


def test_numbers_stay_finite(case):
    for at in case.moments:
        for leaf in jax.tree.leaves((at.out.server, at.personal, at.out.messages, at.out.metrics, at.out.health)):
            assert np.isfinite(leaf).all(), f"round {at.number}"


def test_permuting_clients_permutes_results(case):
    order = [2, 0, 3, 1]
    for at in case.moments:
        states = at.states if at.number == 1 else take(at.states, order)
        out, personal = case.again(at, take(at.cohort, order), WEIGHTS[order], states)
        assert_close(out.server, at.out.server, **later(at))
        assert_close(personal, take(at.personal, order), **later(at))


def test_weights_count_unless_the_method_says_why_not(case):
    """In every round that sends something."""
    for at in case.moments:
        out, personal = case.again(at, weights=np.full_like(WEIGHTS, 1 / CLIENTS))
        now, then = (out.server, personal), (at.out.server, at.personal)
        equal = jax.tree.map(lambda x, y: np.allclose(x, y, rtol=0, atol=1e-7), now, then)
        moot = "train.weighting" in case.method.refuses or not jax.tree.leaves(at.out.messages)
        assert all(jax.tree.leaves(equal)) == moot, f"round {at.number}"


@of_each_kind
def test_waves_change_nothing(case):
    """Four waves of one client each are another program to compile, which the engine makes alike for all methods."""
    for at, waves in itertools.product(case.moments, (2, 4) if case.name == "plora" else (2,)):
        out, personal = case.again(at, waves=waves)
        assert_close(out.server, at.out.server, **later(at))
        assert_close(personal, at.personal, **later(at))
        assert_close(out.messages, at.out.messages, **later(at))


def test_a_client_s_view_does_what_the_server_s_state_does(case):
    """Bit for bit: to begin, to train, to use the model, and the base under it. What the view lacks nobody reads."""
    check_views(case)


@pytest.mark.broad
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("fedavg-lora", {"local": LocalOptions(scaffold=True), "optimizer": "sgd"}),
        ("plora", {"local": LocalOptions(proximal=0.5), "server": ServerOptions(optimizer="adam")}),
        ("fedsa-lora", {"ranks": (1, 2, 1, 2)}),
        ("flora", {"ranks": (1, 2, 1, 2)}),
        ("plora", {"common_start": False, "keep_optimizer": False}),
        ("ce-lora", {"common_start": False, "keep_optimizer": False}),
    ],
)
def test_views_and_means_with_options(name, choice):
    case = Case(name, **choice)
    check_views(case)
    check_linear(case, case.method)


def check_views(case):
    method = case.method
    last = dict.fromkeys(range(CLIENTS))
    for at, sent in zip(case.rounds, [None, *[at.out.messages for at in case.rounds]], strict=False):
        if sent is not None:
            last = {k: row(sent, k) for k in range(CLIENTS)}
        received = {k: method.broadcast(server=at.server, number=jnp.int32(k), last=last[k]) for k in (0, CLIENTS - 1)}
        for k in received if at in case.moments else ():
            view = method.view(start=case.server, received=received[k])
            assert_close(case.base(view), case.base(at.server), rtol=0, atol=0)

            def play(server, at=at, k=k):
                key, number = jax.random.key(5), jnp.int32(k)
                before = case.before(at, k)
                used = method.personalise(server=server, personal=before)
                client_round = make_client_round(method, case.trainer)
                frame = Frame(case.base(at.server), server, RATES, jnp.int32(at.number), key)
                client = row(at.cohort, k)._replace(new=jnp.asarray(False))
                new = jax.jit(client_round, static_argnames="phase")(frame, before, client, phase=at.phase)
                ended = method.trained(server=server, personal=new.personal, message=new.message)
                return start_personal(method, key, server, number), used, new, ended

            got, want = play(view), play(at.server)
            assert_close(got, want, rtol=0, atol=0)


def test_the_mean_of_the_messages_is_enough_where_the_method_says_so(case):
    """And nowhere else: a method that is linear, and does not say so, could not be summed in secret."""
    check_linear(case, make_method(case.name)[3])


def check_linear(case, method):
    enough = []
    for at in case.moments:
        ctx = make_context(case.base(at.server), None, at.number, at.phase)
        ctx = ctx._replace(numbers=jnp.arange(CLIENTS))
        weights = jnp.asarray(WEIGHTS)
        whole, _ = method.aggregate(ctx, server=at.server, messages=at.out.messages, weights=weights)
        mean = jax.tree.map(lambda leaf: leaf[None], tree.weighted_sum(at.out.messages, weights))
        ctx = ctx._replace(numbers=jnp.arange(1))
        try:
            alone, _ = method.aggregate(ctx, server=at.server, messages=mean, weights=jnp.ones(1))
        except (TypeError, ValueError):  # as the base's updates, which are as wide as there are messages
            enough.append(False)
            continue
        same = jax.tree.map(lambda x, y: x.shape == y.shape and np.allclose(x, y, rtol=1e-5, atol=1e-7), alone, whole)
        enough.append(all(jax.tree.leaves(same)))
    assert all(enough) == method.linear


@unless_a_rule
@pytest.mark.parametrize("poison", [np.nan, -7.0])
def test_a_client_of_weight_zero_changes_nothing(case, poison):
    """Whatever it computed: what is not finite may be skipped by chance, so that there are numbers as well."""
    weights, three = np.asarray([0.2, 0.3, 0.5, 0.0], np.float32), [0, 1, 2]
    for at in case.moments:
        cohort = jax.tree.map(np.array, at.cohort)
        cohort.examples["image_features"][3] *= poison
        out, personal = case.again(at, cohort, weights)
        alone, alone_personal = case.again(at, take(at.cohort, three), weights[:3], take(at.states, three))
        assert_close(out.server, alone.server, **later(at))
        assert_close(take(personal, three), alone_personal, **later(at))


@unless_a_rule
@pytest.mark.parametrize("poison", [np.nan, 3e38])
def test_a_client_whose_numbers_are_not_finite_is_left_out(case, poison):
    """As if it had not been drawn; it keeps its state, and the others' weights add up to one."""
    for at in case.moments:
        cohort = jax.tree.map(np.array, at.cohort)
        cohort.examples["image_features"][1] = poison
        out, personal = case.again(at, cohort)
        assert not np.isfinite(out.metrics["loss"][1])
        three, weights = [0, 2, 3], np.asarray([1, 3, 4], np.float32) / 8
        alone, others = case.again(at, take(at.cohort, three), weights, take(at.states, three))
        np.testing.assert_allclose(out.weights, np.asarray([1, 0, 3, 4]) / 8, rtol=1e-6)
        assert out.finite
        assert_close(out.server, alone.server, **later(at))
        assert_close(take(personal, three), others, **later(at))
        assert_close(row(personal, 1), case.before(at, 1), rtol=0, atol=0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out.server, personal, out.messages)))


def test_where_no_client_s_numbers_are_finite_nothing_changes(case):
    cohort = make_cohort(CLIENTS)
    cohort.examples["image_features"][:] = np.nan
    out, personal = case.run(
        cohort._replace(new=np.zeros(CLIENTS, bool)), WEIGHTS, case.personal, server=case.out.server, round_=2
    )
    assert out.weights.tolist() == [0.0] * CLIENTS
    assert_close(out.server, case.out.server, rtol=0, atol=0)
    assert_close(personal, case.personal, rtol=0, atol=0)


def test_nobody_counts_and_the_server_stays(case):
    """In later rounds momentum of former ones might drive it on."""
    for at in case.moments:
        out, _ = case.again(at, weights=np.zeros(CLIENTS))
        assert_close(out.server, at.server, rtol=0, atol=0)


@of_each_kind
def test_masked_steps_and_padded_rows_change_nothing(case):
    for at in case.moments:
        cohort = at.cohort
        rows = {name: np.concatenate([x, 7 * x[:, :2]], axis=1) for name, x in cohort.examples.items()}
        indices = np.concatenate([cohort.indices, np.full_like(cohort.indices[:, :1], 11)], axis=1)
        indices = np.concatenate([indices, np.zeros_like(indices[..., :1])], axis=2)
        mask = np.zeros(indices.shape, bool)
        mask[:, :-1, :-1] = True
        rows["labels"] = np.minimum(rows["labels"], 4)
        out, personal = case.again(at, cohort._replace(examples=rows, indices=indices, mask=mask))
        assert_close(out.server, at.out.server, **later(at))
        assert_close(personal, at.personal, **later(at))


def test_an_empty_client_keeps_its_start(case):
    for at in case.moments:
        cohort = jax.tree.map(np.array, at.cohort)
        cohort.mask[1] = False
        out, personal = case.again(at, cohort, np.asarray([0.3, 0.0, 0.3, 0.4]))
        assert_close(row(personal, 1), case.before(at, 1), rtol=0, atol=0)
        assert np.isfinite(out.metrics["loss"]).all()


@unless_a_rule
def test_one_client_alone_is_not_changed_by_averaging(case):
    for at in case.moments[:1] if case.name in POOLED else case.moments:
        out, personal = case.again(at, take(at.cohort, [2]), [1.0], take(at.states, [2]))
        own, message = row(personal, 0), row(out.messages, 0)
        after = case.method.personalise(server=out.server, personal=own)
        before = case.method.trained(server=at.server, personal=own, message=message)
        np.testing.assert_allclose(case.model(out.server, after), case.model(at.server, before), atol=1e-5, rtol=1e-5)


def test_trained_is_the_model_at_the_end_of_local_training(case):
    """What the method makes of the message is what its last training ended with, assembled as it was trained.

    Training is made up here, so that this runs without compiling: every leaf that is trained moves.
    """
    if case.name in TRAINED_APART:
        pytest.skip(TRAINED_APART[case.name])
    for at in case.moments:
        ended = []
        ctx = make_context(case.base(at.server), make_believe(ended), at.number, at.phase)
        state, message, _ = case.method.client_update(
            ctx, server=at.server, personal=case.before(at, 1), client=row(at.cohort, 1), key=jax.random.key(1)
        )
        got = case.method.trained(server=at.server, personal=state, message=message)
        np.testing.assert_allclose(case.model(at.server, got), case.model(at.server, ended[-1]), rtol=1e-5, atol=1e-5)


def make_believe(ended):
    """A training that moves what it should by made-up amounts, and notes the adapter that comes of it."""

    def train(factors, optimizer, client, *, trained=is_factor, assemble=lambda factors: factors, nudge=None):
        del client, nudge
        flat = tree.flatten(factors)
        moved = {
            path: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32) + len(ended)).reshape(leaf.shape)
            if trained(path)
            else leaf
            for path, leaf in flat.items()
        }
        factors = tree.unflatten(moved)
        ended.append(assemble(factors))
        metrics = dict.fromkeys(("loss", "gradient_norm", "last_loss"), jnp.float32(1)) | {"steps": jnp.int32(3)}
        return factors, optimizer, metrics

    return train


@pytest.mark.parametrize("case", each(LIKE_LOCAL, slow=RULES), indirect=True)
def test_with_one_client_averaging_is_local_training(case):
    """In two rounds, where the second goes on with all that local training goes on with."""
    local = make_case("local")
    ended = []
    for one in (case, local):
        server, states = one.server, start_states(one.method, one.server, 1)
        for at in case.rounds[: 1 if case.name in BEGIN_ANEW else 2]:
            out, states = one.run(take(at.cohort, [2]), [1.0], states, server=server, round_=at.number)
            server = out.server
        ended.append(one.model(server, one.method.personalise(server=server, personal=row(states, 0))))
    np.testing.assert_allclose(*ended, atol=2e-5)


def test_old_clients_go_on_from_their_own_state_and_new_ones_do_not(case):
    """A newcomer inherits nobody's private factors or momentum, whatever lies in its place in memory."""
    newcomers = np.asarray([True, False, True, False])
    for at in case.moments:
        cohort = at.cohort._replace(new=newcomers)
        rubbish = jax.tree.map(
            lambda x: np.where(newcomers.reshape(-1, *[1] * (x.ndim - 1)), 77, x).astype(x.dtype), at.personal
        )
        got, personal = case.again(at, cohort, states=rubbish)
        clean, clean_personal = case.again(at, cohort, states=at.personal)
        assert_close(personal, clean_personal, rtol=0, atol=0)
        assert_close(got.server, clean.server, rtol=0, atol=0)
        if all(path[-1] == jax.tree_util.DictKey("scale") for path, _ in jax.tree_util.tree_leaves_with_path(personal)):
            assert case.name in ("flora", "flexlora"), f"{case.name}: a client that keeps nothing"
            continue
        newborn = case.again(at, at.cohort._replace(new=np.ones(CLIENTS, bool)))[1]
        same = jax.tree.map(np.array_equal, row(personal, 1), row(newborn, 1))
        begins_anew = case.name in BEGIN_ANEW or at.phase in KEEP_NOTHING.get(case.name, ())
        assert all(jax.tree.leaves(same)) == begins_anew, f"round {at.number}"


@of_each_kind
def test_rounds_follow_each_other(case):
    """All rounds with everything that is carried over, in one wave and in two, in another order of clients."""
    order = np.asarray([3, 1, 0, 2])
    server, states = case.server, start_states(case.method, case.server, CLIENTS)
    for at in case.rounds:
        out, states = case.run(take(at.cohort, order), WEIGHTS[order], states, server=server, round_=at.number, waves=2)
        server = out.server
    assert_close(server, case.rounds[-1].out.server, rtol=1e-4, atol=2e-5)
    assert_close(states, take(case.rounds[-1].personal, order), rtol=1e-4, atol=2e-5)


def test_a_kept_optimizer_is_used(case):
    """AdamW's moments of a phase's first round, where a client keeps them, count in its second."""
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(case.personal) if is_moment(path)]
    for phase in {at.phase for at in case.rounds}:
        several = [at for at in case.rounds if at.phase == phase]
        if len(several) < 2:
            continue
        at = several[1]
        forgotten = jax.tree_util.tree_map_with_path(lambda path, x: x * (not is_moment(path)), at.states)
        lost = case.again(at, states=forgotten)[1]
        same = jax.tree.map(np.array_equal, at.personal, lost)
        assert bool(moments) != all(jax.tree.leaves(same)), f"phase {phase}"


def test_another_basis_starts_the_optimizer_anew():
    """fedsvd renews A after every second round: what AdamW remembers counts in round 2, and in round 3 no more."""
    case = make_case("fedsvd")
    for at, counts in zip(case.rounds[1:3], (True, False), strict=True):
        forgotten = jax.tree_util.tree_map_with_path(lambda path, x: x * (not is_moment(path)), at.states)
        same = jax.tree.map(np.array_equal, at.personal, case.again(at, states=forgotten)[1])
        assert all(jax.tree.leaves(same)) != counts


@pytest.mark.parametrize("name", methods_available())
def test_an_optimizer_that_starts_anew_is_not_kept(name):
    *_, method, adapter = make_method(name, keep_optimizer=False)
    state = jax.eval_shape(
        lambda: method.init_client(key=jax.random.key(0), server=method.init(adapter=adapter), number=jnp.int32(0))
    )
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if is_moment(path)]


def test_pfedme_keeps_its_personal_model_s_optimizer_alone():
    states = {name: make_case(name).fresh for name in ("fedavg-lora", "pfedme")}
    kept = [sum(is_moment(path) for path, _ in jax.tree_util.tree_leaves_with_path(s)) for s in states.values()]
    assert kept[0] == kept[1] > 0


DRIFTS = {
    "plora, ranks": ("plora", {"ranks": (1, 2, 1, 2)}),
    "plora, an A each": ("plora", {"common_start": False}),
    "plora, both": ("plora", {"ranks": (1, 2, 1, 2), "common_start": False}),
    "plora-reset-a, both": ("plora-reset-a", {"ranks": (1, 2, 1, 2), "common_start": False}),
    "fedmosaic, an A each": ("fedmosaic", {"common_start": False}),
}


@pytest.mark.parametrize("which", DRIFTS)
def test_who_does_not_move_has_not_drifted(which):
    """At rates of 0, and by as much as A moved otherwise: from the client's own start, in its own rank."""
    name, choices = DRIFTS[which]
    _, params, _, method, adapter = make_method(name, **choices)
    server, client = method.init(adapter=adapter), row(make_cohort(CLIENTS), 1)
    personal = method.init_client(key=jax.random.key(1), server=server, number=jnp.int32(0))
    drifts = []
    for moved in (0.0, 0.1):

        def train(factors, optimizer, client, *, moved=moved, **choices):
            scaled = jax.tree_util.tree_map_with_path(lambda path, x: (1 + moved * (path[-1].key == "a")) * x, factors)
            return scaled, optimizer, {"loss": jnp.float32(1)}

        ctx = make_context(params, train)
        drifts.append(
            float(
                method.client_update(ctx, server=server, personal=personal, client=client, key=jax.random.key(1))[2][
                    "personal_drift"
                ]
            )
        )
    assert drifts == pytest.approx([0.0, 0.1], abs=1e-6)


@pytest.mark.parametrize("name", ["flexlora", "plora-reset-a", "flora"])
def test_a_new_basis_in_every_round_keeps_no_optimizer(name):
    *_, method, adapter = make_method(name)
    state = jax.eval_shape(
        lambda: method.init_client(key=jax.random.key(0), server=method.init(adapter=adapter), number=jnp.int32(0))
    )
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if is_moment(path)]


def test_one_compile_for_all_rounds_and_rates(case):
    before = case.round._cache_size()
    for number in range(ROUNDS + 1, 2 * ROUNDS + 1):
        last = case.rounds[(number - 1) % ROUNDS]
        case.again(last, round_=number, phase=last.phase, rates={"a": jnp.float32(number), "b": jnp.float32(1)})
    assert case.round._cache_size() == before


def test_what_travels(case):
    """No scale, no optimiser's state: a message is at most as large as what a client trains."""
    trained = tree.partition(
        case.method.personalise(server=case.server, personal=case.fresh), lambda path: not path.endswith("scale")
    )
    for at in case.moments:
        sent = tree.flatten(at.out.messages)
        assert "scale" not in {path.rpartition("/")[2] for path in sent}
        assert sum(leaf[0].size for leaf in sent.values()) <= sum(leaf.size for leaf in jax.tree.leaves(trained[0]))


def break_later_rounds(method):
    """From its second round on: whoever stands first replaces everybody, and more is added where nobody counts."""

    def aggregate(ctx, server, messages, weights):
        server, health = method.aggregate(ctx, server=server, messages=messages, weights=weights)
        if ctx.phase:
            server = {**server, "shared": jax.tree.map(lambda x, m: x + m[0] + 1, server["shared"], messages)}
        return server, health

    def client_update(ctx, server, personal, client, key):
        ctx = ctx._replace(phase=0)
        return method.client_update(ctx, server=server, personal=personal, client=client, key=key)

    def trained(server, personal, message):
        return method.personalise(server=server, personal=personal)

    return dataclasses.replace(
        method, client_update=client_update, aggregate=aggregate, trained=trained, phase=lambda number: int(number > 1)
    )


@pytest.fixture(scope="module")
def broken():
    """A method that is right in its first phase alone."""
    return Case("fedavg-lora", break_later_rounds)


@pytest.mark.parametrize("check", [test_permuting_clients_permutes_results, test_nobody_counts_and_the_server_stays])
def test_a_method_that_is_wrong_in_a_later_phase_does_not_pass(broken, check):
    first, whole = broken.moments[:1], broken.moments
    assert [at.phase for at in whole] == [0, 1, 1]
    try:
        broken.moments = first
        check(broken)
        broken.moments = whole
        with pytest.raises(AssertionError):
            check(broken)
    finally:
        broken.moments = whole


def test_a_method_that_tells_another_model_as_trained_does_not_pass(broken):
    with pytest.raises(AssertionError):
        test_trained_is_the_model_at_the_end_of_local_training(broken)


@pytest.mark.parametrize("name", SENT)
def test_shipped_methods_send_what_their_papers_say(name):
    phases, rounds = trace_rounds(name)
    messages = rounds[phases[0]][1].messages
    assert {path.rpartition("/")[2] for path in tree.flatten(messages)} == set(SENT[name])


def test_what_the_server_renews_goes_down_too():
    case = make_case("fedsvd")
    up, down = case.method.travels(server=case.out.server, messages=jax.eval_shape(lambda x: x, case.out.messages))
    assert {path.rpartition("/")[2] for path in tree.flatten(up)} == {"b"}
    assert {path.rpartition("/")[2] for path in tree.flatten(down)} == {"a", "b"}


def test_private_start_common_or_own():
    for common in (True, False):
        _, _, _, method, adapter = make_method("plora", common_start=common)
        server = method.init(adapter=adapter)
        one, two = (
            method.init_client(key=jax.random.key(k), server=server, number=jnp.int32(k))["own"] for k in (1, 2)
        )
        assert np.array_equal(one["encoder"]["fc1"]["a"], two["encoder"]["fc1"]["a"]) == common
        assert set(one["encoder"]["fc1"]) == {"a", "scale"}


def test_who_never_sent_is_equally_like_all():
    """fedmosaic, where clients drew an A each: the mixture is the mean of the pool, and not weighed by the draw."""
    *_, method, adapter = make_method("fedmosaic", common_start=False)
    server = method.init(adapter=adapter)
    drawn = [method.init_client(key=jax.random.key(k), server=server, number=jnp.int32(k))["own"] for k in (7, 8)]
    start = server["start"]
    moved = jax.tree.map(lambda first, *own: jnp.stack([x - first for x in own] + [0 * first] * 2), start, *drawn)
    server["pool"] |= {"moved": moved, "number": jnp.asarray([7, 8, -1, -1]), "round": jnp.asarray([1, 1, 0, 0])}
    adapter = method.personalise(
        server=server, personal=method.init_client(key=jax.random.key(7), server=server, number=jnp.int32(1))
    )
    mean = (drawn[0]["encoder"]["fc1"]["a"] + drawn[1]["encoder"]["fc1"]["a"]) / 2
    assert_close(adapter["encoder"]["fc1"]["a"][:, 2:], mean)


@pytest.mark.parametrize("common", [True, False])
def test_a_restart_goes_back_to_where_the_client_began(common):
    """Two rounds of plora-reset-a from one server begin alike, also where clients drew an A each."""
    _, params, _, method, adapter = make_method("plora-reset-a", common_start=common)
    server, client = method.init(adapter=adapter), row(make_cohort(1), 0)
    drawn = [method.init_client(key=jax.random.key(k), server=server, number=jnp.int32(k)) for k in (1, 2)]
    for state in drawn:
        rounds = []
        for number in (1, 2):
            ended = []
            ctx = make_context(params, make_believe(ended), number)
            state, _, _ = method.client_update(
                ctx, server=server, personal=state, client=client, key=jax.random.key(number)
            )
            rounds.append(ended[-1])
            assert_close(
                method.personalise(server=server, personal=state)["encoder"]["fc1"]["a"],
                ended[-1]["encoder"]["fc1"]["a"],
            )
        assert_close(*rounds, rtol=0, atol=0)
    same = np.array_equal(*(state["own"]["encoder"]["fc1"]["a"] for state in drawn))
    assert same == common


def test_weighted_mean_of_published_vectors():
    """FedAvgM's example: weights 1 and 2, matrices of integers; and scalars 1 (n = 1), 3 (n = 2) -> 7/3."""
    stacked = {
        "matrix": np.asarray([[[1, 2, 3], [4, 5, 6]], [[29, 23, 19], [17, 13, 11]]], np.float32),
        "scalar": np.asarray([1, 3], np.float32),
    }
    mean = jax.jit(tree.weighted_sum)(stacked, np.asarray([1 / 3, 2 / 3], np.float32))
    np.testing.assert_allclose(mean["matrix"], [[59 / 3, 16, 41 / 3], [38 / 3, 31 / 3, 28 / 3]], rtol=1e-6)
    np.testing.assert_allclose(mean["scalar"], 7 / 3, rtol=1e-6)


def test_rules_make_methods():
    """A stranger's rule becomes a method: share B of one layer only."""
    from toy import SPEC, make_toy

    from fedvlm_jax.federation.local_training import make_local_trainer
    from fedvlm_jax.methods.base import Setup
    from fedvlm_jax.methods.rule_based import make_share_method
    from fedvlm_jax.objectives import load_objective

    vlm, params = make_toy()
    trainer = make_local_trainer(vlm, load_objective("sft"))
    setup = Setup(sites=vlm.sites, spec=SPEC, start_optimizer=trainer.start)
    method = make_share_method("mine", "here", lora.Rule("fc2/b$"), setup)
    server = method.init(adapter=lora.init(jax.random.key(0), vlm.sites, SPEC))
    run = make_round(method, trainer, make_mesh(1))
    out, _ = run_round(run, params, server, make_cohort(2), [0.5, 0.5], start_states(method, server, 2))
    assert list(tree.flatten(out.messages)) == ["decoder/fc2/b"]


def change(name, option):
    """Choices for `make_method` in which an option is not at its default."""
    if option.startswith("--method."):
        default = find_method_options(name)()
        field = next(
            f for f in dataclasses.fields(default) if option == f"--method.{f.name.rstrip('_').replace('_', '-')}"
        )
        # A pattern of the sites' paths, of which the toy has fc1 and fc2.
        kinds = {bool: lambda x: not x, int: lambda x: x // 2, float: lambda x: 1 - x / 2, str: lambda x: "fc"}
        value = VALUES.get((name, option), kinds[type(field.default)](field.default))
        return {"options": dataclasses.replace(default, **{field.name: value})}
    return {
        "server": {"server": ServerOptions(optimizer="adam", learning_rate=0.1)},
        "local.proximal": {"local": LocalOptions(proximal=0.5)},
        "local.scaffold": {"local": LocalOptions(scaffold=True)},
        "lora.ranks": {"ranks": (1, 2, 1, 2)},
    }[option]


@pytest.mark.parametrize("name", each(methods_available(), slow=RULES))
def test_what_a_method_takes_it_reads(name):
    """An option that it says it takes changes what is computed: the traced programs or their order."""
    declared = [*(set(AVERAGING) - make_method(name)[3].refuses.keys()), *list_method_flags(name)]
    default = trace_rounds(name, optimizer="sgd")
    for option in declared:
        reads = trace_rounds(name, optimizer="sgd", **change(name, option)) != default
        assert reads, f"{name} says that it takes {option}, which changes nothing in its rounds"


def test_a_new_file_is_tried_every_time():
    plain, marked = each(["a-new-method", "fedavg-lora"])
    assert plain == "a-new-method"
    assert [mark.name for mark in marked.marks] == ["broad"]
    assert {*EVERY_TIME, *RULES, *UNLIKE} <= SENT.keys() <= set(methods_available())


ODD = ("pfedmma", "pfedmoap")
"""Methods whose clients' adapters have leaves that stand at no site of the model."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ODD else pytest.mark.broad) for name in methods_available()]
)
def test_every_client_s_model_can_be_fine_tuned(name: str) -> None:
    """By local training of the assembled adapter, which must find something to train and may know no site in it."""
    vlm, _, trainer, method, adapter = make_method(name)

    def assemble(key: Any, adapter: lora.Adapter) -> lora.Adapter:
        server = method.init(adapter=adapter)
        personal = method.init_client(key=key, server=server, number=jnp.int32(0))
        return method.personalise(server=server, personal=personal)

    own = jax.eval_shape(assemble, jax.random.key(0), adapter)
    local = load_method("local", Setup(sites=vlm.sites, spec=lora.LoRA(), start_optimizer=trainer.start))
    state = jax.eval_shape(
        lambda own: local.init_client(key=jax.random.key(0), server=local.init(adapter=own), number=jnp.int32(0)), own
    )
    assert {path: leaf.shape for path, leaf in tree.flatten(state["own"]).items()} == {
        path: leaf.shape for path, leaf in tree.flatten(own).items()
    }
    (optimizer,) = state["optimizer"]
    assert tree.flatten(optimizer[0].mu)
