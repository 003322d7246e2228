"""What every method must keep, found by name: a new file in methods/ is tested here without being mentioned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import WIDTH, make_cohort, make_method, run_round, start_states, take, trace_rounds

from fedvlm_jax import lora, tree
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.methods.options import HyperOptions, LocalOptions, ServerOptions
from fedvlm_jax.runs.config import methods_available
from fedvlm_jax.sharding import make_mesh, replicate

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
    **dict.fromkeys(("fedalt", "fedmosaic"), ("a", "b")),
}
"""What a message holds, by the methods' papers; of rolora in its first phase."""

ALONE = {"plora-reset-a": "its A begins anew, so that what was trained with it is gone"}
"""Methods whose server changes the update of a client that is alone, on purpose: name -> why."""

LIKE_LOCAL = (
    *("fedavg-lora", "plora", "fedsa-lora", "iat", "iat-inverted"),
    *("fedex-lora", "flexlora", "hetlora", "lora-fair", "fedrpca"),
)
"""Methods that train both factors and average, so that with one client they are local training."""

CHOICES = {"fedrpca": {"hyper": HyperOptions(rpca_beta=1.0)}}  # above 1 it amplifies, with one client too


INPUTS = np.random.default_rng(5).normal(size=(7, WIDTH)).astype(np.float32)


class Case:
    """A method on the toy model with its compiled round, made once per method."""

    def __init__(self, name):
        self.name = name
        self.vlm, self.params, trainer, self.method, self.adapter = make_method(name, **CHOICES.get(name, {}))
        self.round = make_round(self.method, trainer, make_mesh(1))
        self.server = self.method.init(self.adapter)
        self.cohort = make_cohort(CLIENTS)
        self.states = start_states(self.method, self.server, CLIENTS)
        self.fresh = self.method.init_client(jax.random.key(0), self.server, jnp.int32(0))
        self.out, self.personal = self.run(self.cohort, WEIGHTS, self.states)

    def run(self, cohort, weights, states, server=None, **options):
        server = self.server if server is None else server
        return run_round(self.round, self.base(server), server, cohort, weights, states, **options)

    def base(self, server):
        mesh = make_mesh(1)
        return self.params if self.method.base is None else self.method.base(self.params, replicate(mesh, server))

    def model(self, server, adapter):
        """What a client with this adapter says to a few inputs."""
        batch = {"image_features": INPUTS, "labels": np.zeros((len(INPUTS), 3), np.int32)}
        return np.asarray(self.vlm.logits(self.base(server), adapter, batch))


make_case = functools.cache(Case)


ALIKE = {
    *("fedavg-lora", "fedsa-lora", "ffa-lora", "iat", "iat-inverted", "plora-reset-a"),
    *("hetlora", "lora-fair", "feddpa-f", "fedmosaic"),
}
"""Methods that differ from one that is always tried here in a rule or an average alone; theirs are slow tests. What
they compute is always held against their papers, in test_papers.py."""


@pytest.fixture(
    scope="module", params=[pytest.param(m, marks=pytest.mark.slow) if m in ALIKE else m for m in methods_available()]
)
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


def test_structure_shapes_and_types_are_kept(case):
    def describe(part):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), part)

    assert describe(case.out.server) == describe(case.server)
    assert describe(case.personal) == describe(case.states)
    own, message = (jax.tree.map(lambda x: x[0], part) for part in (case.personal, case.out.messages))
    adapter = case.method.personalise(case.out.server, own)
    assert describe(adapter) == describe(case.method.trained(case.server, own, message))
    assert describe(adapter) == describe(case.method.personalise(case.server, case.fresh))
    assert dict.fromkeys(sites(adapter)) == dict.fromkeys(sites(case.adapter))


def test_a_fresh_client_has_the_bare_base(case):
    adapter = case.method.personalise(case.server, case.fresh)
    np.testing.assert_allclose(case.model(case.server, adapter), case.model(case.server, None), atol=1e-6)


def test_training_moves_the_model_and_never_the_scale(case):
    own = jax.tree.map(lambda x: x[1], case.personal)
    adapter = case.method.personalise(case.out.server, own)
    moved = np.abs(case.model(case.out.server, adapter) - case.model(case.server, None)).max()
    assert moved > 1e-3
    fresh = tree.flatten(case.method.personalise(case.server, case.fresh))
    for path, leaf in tree.flatten(adapter).items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, fresh[path])


def test_permuting_clients_permutes_results(case):
    order = [2, 0, 3, 1]
    out, personal = case.run(take(case.cohort, order), WEIGHTS[order], case.states)
    assert_close(out.server, case.out.server)
    assert_close(personal, take(case.personal, order))


def test_weights_count_unless_the_method_says_why_not(case):
    out, personal = case.run(case.cohort, np.full_like(WEIGHTS, 1 / CLIENTS), case.states)
    now, then = (out.server, personal), (case.out.server, case.personal)
    same = all(jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, rtol=0, atol=1e-7), now, then)))
    assert same == ("train.weighting" in case.method.refuses)


def test_waves_change_nothing(case):
    for waves in (2, 4):
        out, personal = case.run(case.cohort, WEIGHTS, case.states, waves=waves)
        assert_close(out.server, case.out.server)
        assert_close(personal, case.personal)
        assert_close(out.messages, case.out.messages)


@pytest.mark.parametrize("poison", [np.nan, -7.0])
def test_a_client_of_weight_zero_changes_nothing(case, poison):
    """Whatever it computed: what is not finite may be skipped by chance, so that there are numbers as well."""
    cohort = make_cohort(CLIENTS)
    cohort.examples["image_features"][3] *= poison
    weights = np.asarray([0.2, 0.3, 0.5, 0.0], np.float32)
    out, personal = case.run(cohort, weights, case.states)
    alone, alone_personal = case.run(
        take(case.cohort, [0, 1, 2]), weights[:3], start_states(case.method, case.server, 3)
    )
    assert_close(out.server, alone.server)
    assert_close(take(personal, [0, 1, 2]), alone_personal)


@pytest.mark.parametrize("poison", [np.nan, 3e38])
def test_a_client_whose_numbers_are_not_finite_is_left_out(case, poison):
    """As if it had not been drawn; it keeps its state, and the others' weights add up to one."""
    cohort = make_cohort(CLIENTS)
    cohort.examples["image_features"][1] = poison
    assert not np.isfinite(case.run(cohort, WEIGHTS, case.states)[0].metrics["loss"][1])
    for states, new in ((case.states, True), (case.personal, False)):
        cohort, clean = (one._replace(new=np.full(CLIENTS, new)) for one in (cohort, make_cohort(CLIENTS)))
        out, personal = case.run(cohort, WEIGHTS, states)
        alone, others = case.run(take(clean, [0, 2, 3]), np.asarray([1, 3, 4], np.float32) / 8, take(states, [0, 2, 3]))
        np.testing.assert_allclose(out.weights, np.asarray([1, 0, 3, 4]) / 8, rtol=1e-6)
        assert out.finite
        assert_close(out.server, alone.server)
        assert_close(take(personal, [0, 2, 3]), others)
        kept = case.method.init_client(jax.random.key(0), case.server, jnp.int32(1))
        kept = kept if new else jax.tree.map(lambda x: x[1], states)
        assert_close(jax.tree.map(lambda x: x[1], personal), kept, rtol=0, atol=0)
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
    """At the start, and after a round, when momentum of former rounds might drive it on."""
    out, _ = case.run(case.cohort, np.zeros(CLIENTS), case.states)
    assert_close(out.server, case.server, rtol=0, atol=0)
    later, _ = case.run(case.cohort, np.zeros(CLIENTS), case.personal, server=case.out.server, round_=2)
    assert_close(later.server, case.out.server, rtol=0, atol=0)


def test_masked_steps_and_padded_rows_change_nothing(case):
    cohort = make_cohort(CLIENTS)
    rows = {name: np.concatenate([x, 7 * x[:, :2]], axis=1) for name, x in cohort.examples.items()}
    indices = np.concatenate([cohort.indices, np.full_like(cohort.indices[:, :1], 11)], axis=1)
    indices = np.concatenate([indices, np.zeros_like(indices[..., :1])], axis=2)
    mask = np.zeros(indices.shape, bool)
    mask[:, :-1, :-1] = True
    rows["labels"] = np.minimum(rows["labels"], 4)
    padded = cohort._replace(examples=rows, indices=indices, mask=mask)
    out, personal = case.run(padded, WEIGHTS, case.states)
    assert_close(out.server, case.out.server)
    assert_close(personal, case.personal)


def test_an_empty_client_keeps_its_start(case):
    cohort = make_cohort(CLIENTS)
    cohort.mask[1] = False
    weights = np.asarray([0.3, 0.0, 0.3, 0.4])
    out, personal = case.run(cohort, weights, case.states)
    kept = case.method.init_client(jax.random.key(0), case.server, jnp.int32(1))
    assert_close(jax.tree.map(lambda x: x[1], personal), kept, rtol=0, atol=0)
    assert np.isfinite(out.metrics["loss"]).all()


def test_one_client_alone_is_not_changed_by_averaging(case):
    out, personal = case.run(take(case.cohort, [2]), [1.0], start_states(case.method, case.server, 1))
    own, message = (jax.tree.map(lambda x: x[0], part) for part in (personal, out.messages))
    after = case.method.personalise(out.server, own)
    if case.name in ALONE:
        after = case.method.trained(case.server, own, message)
    before = case.method.trained(case.server, own, message)
    np.testing.assert_allclose(case.model(out.server, after), case.model(case.server, before), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case", [pytest.param(m, marks=pytest.mark.slow) if m in ALIKE else m for m in LIKE_LOCAL], indirect=True
)
def test_with_one_client_averaging_is_local_training(case):
    local = make_case("local")
    cohort = take(case.cohort, [2])
    out, personal = case.run(cohort, [1.0], start_states(case.method, case.server, 1))
    wanted, wanted_personal = local.run(cohort, [1.0], start_states(local.method, local.server, 1))
    first = lambda part: jax.tree.map(lambda x: x[0], part)  # noqa: E731
    np.testing.assert_allclose(
        case.model(out.server, case.method.personalise(out.server, first(personal))),
        local.model(wanted.server, local.method.personalise(wanted.server, first(wanted_personal))),
        atol=2e-5,
    )


def test_old_clients_go_on_from_their_own_state_and_new_ones_do_not(case):
    """A newcomer inherits nobody's private factors or momentum, whatever lies in its place in memory."""
    cohort = case.cohort._replace(new=np.asarray([True, False, True, False]))
    rubbish = jax.tree.map(
        lambda x: np.where(np.isin(np.arange(CLIENTS), [0, 2]).reshape(-1, *[1] * (x.ndim - 1)), 77, x).astype(x.dtype),
        case.personal,
    )
    got, personal = case.run(cohort, WEIGHTS, rubbish)
    clean, clean_personal = case.run(cohort, WEIGHTS, case.personal)
    assert_close(personal, clean_personal, rtol=0, atol=0)
    assert_close(got.server, clean.server, rtol=0, atol=0)
    if not jax.tree.leaves(personal):
        assert case.name == "flora", f"{case.name}: a client that keeps nothing"
        return
    continued = jax.tree.map(lambda x: x[1], personal)
    fresh = jax.tree.map(lambda x: x[1], case.run(case.cohort, WEIGHTS, case.states)[1])
    assert any(
        not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(continued), jax.tree.leaves(fresh), strict=True)
    )


def test_rounds_follow_each_other(case):
    """Three rounds with everything that is carried over, in one wave and in two, in another order of clients."""
    order = np.asarray([3, 1, 0, 2])

    def go(cohort, weights, waves):
        server, states = case.server, start_states(case.method, case.server, CLIENTS)
        for number in (1, 2, 3):
            new = np.full(CLIENTS, number == 1)
            out, states = case.run(cohort._replace(new=new), weights, states, server=server, round_=number, waves=waves)
            server = out.server
        return server, states

    server, states = go(case.cohort, WEIGHTS, 1)
    again, permuted = go(take(case.cohort, order), WEIGHTS[order], 2)
    assert_close(again, server, rtol=1e-4, atol=1e-5)
    assert_close(permuted, take(states, order), rtol=1e-4, atol=1e-5)


def test_a_kept_optimizer_is_used(case):
    """AdamW's moments of the first round, where a client keeps them, count in its second."""
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(case.personal) if is_moment(path)]
    old = case.cohort._replace(new=np.zeros(CLIENTS, bool))
    forgotten = jax.tree_util.tree_map_with_path(lambda path, x: x * (not is_moment(path)), case.personal)
    kept, lost = (
        case.run(old, WEIGHTS, states, server=case.out.server, round_=2) for states in (case.personal, forgotten)
    )
    same = jax.tree.map(np.array_equal, kept[1], lost[1])
    assert bool(moments) != all(jax.tree.leaves(same))


def test_one_compile_for_all_rounds_and_rates(case):
    before = case.round._cache_size()
    for round_ in range(2, 5):
        case.run(case.cohort, WEIGHTS, case.states, round_=round_, server=case.out.server)
    assert case.round._cache_size() == before


def test_what_travels(case):
    """No scale, no optimiser's state: a message is at most as large as what a client trains."""
    sent = tree.flatten(case.out.messages)
    assert "scale" not in {path.rpartition("/")[2] for path in sent}
    trained = tree.partition(case.method.personalise(case.server, case.fresh), lambda path: not path.endswith("scale"))
    assert sum(leaf[0].size for leaf in sent.values()) <= sum(leaf.size for leaf in jax.tree.leaves(trained[0]))


@pytest.mark.parametrize("name", SENT)
def test_shipped_methods_send_what_their_papers_say(name):
    phases, rounds = trace_rounds(name)
    messages = rounds[phases[0]][1].messages
    assert {path.rpartition("/")[2] for path in tree.flatten(messages)} == set(SENT[name])


def test_what_the_server_renews_goes_down_too():
    case = make_case("fedsvd")
    up, down = case.method.travels(case.out.server, jax.eval_shape(lambda x: x, case.out.messages))
    assert {path.rpartition("/")[2] for path in tree.flatten(up)} == {"b"}
    assert {path.rpartition("/")[2] for path in tree.flatten(down)} == {"a", "b"}


def test_private_start_common_or_own():
    for common in (True, False):
        _, _, _, method, adapter = make_method("plora", common_start=common)
        server = method.init(adapter)
        one, two = (method.init_client(jax.random.key(k), server, jnp.int32(k))["own"] for k in (1, 2))
        assert np.array_equal(one["encoder"]["fc1"]["a"], two["encoder"]["fc1"]["a"]) == common
        assert set(one["encoder"]["fc1"]) == {"a", "scale"}


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

    from fedvlm_jax.federation.training import make_local_trainer
    from fedvlm_jax.methods.record import Setup
    from fedvlm_jax.methods.share import make_share_method
    from fedvlm_jax.objectives import load_objective

    vlm, params = make_toy()
    trainer = make_local_trainer(vlm, load_objective("sft"))
    setup = Setup(vlm.sites, lambda key: lora.init(key, vlm.sites, SPEC), trainer.start)
    method = make_share_method("mine", "here", lora.Rule("fc2/b$"), setup)
    server = method.init(lora.init(jax.random.key(0), vlm.sites, SPEC))
    run = make_round(method, trainer, make_mesh(1))
    out, _ = run_round(run, params, server, make_cohort(2), [0.5, 0.5], start_states(method, server, 2))
    assert list(tree.flatten(out.messages)) == ["decoder/fc2/b"]


def change(option):
    """Choices for `make_method` in which an option is not at its default."""
    group, _, name = option.partition(".")
    if group == "hyper":
        default = getattr(HyperOptions(), name)
        kinds = {bool: lambda x: not x, int: lambda x: x // 2, float: lambda x: 1 - x / 2}
        return {"hyper": HyperOptions(**{name: kinds[type(default)](default)})}
    return {
        "server": {"server": ServerOptions(optimizer="adam", learning_rate=0.1)},
        "local.proximal": {"local": LocalOptions(proximal=0.5)},
        "local.scaffold": {"local": LocalOptions(scaffold=True)},
        "lora.ranks": {"ranks": (1, 2, 1, 2)},
    }[option]


@pytest.mark.parametrize("name", methods_available())
def test_what_a_method_takes_it_reads(name):
    """An option that it says it takes changes what is computed: the traced programs or their order."""
    declared = make_method(name)[3].takes
    default = trace_rounds(name, optimizer="sgd")
    for option in declared:
        reads = trace_rounds(name, optimizer="sgd", **change(option)) != default
        assert reads, f"{name} says that it takes {option}, which changes nothing in its rounds"
