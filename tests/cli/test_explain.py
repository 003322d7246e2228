"""`fedvlm explain`: what is told of a method is what the method does, a stranger's as well."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from config.test_method_checks import trace_shapes
from models import causal_cases
from rich.console import Console
from tiny_run import make_folder
from toy import SPEC, WIDTH, WRITES, WRITING, make_toy

from fedvlm_jax import lora
from fedvlm_jax.analysis.explain import explain_method
from fedvlm_jax.analysis.trace_method import Held
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import LoraOptions, PromptOptions, Run, TrainOptions, methods_available
from fedvlm_jax.federation.communication import count_bytes, find_travelling
from fedvlm_jax.methods import Method, load_method
from fedvlm_jax.methods.config import LocalOptions
from fedvlm_jax.methods.rule_based import Options as Rule
from fedvlm_jax.methods.rule_based import Parts, make_share_method
from fedvlm_jax.methods.zoo import feddpa_f
from fedvlm_jax.reporting.method_report import tabulate_explanation, tabulate_methods
from fedvlm_jax.reporting.tables import show
from fedvlm_jax.utils import tree

CLIENTS = 4
YES = (Held(""),)
OWN = (Held("own"),)


@pytest.fixture(scope="module")
def toy():
    """The toy with what `explain` asks of a model: shapes. fc1 is 6 → 8 in the encoder, fc2 8 → 15 in the decoder."""
    vlm, params = make_toy()
    shapes = jax.eval_shape(lambda: params)
    batch = {"image_features": jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)}
    components = {name: f"{name}/" for name in ("encoder", "decoder")}
    return SimpleNamespace(
        sites=vlm.sites, components=components, component=vlm.component, logits=vlm.logits, shapes=lambda: shapes,
        example_batch=lambda: batch, **WRITES,
    )  # fmt: skip


def explain(toy, name, make=None, **choices):
    changes = {name: choices.pop(name) for name in ("targets", "ranks") if name in choices}
    options = LoraOptions(**{"rank": SPEC.rank, "alpha": SPEC.alpha, "targets": "fc", **changes})
    run = Run(method=name, lora=options, **{"train": TrainOptions(rounds=4), **choices})
    return explain_method(toy, run, CLIENTS, make or (lambda setup: load_method(name, setup)))


def tensors(stage):
    return {f"{tensor.group}/{tensor.name}".strip("/"): tensor for tensor in stage.tensors}


def statuses(stage, name="fc1"):
    """leaf -> how many are trained, sent, received, kept; at one site."""
    return {
        tensor.name: (tensor.trained, tensor.sent, tensor.received, tensor.kept)
        for tensor in stage.tensors
        if tensor.group.endswith(name)
    }


def test_plora_by_hand(toy):
    explained = explain(toy, "plora")
    (stage,) = explained.stages
    assert stage.rounds == (1, 2, 3, 4)
    assert list(tensors(stage)) == ["decoder/fc2/a", "decoder/fc2/b", "encoder/fc1/a", "encoder/fc1/b"]
    assert tensors(stage)["encoder/fc1/a"].shape == (6, 2)
    assert statuses(stage) == {"a": (1, (), (), OWN), "b": (1, YES, YES, ())}
    a, b = 6 * 2 + 8 * 2, 2 * 8 + 2 * 15
    assert stage.trained == a + b
    assert stage.up == stage.down == 4 * b
    assert explained.optimizer == 4 * (2 * (a + b) + 1)  # adam's two moments and its count
    assert explained.state == explained.optimizer + 4 * (a + 2)  # and two scales
    assert explained.base == 6 * 8 + 8 + 8 * 15 + 15
    assert not explained.moves_base
    assert not explained.own_download


def test_local_sends_nothing_and_fedavg_keeps_nothing(toy):
    (local,), (averaged,) = explain(toy, "local").stages, explain(toy, "fedavg-lora").stages
    assert statuses(local) == {"a": (1, (), (), OWN), "b": (1, (), (), OWN)}
    assert (local.up, local.down) == (0, 0)
    assert statuses(averaged) == {"a": (1, YES, YES, ()), "b": (1, YES, YES, ())}


def test_what_is_frozen_and_what_begins_anew(toy):
    (stage,) = explain(toy, "ffa-lora").stages
    assert statuses(stage) == {"a": (0, (), (), ()), "b": (1, YES, YES, ())}
    (stage,) = explain(toy, "plora-reset-a").stages  # it begins every round anew, and answers with what it became
    assert statuses(stage) == {"a": (1, (), (), OWN), "b": (1, YES, YES, ())}
    (stage,) = explain(toy, "fed-sb").stages
    assert statuses(stage) == {"a": (0, (), (), ()), "b": (0, (), (), ()), "r": (1, YES, YES, ())}


def test_two_phases_are_two_stages(toy):
    odd, even = explain(toy, "rolora").stages
    assert (odd.rounds, even.rounds) == ((1, 3), (2, 4))
    assert statuses(odd) == {"a": (0, (), (), ()), "b": (1, YES, YES, ())}
    assert statuses(even) == {"a": (1, YES, YES, ()), "b": (0, (), (), ())}
    first, last = explain(toy, "feddpa-f", method_options=feddpa_f.Options(local=0.5)).stages
    assert (first.rounds, last.rounds) == ((1, 2), (3, 4))
    assert last.up == last.down == 0


def test_two_models_are_counted_twice_and_one_model_once(toy):
    """pfedme trains one model in several goes, ditto and feddpa-t train two."""
    trained = {name: explain(toy, name).stages[0].trained for name in ("fedavg-lora", "pfedme", "ditto", "feddpa-t")}
    once = trained["fedavg-lora"]
    assert trained == {"fedavg-lora": once, "pfedme": once, "ditto": 2 * once, "feddpa-t": 2 * once}


def test_bases_that_move_and_downloads_of_ones_own(toy):
    flora = explain(toy, "flora")
    assert flora.moves_base
    assert flora.stages[0].down == CLIENTS * flora.stages[0].up
    assert statuses(flora.stages[0])["a"] == (1, YES, (Held("", times=CLIENTS),), ())
    assert explain(toy, "flora", cohort=3).stages[0].down == 3 * flora.stages[0].up
    fedalt = explain(toy, "fedalt")
    assert fedalt.own_download
    assert statuses(fedalt.stages[0]) == {"a": (1, YES, YES, OWN), "b": (1, YES, YES, OWN), "gate": (1, (), (), OWN)}
    assert statuses(explain(toy, "ce-lora").stages[0])["c"] == (1, YES, YES, OWN)


def test_leaves_after_layers_that_have_no_lora_are_told(toy):
    """pftt's bottlenecks come after fc2, whether or not a target is there."""
    stage = explain(toy, "pftt", targets="fc1").stages[0]
    assert statuses(stage, "fc2") == {"down": (1, YES, YES, ()), "up": (1, YES, YES, ())}
    assert statuses(stage) == {"a": (1, (), (), OWN), "b": (1, (), (), OWN)}


def test_control_variates_travel_and_stay_beside_the_factors(toy):
    options = {"local": LocalOptions(scaffold=True), "train": TrainOptions(rounds=4, optimizer="sgd")}
    (stage,) = explain(toy, "plora", **options).stages
    both = (Held("control"), Held("update"))
    assert statuses(stage) == {"a": (1, (), (), OWN), "b": (1, both, both, (Held("control"),))}
    (plain,) = explain(toy, "plora").stages
    assert stage.up == 2 * plain.up


def test_ranks_count_for_what_they_are(toy):
    (stage,) = explain(toy, "fedavg-lora", ranks=(1, 2, 2)).stages  # dealt: 1, 2, 2, 1
    rows = 6 + 8 + 8 + 15  # numbers of one rank
    rank = 4  # the client says which is its own
    assert stage.by_rank == {1: (4 * rows + rank,) * 2, 2: (8 * rows + rank,) * 2}
    assert stage.up == 6 * rows + rank


@pytest.mark.broad
@pytest.mark.parametrize("name", WRITING)
def test_bytes_are_those_of_a_real_round(toy, name):
    """What `explain` counts from one client's message is what the simulator counts from a round's."""
    method, server, outs = trace_shapes(name)
    counted = [find_travelling(method, server, out.messages) for out in outs.values()]
    stages = explain_method(
        toy,
        Run(method=name, lora=LoraOptions(rank=2, alpha=4.0, targets="fc"), train=TrainOptions(rounds=4)),
        2,
        lambda setup: load_method(name, setup),
    ).stages
    assert [(stage.up, stage.down) for stage in stages] == [
        (count_bytes(up), count_bytes(down)) for up, down in counted
    ]


def make_stranger(setup) -> Method:
    """A third factor that is trained and private, b sent, and a mean of the others' handed out, without `travels`."""

    def extend(adapter):
        return tree.unflatten({**tree.flatten(adapter), **{f"{path}/m": jnp.ones(2) for path in ("encoder/fc1",)}})

    parts = Parts(
        extend=extend,
        assemble=lambda factors: tree.partition(factors, lambda path: not path.endswith("/m"))[0],
        trained=(lambda path: path.endswith(("/a", "/b", "/m")),),
    )
    made = make_share_method("stranger", "nowhere", lora.Rule("/b$"), setup, parts)

    return dataclasses.replace(made, mixes=True, travels=None)


def test_a_strangers_method_is_explained(toy):
    explained = explain(toy, "plora", make_stranger)
    (stage,) = explained.stages
    assert statuses(stage) == {"a": (1, (), (), OWN), "b": (1, YES, YES, ()), "m": (1, (), (), OWN)}
    assert explained.own_download
    assert stage.down == stage.up


def test_single_layers_are_named():
    """A rule that splits a stack: layer 1 of b is sent, the others are kept."""
    from fedvlm_jax.models import read_vlm

    options = LoraOptions(rank=2, targets="encoder/layers/fc1")
    run = Run(method="share", method_options=Rule("layers/1/fc1/b$"), lora=options, train=TrainOptions(rounds=2))
    explained = explain_method(read_vlm("florence2-nano"), run, 4, lambda setup: load_method(run.method, setup))
    (stage,) = explained.stages
    assert statuses(stage)["b"] == (1, (Held("", ("1",)),), (Held("", ("1",)),), (Held("own", ("0",)),))
    assert stage.up == 4 * 2 * 512
    table = tabulate_explanation(explained)[0]
    assert ("b", "2×2×512", "trained", "layer 1", "layer 1", "own layer 0") in [row[1:] for row in table.rows]


def test_a_layer_that_is_trained_apart_is_told_with_where_it_goes():
    """pfit trains the last layer of a stack as a tensor of its own; sites that are alike share its lines."""
    from fedvlm_jax.models import read_vlm

    run = Run(method="pfit", lora=LoraOptions(rank=2, targets="decoder/layers/self_attn"), train=TrainOptions(rounds=2))
    explained = explain_method(read_vlm("florence2-nano"), run, 4, lambda setup: load_method(run.method, setup))
    table = tabulate_explanation(explained)[0]
    assert table.rows == (
        ("decoder/layers/", "a/1", "128×2", "trained", "yes", "yes", "own"),
        (" self_attn/", "b/1", "2×128", "trained", "yes", "yes", "own"),
        (" {k,out,q,v}_proj", *[""] * 6),
    )
    assert explained.stages[0].up == 4 * sum(4 * 2 * 128 for _ in "ab")


def test_single_vectors_are_named_and_names_stay_whole_in_80_columns():
    """A rule that splits a soft prompt: vectors 0 and 1 are sent, the others are kept."""
    from fedvlm_jax.models import read_vlm

    run = Run(method="share", model="clip-nano", method_options=Rule("prompt/[01]$"), soft_prompt=PromptOptions(4))
    explained = explain_method(read_vlm("clip-nano"), run, 4, lambda setup: load_method(run.method, setup))
    table = tabulate_explanation(explained)[0]
    held = ("vectors 0–1", "vectors 0–1", "own vectors 2–3")
    assert table.rows == (("token_embedding", "prompt", "4×128", "trained", *held),)
    console = Console(file=io.StringIO(), width=80)
    show(console, table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("│ token_embedding │ prompt │") for line in lines)


def test_the_catalogue_has_every_method_with_its_source():
    table = tabulate_methods(Run())
    assert [row[0] for row in table.rows] == [*methods_available(), "share"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["plora"] == (
        "arXiv 2507.17088: B̄ = Σ p_k B_k is shared, A_k is private",
        "proximal, ranks, scaffold, server",
    )
    assert rows["fedalt"][1] == "–"
    assert rows["ce-lora"][1] == "--method.temperature"


def test_the_command_needs_no_weights_and_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = make_folder(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    main(["explain", "--model", str(folder), "--share", "decoder/.*/b$", "--lora.rank", "2"])
    shown = capsys.readouterr().out
    assert shown.startswith("share  ours: factors whose path holds decoder/.*/b$ are averaged")
    assert "{k,out,q,v}_proj" in shown
    sent = 4 * 2 * 16 * 10  # b of ten sites, 2 × 16 float32
    assert f"{sent / 1024:.1f} KiB ({sent:,} bytes)" in shown


def test_a_model_alone_is_its_parts_and_its_sites(tmp_path, capsys):
    causal_cases.CASES["smolvlm"](tmp_path)  # configuration and processor, no weights
    main(["explain", "--model", str(tmp_path), "--lora.rank", "2"])
    shown = capsys.readouterr().out
    assert "32×32 pixels, 4 image tokens" in shown
    assert "160, an answer goes on where its prompt ends" in shown
    # q and o 24 → 24, k and v 24 → 12, three products of 24 and 40; in two layers, at rank 2.
    adapted = 2 * 2 * (2 * 48 + 2 * 36 + 3 * 64)
    assert f"Of rank 2 it has {adapted:,} parameters" in " ".join(shown.split())


def test_a_rule_that_names_nothing_is_one_message_before_weights_are_read(tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    options = ["--model", str(folder), "--share", "nothing/b$", "--lora.rank", "2", "--out", str(tmp_path / "out")]
    for command in (["train"], ["compare", "--methods", "local", "share"]):
        with pytest.raises(SystemExit):
            main([*command, *options])
        shown = capsys.readouterr().err
        assert shown.startswith("fedvlm: --share 'nothing/b$' is found in no factor's path; there are:\n")
        assert "  language_model/decoder/layers/encoder_attn/k_proj/a\n" in shown


OWN_DOWNLOAD = ("ce-lora", "fedalt", "fedmosaic", "fedtreelora", "hilora")
"""Methods whose clients receive numbers that others do not: mixtures, or what a cluster has."""


@pytest.mark.parametrize("name", [*OWN_DOWNLOAD, "plora", "fedlease", "feddat"])
def test_who_receives_something_of_its_own_is_found_in_what_is_sent(toy, name):
    """Of fedlease all experts go to all, and beside them the number of the client's own."""
    assert explain(toy, name).own_download == (name in OWN_DOWNLOAD)
