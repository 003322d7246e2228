"""Options and methods: what goes together is what a method says, and what it says is so."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from models import causal_cases
from prompted_toy import make_bound
from toy import RATES, make_cohort, make_method, start_states

from fedvlm_jax import lora
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_checks import check_rule, declare, for_method, list_left_out
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import LoraOptions, PromptOptions, Run, TrainOptions, methods_available
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.round import RoundOutput, make_round, to_waves
from fedvlm_jax.methods import Method, Setup
from fedvlm_jax.methods.base import AVERAGING
from fedvlm_jax.methods.config import LocalOptions, MethodOptions, ServerOptions, find_method_options, list_method_flags
from fedvlm_jax.methods.rule_based import Options as Rule
from fedvlm_jax.methods.zoo import (
    apfl,
    ce_lora,
    ditto,
    feddpa_f,
    feddpa_t,
    fedlease,
    fedotp,
    fedrpca,
    fedsvd,
    fedtreelora,
    hilora,
    lora_fair,
    pfedmoap,
)
from fedvlm_jax.models import read_vlm
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.utils.option_ranges import list_options

SGD = TrainOptions(optimizer="sgd")
ADAM = ServerOptions(optimizer="adam", learning_rate=0.01)
RANKS = LoraOptions(rank=8, ranks=(2, 8))
SCAFFOLD = LocalOptions(scaffold=True)
SOFT = PromptOptions(vectors=4)
TARGETS = LoraOptions(targets="text_model/.*fc1")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run(method="share"), "--method share needs its rule: add --share REGEX"),
        (Run(method="share", method_options=Rule("(b")), r"--share '\(b' is not a regular expression"),
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
            Run(method_options=ditto.Options(1.0)),
            r"Options\(lambda_=1.0\) are the numbers of another method",
        ),
        (Run(method="apfl", method_options=apfl.Options(1.5)), "--method.alpha is 1.5: it must be from 0 to 1"),
        (Run(method="ditto", method_options=ditto.Options(-1.0)), "--method.lambda is -1.0: it must be 0 or more"),
        (Run(method="ce-lora", method_options=ce_lora.Options(0)), "--method.temperature is 0: it must be above 0"),
        (Run(method="fedrpca", method_options=fedrpca.Options(beta=float("nan"))), "--method.beta is nan"),
        (Run(soft_prompt=SOFT), "--prompt.vectors does not go with --method plora, because it trains low-rank factors"),
        (
            Run(method="local", soft_prompt=SOFT, lora=RANKS),
            "--lora.ranks does not go with a soft prompt, which has no",
        ),
        (Run(method="promptfl", lora=RANKS), "--lora.ranks does not go with --method promptfl, because a soft prompt"),
        (Run(method="pfedmoap", lora=TARGETS), "--lora.targets .* pfedmoap, because it trains soft prompts alone"),
        (Run(method="pfedmma", lora=TARGETS), "--lora.targets .* pfedmma, because its adapters stand beside"),
        (
            Run(method="hilora", method_options=hilora.Options(clusters=65)),
            "--method.clusters is 65: .* at most 64",
        ),
        (
            Run(method="promptfl", lora=LoraOptions(rank=4)),
            "--lora.rank means nothing to --method promptfl, whose adap",
        ),
        (Run(method="pfedmma", lora=LoraOptions(dropout=0.1)), "--lora.dropout means nothing to --method pfedmma"),
        (Run(method="local", soft_prompt=SOFT, lora=LoraOptions(alpha=4.0)), "--lora.alpha means nothing to --meth"),
        (
            Run(objective="dpo", data=make_options(novel_classes=0.3)),
            "--data.novel-classes does not go with --objective dpo",
        ),
        (Run(method="fedotp", method_options=fedotp.Options(share=0.0)), "--method.share is 0.0: it must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(run: Run, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refusal:
        validate(run)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "run",
    [
        Run(method="share", method_options=Rule("b$"), server=ADAM, local=LocalOptions(proximal=0.1), lora=RANKS),
        Run(method="rolora", local=SCAFFOLD, train=SGD),
        Run(method="hetlora", lora=RANKS, server=ADAM),
        Run(method="flora", lora=RANKS),
        Run(method="local", lora=RANKS),
        Run(method="lora-fair", local=LocalOptions(proximal=0.1), method_options=lora_fair.Options(1.0)),
        Run(server=ServerOptions(optimizer="yogi", beta2=0.9, epsilon=0.01)),
        Run(method="promptfl", lora=TARGETS, server=ADAM),
        Run(method="share", method_options=Rule("prompt$"), soft_prompt=SOFT),
        Run(method="promptfl", lora=dataclasses.replace(TARGETS, rank=4, dropout=0.1)),
        Run(method="pfedmma", lora=LoraOptions(rank=4, private_a="per-client")),
        Run(method="local", lora=LoraOptions(rank=4)),
    ],
)
def test_what_makes_sense_is_let_through(run: Run) -> None:
    validate(run)


def test_numbers_that_exclude_each_other_are_refused_where_they_are_said() -> None:
    with pytest.raises(UserError, match=r"--method\.root 0\.8 and --method\.cluster 0\.3 are shares of the rounds"):
        hilora.Options(root=0.8)
    with pytest.raises(UserError, match=r"--preference\.rewards names brevity twice"):
        PreferenceOptions(rewards=("brevity", "brevity"))


def test_a_method_has_its_numbers_where_none_are_given() -> None:
    assert type(Run().method_options) is MethodOptions
    assert Run(method="ditto").method_options == ditto.Options()
    assert dataclasses.replace(Run(), method="apfl").method_options == apfl.Options()


@pytest.mark.parametrize("name", [*methods_available(), "share"])
def test_the_flags_of_a_file_are_the_numbers_of_its_method(name: str) -> None:
    options = list_options(find_method_options(name)(), "method")
    assert [option.flag for option in options] == list(list_method_flags(name))


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (Compare(methods=("local", "share")), "--methods share needs its rule"),
        (
            Compare(methods=("local",), base=Run(server=ADAM)),
            "--server.optimizer means nothing to any of --methods local",
        ),
        (Compare(methods=("plora", "flora+ft"), base=Run(server=ADAM)), "does not go with --methods flora, because"),
        (Compare(methods=("plora",), method_options={"ditto": ditto.Options()}), "numbers of ditto, which is not comp"),
        (Compare(methods=("plora",), method_options={"plora": ditto.Options()}), "are the numbers of another method"),
        (
            Compare(methods=("ditto",), method_options={"ditto": ditto.Options(-1)}),
            "--method.ditto.lambda is -1: it must be 0 or more",
        ),
    ],
)
def test_in_a_comparison_it_must_hold_for_every_method(comparison: Compare, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        validate_comparison(comparison)


def test_a_comparison_hands_every_method_its_own_options_alone() -> None:
    options = {"share": Rule("b$"), "ditto": ditto.Options(2.0), "feddpa-t": feddpa_t.Options(alpha=0.9)}
    names = ("local", "share", "share+ft", "ditto", "feddpa-t")
    validate_comparison(Compare(methods=names, method_options=options))
    runs = {name: for_method(Run(), name, options.get(name)) for name in ("local", "share", "ditto", "feddpa-t")}
    for name, run in runs.items():
        validate(run)  # what `train` does with each of them
        assert run.method == name
    assert [run.method_options for run in runs.values()] == [MethodOptions(), *options.values()]


def test_local_training_is_compared_with_whatever_the_server_does() -> None:
    """It is what every comparison is against, and there an option of the average would merely do nothing."""
    base = Run(server=ADAM, local=LocalOptions(proximal=0.1))
    validate_comparison(Compare(methods=("local", "plora"), base=base))
    assert for_method(base, "plora") == base
    assert for_method(base, "local") == Run(method="local")


def test_factors_are_formed_in_a_comparison_where_there_are_some() -> None:
    base = Run(lora=LoraOptions(rank=4, alpha=4.0))
    validate_comparison(Compare(methods=("plora", "promptfl", "pfedmma"), base=base))
    assert for_method(base, "plora") == base
    assert for_method(base, "promptfl").lora == LoraOptions()
    assert for_method(base, "pfedmma").lora == LoraOptions(rank=4)
    with pytest.raises(UserError, match=r"--lora\.rank means nothing to any of --methods promptfl fedotp"):
        validate_comparison(Compare(methods=("promptfl", "fedotp"), base=base))


def test_weights_are_for_methods_that_weigh_by_them() -> None:
    uniform = Run(train=TrainOptions(weighting="uniform"))
    idle = ("local", "hetlora", "fedalt", "ce-lora", "fedmosaic", "fedlease", "fedtreelora")
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
    groups = [LocalOptions(), ServerOptions(), *(find_method_options(name)() for name in methods_available())]
    numbers = [option for group in groups for option in list_options(group) if type(option.value) in (int, float)]
    assert len(numbers) >= 20
    for option in numbers:
        assert option.bounds, option.flag


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
    server = jax.eval_shape(lambda: method.init(adapter=adapter))
    run = make_round(method, trainer, make_mesh(1))
    states = jax.eval_shape(lambda: start_states(method, method.init(adapter=adapter), 2))
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
@pytest.mark.parametrize("name", [name for name in methods_available() if list_method_flags(name)])
def test_a_method_reads_all_of_its_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Noted(find_method_options(name)())
    monkeypatch.setattr(Setup, "own", lambda self, kind: options)
    trace_shapes(name)
    assert options.read == {field.name for field in dataclasses.fields(options.options)}


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
        assert method.refuses.get(option, "taken")
    for options in (TOGETHER, APART):
        taken = {key: value for name in options if name not in method.refuses for key, value in options[name].items()}
        if taken:
            trace_shapes(name, **taken)


@pytest.mark.parametrize("name", methods_available())
def test_a_method_is_made_without_a_model(name: str) -> None:
    method = declare(name, Run())
    assert method.name == name
    assert method.source


def test_a_comparison_gives_each_method_the_adapter_that_it_has_a_place_for() -> None:
    base = Run(soft_prompt=SOFT, lora=TARGETS)
    validate_comparison(Compare(methods=("plora", "promptfl", "pfedmoap", "local"), base=base))
    runs = {name: for_method(base, name) for name in ("plora", "promptfl", "pfedmoap")}
    assert [run.soft_prompt for run in runs.values()] == [PromptOptions(), SOFT, SOFT]
    assert [run.lora.targets for run in runs.values()] == [TARGETS.targets, TARGETS.targets, ""]
    with pytest.raises(UserError, match=r"--prompt\.vectors means nothing to any of --methods plora"):
        validate_comparison(Compare(methods=("plora",), base=Run(soft_prompt=SOFT)))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run(method="promptfl"), "--method promptfl trains a soft prompt for models that choose among classes, and "),
        (Run(method="local", soft_prompt=SOFT), "--method local trains a soft prompt for models that choose"),
        (Run(method="pfedmma"), "--method pfedmma is for models that choose among classes, and "),
        (Run(objective="classify"), "--objective classify: florence2-nano writes its answers"),
    ],
)
def test_a_model_that_writes_its_answers_has_no_classes(run: Run, expected: str) -> None:
    validate(run)
    with pytest.raises(UserError, match=expected) as refusal:
        make_spec(run, read_vlm("florence2-nano"))
    assert "\n" not in str(refusal.value)


def test_the_form_of_adapters_with_a_soft_prompt() -> None:
    vlm = make_bound()[0]
    specs = {name: make_spec(Run(method=name), vlm) for name in ("plora", "promptfl", "pfedmma")}
    assert [(spec.prompt, spec.parallel, bool(spec.targets)) for spec in specs.values()] == [
        (0, 0, True), (4, 0, False), (0, 8, False),
    ]  # fmt: skip
    beside = make_spec(Run(method="promptfl", soft_prompt=PromptOptions(2), lora=TARGETS), vlm)
    assert (beside.prompt, beside.targets) == (2, TARGETS.targets)


def test_a_rule_that_matches_nothing_lists_the_paths_there_are() -> None:
    from toy import make_toy

    vlm = make_toy()[0]
    options = LoraOptions(rank=2, targets="fc")
    with pytest.raises(
        UserError, match=r"--share 'fc3' is found in no .*\n  decoder/fc2/a\n  decoder/fc2/b\n  encoder/"
    ):
        check_rule(Run(method="share", method_options=Rule("fc3"), lora=options), vlm)
    with pytest.raises(UserError, match="no factor's path"):
        # A scale is data: averaging it would do nothing.
        check_rule(Run(method="share", method_options=Rule("scale$"), lora=options), vlm)
    check_rule(Run(method="share", method_options=Rule("fc2/b$"), lora=options), vlm)
    check_rule(Run(lora=options), vlm)


def test_targets_that_reach_the_tower_unnamed_are_refused(tmp_path):
    causal_cases.CASES["smolvlm"](tmp_path)
    vlm = read_vlm(tmp_path)

    def reach(targets):
        return {vlm.component(site.path) for site in lora.select(vlm.sites, targets)}

    with pytest.raises(UserError, match=r"6 sites of its vision too, such as vision_tower/layers/mlp/fc1"):
        make_spec(Run(lora=LoraOptions(targets="(q|k|v)_proj|out_proj|fc1|o_proj|position_embedding")), vlm)
    assert reach(make_spec(Run(lora=LoraOptions(targets="language_model/.*q_proj")), vlm).targets) == {"decoder"}
    both = make_spec(Run(lora=LoraOptions(targets="(vision_tower|language_model)/.*q_proj")), vlm)
    assert reach(both.targets) == {"vision", "decoder"}
    assert reach(make_spec(Run(lora=LoraOptions(targets="fc1")), vlm).targets) == {"vision"}, "it is in the tower alone"
    assert make_spec(Run(), vlm).targets == vlm.targets


def say_unreached(name, rounds=16, steps=10, **choices):
    return declare(name, Run(method=name, train=TrainOptions(rounds=rounds, local_steps=steps), **choices)).unreached


@pytest.mark.parametrize("name", methods_available())
def test_phases_that_never_come_are_told(name):
    def phases(rounds):
        method = declare(name, Run(method=name, train=TrainOptions(rounds=rounds)))
        return {method.phase(number) for number in range(1, rounds + 1)}

    for rounds in (1, 2, 3, 5, 16):
        told = say_unreached(name, rounds)
        assert told or phases(rounds) == phases(50)
        assert not told or (rounds < 3 and told.startswith(f"in {rounds} round"))


@pytest.mark.parametrize(
    ("name", "options", "rounds", "told"),
    [
        ("fedlease", fedlease.Options(warmup=5), 5, "in 5 rounds fedlease trains no cluster's expert: .* of round 5"),
        ("fedtreelora", fedtreelora.Options(warmup=5), 5, "fedtreelora trains no cluster's pair: .* end of round 5"),
        ("hilora", hilora.Options(), 1, "in 1 round hilora trains no cluster's adapter and no leaf: .* has 1 round "),
        ("hilora", hilora.Options(), 2, "in 2 rounds hilora trains no leaf"),
        ("hilora", hilora.Options(root=0.7, cluster=0.3), 10, r"has 7 rounds \(--method.root\), the clusters' 3"),
        ("rolora", MethodOptions(), 1, "in 1 round rolora trains no A"),
        ("feddpa-f", feddpa_f.Options(), 1, "in 1 round feddpa-f trains no local adapter"),
        ("feddpa-t", feddpa_t.Options(whole=True), 1, "in 1 round feddpa-t trains no local adapter"),
        ("fedsvd", fedsvd.Options(every=3), 3, "in 3 rounds fedsvd trains beside no renewed A: .* after round 3"),
        ("pfedmoap", pfedmoap.Options(), 1, "in 1 round pfedmoap trains no gate"),
    ],
)
def test_a_run_of_so_few_rounds_is_told_what_it_lacks_and_a_longer_one_nothing(name, options, rounds, told):
    assert re.search(told, say_unreached(name, rounds, method_options=options))
    if "root=0.7" not in repr(options):  # whose stages are shares of all rounds
        assert not say_unreached(name, max(rounds + 1, 3), method_options=options)


def test_a_method_without_the_objective_that_it_was_published_for_says_so():
    assert [name for name in methods_available() if list_left_out(Run(method=name))] == ["pfit"]
    assert not list_left_out(Run(method="pfit", objective="reward"))
    (told,) = list_left_out(Run(method="rolora", train=TrainOptions(rounds=1)))
    assert told == say_unreached("rolora", 1)


def test_too_few_steps_and_control_variates_of_one_round_are_told():
    assert "trains no local adapter" in say_unreached("feddpa-t", steps=1)
    assert not say_unreached("feddpa-t", steps=2)
    both = say_unreached("rolora", 1, local=SCAFFOLD)
    assert both.startswith(
        "in 1 round rolora trains no A: even rounds do; in 1 round --local.scaffold corrects nothing"
    )
    assert not say_unreached("rolora", 2, local=SCAFFOLD)
