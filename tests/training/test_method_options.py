"""Options and methods: what goes together is what a method says, and what it says is so."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from toy import RATES, make_cohort, make_method, start_states

from fedvlm_jax.distributed.sharding import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.participation import ParticipationOptions
from fedvlm_jax.federation.round import RoundOutput, make_round, to_waves
from fedvlm_jax.methods import Method
from fedvlm_jax.methods.config import HyperOptions, LocalOptions, ServerOptions
from fedvlm_jax.methods.rule_based import AVERAGING
from fedvlm_jax.training.config import Compare, LoraOptions, Run, TrainOptions, methods_available
from fedvlm_jax.training.method_options import RANGES, check_rule, declare, for_method
from fedvlm_jax.training.validation import validate, validate_comparison

SGD = TrainOptions(optimizer="sgd")
ADAM = ServerOptions(optimizer="adam", learning_rate=0.01)
RANKS = LoraOptions(rank=8, ranks=(2, 8))
SCAFFOLD = LocalOptions(scaffold=True)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run(method="share"), "--method share needs its rule: add --share REGEX"),
        (Run(method="local", share="b$"), "leave out --method local, or leave out --share"),
        (Run(method="plora", share="b$"), "leave out --method plora"),  # though it is the default
        (Run(share="(b"), r"--share '\(b' is not a regular expression"),
        (Run(method="shar"), "did you mean share"),
        (Run(local=SCAFFOLD), "--train.optimizer sgd"),
        (Run(local=LocalOptions(scaffold=True, proximal=0.1), train=SGD), "exclude each other"),
        (Run(local=SCAFFOLD, train=SGD, lora=RANKS), "--local.scaffold and --lora.ranks exclude each other"),
        (
            Run(local=SCAFFOLD, train=SGD, cohort=2, participation=ParticipationOptions(sampling="size")),
            "--participation.sampling size needs --train.weighting uniform",
        ),
        (Run(method="local", server=ADAM), "--server.optimizer does not go with --method local, because nothing is sh"),
        (Run(method="flora", local=LocalOptions(proximal=0.1)), "--local.proximal .* --method flora, because factors"),
        (Run(method="fedalt", local=SCAFFOLD, train=SGD), "--local.scaffold .* fedalt, because every client receives"),
        (Run(method="flexlora", server=ADAM), "--server.optimizer .* flexlora, because every round's SVD"),
        (Run(method="fedex-lora", server=ServerOptions(learning_rate=0.5)), "--server.learning-rate .* fedex-lora"),
        (Run(method="feddpa-t", lora=RANKS), "--lora.ranks does not go with --method feddpa-t, because"),
        (Run(method="fed-sb", lora=RANKS), "--lora.ranks .* fed-sb, because R is one square matrix"),
        (
            Run(lora=LoraOptions(rank=8, ranks=(2, 4))),
            "--lora.ranks 2 4: .* the largest of them --lora.rank, which is 8",
        ),
        (Run(lora=LoraOptions(rank=8, ranks=(0, 8))), "--lora.ranks 0 8: they must be 1 or more"),
        (Run(lora=LoraOptions(rank=8, ranks=(8, 16))), "--lora.ranks 8 16"),
        (Run(server=ServerOptions(beta1=0.5)), "--server.beta1 means nothing to --server.optimizer avg"),
        (Run(server=ServerOptions(optimizer="momentum", epsilon=0.1)), "--server.epsilon means nothing to"),
        (Run(server=ServerOptions(learning_rate=0)), "--server.learning-rate is 0: it must be above 0"),
        (
            Run(hyper=HyperOptions(ditto_lambda=1.0)),
            "--hyper.ditto-lambda means nothing to --method plora: .* use ditto",
        ),
        (Run(method="apfl", hyper=HyperOptions(apfl_alpha=1.5)), "--hyper.apfl-alpha is 1.5: it must be from 0 to 1"),
        (
            Run(method="ce-lora", hyper=HyperOptions(mix_temperature=0)),
            "--hyper.mix-temperature is 0: it must be above",
        ),
        (Run(hyper=HyperOptions(mix_temperature=2)), "use ce-lora or fedmosaic"),
        (Run(method="fedrpca", hyper=HyperOptions(rpca_beta=float("nan"))), "--hyper.rpca-beta is nan"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(run: Run, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refusal:
        validate(run)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "run",
    [
        Run(share="decoder/.*/b$"),
        Run(method="share", share="b$", server=ADAM, local=LocalOptions(proximal=0.1), lora=RANKS),
        Run(method="rolora", local=SCAFFOLD, train=SGD),
        Run(method="hetlora", lora=RANKS, server=ADAM),
        Run(method="flora", lora=RANKS),
        Run(method="local", lora=RANKS),
        Run(method="lora-fair", local=LocalOptions(proximal=0.1), hyper=HyperOptions(fair_lambda=1.0)),
        Run(server=ServerOptions(optimizer="yogi", beta2=0.9, epsilon=0.01)),
    ],
)
def test_what_makes_sense_is_let_through(run: Run) -> None:
    validate(run)


def test_a_rule_alone_is_a_method() -> None:
    assert Run().method == "plora"
    assert Run(share="b$").method == "share"
    assert Run(method="plora", share="b$").method == "plora"  # and is refused, above


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (Compare(methods=("local", "share")), "--methods share needs its rule"),
        (Compare(methods=("local", "plora"), base=Run(share="b$")), "compare share too"),
        (
            Compare(methods=("local",), base=Run(server=ADAM)),
            "--server.optimizer means nothing to any of --methods local",
        ),
        (Compare(methods=("plora", "flora+ft"), base=Run(server=ADAM)), "does not go with --methods flora, because"),
        (
            Compare(methods=("plora",), base=Run(hyper=HyperOptions(svd_every=3))),
            "to any of --methods plora: .* fedsvd",
        ),
    ],
)
def test_in_a_comparison_it_must_hold_for_every_method(comparison: Compare, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        validate_comparison(comparison)


def test_a_comparison_hands_every_method_its_own_options_alone() -> None:
    base = Run(share="b$", hyper=HyperOptions(ditto_lambda=2.0, dpa_alpha=0.9))
    names = ("local", "share", "share+ft", "ditto", "feddpa-t")
    validate_comparison(Compare(methods=names, base=base))
    runs = {name: for_method(base, name) for name in ("local", "share", "ditto", "feddpa-t")}
    for name, run in runs.items():
        validate(run)  # what `train` does with each of them
        assert run.method == name
    assert [run.share for run in runs.values()] == ["", "b$", "", ""]
    assert [run.hyper.ditto_lambda for run in runs.values()] == [0.1, 0.1, 2.0, 0.1]
    assert runs["feddpa-t"].hyper.dpa_alpha == 0.9


def test_local_training_is_compared_with_whatever_the_server_does() -> None:
    """It is what every comparison is against, and there an option of the average would merely do nothing."""
    base = Run(server=ADAM, local=LocalOptions(proximal=0.1))
    validate_comparison(Compare(methods=("local", "plora"), base=base))
    assert for_method(base, "plora") == base
    assert for_method(base, "local") == Run(method="local")


def test_weights_are_for_methods_that_weigh_by_them() -> None:
    uniform = Run(train=TrainOptions(weighting="uniform"))
    idle = ("local", "hetlora", "fedalt", "ce-lora", "fedmosaic")
    for name in methods_available():
        run = dataclasses.replace(uniform, method=name)
        if name in idle:
            with pytest.raises(UserError, match=rf"--train\.weighting does not go with --method {name}, because"):
                validate(run)
        else:
            validate(run)
        assert for_method(uniform, name).train.weighting == ("examples" if name in idle else "uniform")
    validate_comparison(Compare(methods=("local", "plora"), base=uniform))
    with pytest.raises(UserError, match=r"--train\.weighting means nothing to any of --methods local hetlora"):
        validate_comparison(Compare(methods=("local", "hetlora"), base=uniform))


def test_every_number_beside_a_method_has_its_range() -> None:
    groups = {"local": LocalOptions(), "server": ServerOptions(), "hyper": HyperOptions()}
    numbers = {
        f"{group}.{field.name}"
        for group, options in groups.items()
        for field in dataclasses.fields(options)
        if type(getattr(options, field.name)) in (int, float)
    }
    assert numbers == set(RANGES)
    for path, (holds, _) in RANGES.items():
        group, _, name = path.partition(".")
        assert holds(getattr(groups[group], name)), path
        assert not holds(float("nan")), path
        assert not holds(-1), path


class Noted:
    """Options that note which of them are read."""

    def __init__(self, options: object) -> None:
        self.options, self.read = options, set()

    def __getattr__(self, name: str) -> object:
        self.read.add(name)
        return getattr(self.options, name)


def trace_shapes(name: str, **choices: object) -> tuple[Method, object, dict[int, RoundOutput]]:
    """The method on the toy, its server's state, and phase -> a round of two clients: shapes, nothing is computed."""
    _, params, trainer, method, adapter = make_method(name, population=2, cohort=2, places=2, **choices)
    server = jax.eval_shape(method.init, adapter)
    run = make_round(method, trainer, make_mesh(1))
    states = jax.eval_shape(lambda: start_states(method, method.init(adapter), 2))
    phases = {round_: method.phase(round_) for round_ in range(1, 5)}
    outs = {
        phase: jax.eval_shape(
            lambda params, server, states, cohort, phase=phase: run(
                params, server, states, cohort, jnp.ones(2) / 2, RATES, jnp.int32(1), jax.random.key(0), phase=phase
            ),
            params,
            server,
            jax.eval_shape(lambda part: to_waves(part, 1), states),
            jax.eval_shape(lambda part: to_waves(part, 1), make_cohort(2)),
        )
        for phase in dict.fromkeys(phases.values())
    }
    for out in outs.values():
        assert jax.tree.map(lambda x: x.shape, out.server) == jax.tree.map(lambda x: x.shape, server)
    return method, server, outs


@pytest.mark.broad
@pytest.mark.parametrize("name", methods_available())
def test_a_method_reads_the_numbers_that_it_says_it_reads(name: str) -> None:
    hyper = Noted(HyperOptions())
    method, _, _ = trace_shapes(name, hyper=hyper)
    assert {f"hyper.{field}" for field in hyper.read} == {path for path in method.takes if path.startswith("hyper.")}


TOGETHER = {
    "server": {"server": ADAM},
    "local.proximal": {"local": LocalOptions(proximal=0.1)},
    "lora.ranks": {"ranks": (1, 2)},
}
APART = {"local.scaffold": {"local": SCAFFOLD, "optimizer": "sgd"}}


@pytest.mark.broad
@pytest.mark.parametrize("name", methods_available())
def test_what_a_method_takes_it_can_do_and_the_rest_has_a_reason(name: str) -> None:
    method = declare(name, Run())
    assert {*TOGETHER, *APART} == set(AVERAGING)
    for option in AVERAGING:
        assert (option in method.takes) != bool(method.refuses.get(option))
    for options in (TOGETHER, APART):
        taken = {key: value for name in options if name in method.takes for key, value in options[name].items()}
        if taken:
            trace_shapes(name, **taken)


@pytest.mark.parametrize("name", methods_available())
def test_a_method_is_made_without_a_model(name: str) -> None:
    method = declare(name, Run())
    assert method.name == name
    assert method.source


def test_a_rule_that_matches_nothing_lists_the_paths_there_are() -> None:
    from toy import make_toy

    sites = make_toy()[0].sites
    options = LoraOptions(rank=2, targets="fc")
    with pytest.raises(
        UserError, match=r"--share 'fc3' is found in no .*\n  decoder/fc2/a\n  decoder/fc2/b\n  encoder/"
    ):
        check_rule(Run(share="fc3", lora=options), sites)
    with pytest.raises(UserError, match="no factor's path"):
        check_rule(Run(share="scale$", lora=options), sites)  # it is data: averaging it would do nothing
    check_rule(Run(share="fc2/b$", lora=options), sites)
    check_rule(Run(lora=options), sites)
