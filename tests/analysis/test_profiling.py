"""`--profile`: which rounds are traced, what is in the traces, and that results are the same bits."""

import dataclasses
import gzip
import json

import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.analysis.profile_scopes import find_scopes, label_trace, name_part, share_out_time, tabulate_shares
from fedvlm_jax.analysis.profiling import RoundProfile
from fedvlm_jax.run_dir.reader import read_metrics
from fedvlm_jax.training import federated_run

pytestmark = pytest.mark.broad


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    run = tiny_run(model, tmp_path_factory.mktemp("runs") / "plain")
    return dataclasses.replace(run, train=dataclasses.replace(run.train, finetune_steps=4))


@pytest.fixture(scope="module")
def plain(run, loaded):
    return federated_run.train(run, model=loaded)


@pytest.fixture(scope="module")
def profiled(run, loaded):
    """Four rounds of a federation and two of fine-tuning."""
    profile = RoundProfile(run.out.with_name("traced"))
    return federated_run.train(
        dataclasses.replace(run, out=run.out.with_name("traced")), model=loaded, callbacks=(profile,)
    ), profile


def read(file):
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return json.load(opened)["traceEvents"]


def test_two_rounds_of_each_phase_after_its_first_are_traced(profiled):
    folder, profile = profiled
    assert [file.name for file in profile.written] == ["round-2.json.gz", "round-3.json.gz", "round-6.json.gz"]
    for file in profile.written:
        assert file.parent == folder / "profile"
        own = file.with_name(file.name.removesuffix(".json.gz"))
        assert len(list(own.glob("plugins/profile/*/*.xplane.pb"))) == 1, "what XProf and TensorBoard read"


def test_a_trace_holds_the_operations_of_the_round_by_part(profiled):
    folder, profile = profiled
    for file in profile.written:
        events = read(file)
        assert [event["args"]["step_num"] for event in events if event["name"] == "round"] == [file.name[6]]
        assert not any("Compile" in event["name"] for event in events), "XLA's own events of a compilation"
        operations = [event for event in events if "hlo_op" in event.get("args", {})]
        found = {(event["args"]["part"], event["args"]["pass"]) for event in operations}
        for way in ("forward", "backward"):
            for half in ("encoder", "decoder"):
                assert any(part.startswith(f"local_step/{half}/") and way_ == way for part, way_ in found)
            assert any(part == "local_step/cross_entropy" and way_ == way for part, way_ in found)
        assert any(part == "local_step/optimizer" for part, _ in found)
        assert any(event["name"].startswith("local_step/encoder/self_attn") for event in operations)
    table = (folder / "profile" / "round-2.md").read_text()
    assert "| local_step/optimizer |" in table


def test_results_are_those_of_the_run_without(plain, profiled):
    traced, _ = profiled
    assert_same_adapters(plain, traced)
    ours, theirs = read_metrics(traced), read_metrics(plain)
    for line in (*ours, *theirs):
        del line["seconds"], line["clients_per_second"]
    assert ours == theirs


def test_a_resumed_run_traces_rounds_after_the_first_that_it_runs(run, loaded, plain):
    folder = run.out.with_name("resumed")
    with pytest.raises(StopError):
        federated_run.train(dataclasses.replace(run, out=folder), StopAfter(2), loaded)
    profile = RoundProfile(folder)
    federated_run.resume(folder, model=loaded, callbacks=(profile,))
    assert [file.name for file in profile.written] == ["round-4.json.gz", "round-6.json.gz"]
    assert_same_adapters(plain, folder)


TEXT = """
ENTRY %main {
  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_type="x" op_name="jit(run)/while/body/jvp(decoder)/fc1/dot_general"}
  ROOT tanh.2 = f32[2]{0} tanh(%dot.1), metadata={op_name="jit(run)/transpose(jvp(decoder))/layers/fc1/tanh"}
}
"""


def test_time_is_shared_out_by_hand():
    scopes = find_scopes(TEXT)
    assert {name: name_part(path) for name, path in scopes.items()} == {
        "dot.1": ("decoder/fc1", False),
        "tanh.2": ("decoder/fc1", True),
    }

    def event(name, start, length, thread=1):
        operation = {} if name in ("round", "end: dot.1") else {"args": {"hlo_op": name}}
        return {"ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": length, "name": name, **operation}

    events = [
        event("round", 0.0, 1e6, thread=0),
        event("while.1", 1e5, 8e5),
        event("dot.1", 1e5, 4e5),  # of which 100 ms belong to the fusion inside it
        event("fusion.9", 2e5, 1e5),
        event("end: dot.1", 5e5, 1.0),
        event("tanh.2", 6e5, 3e5),
        event("dot.1", 1e5, 2e5, thread=2),
    ]
    trace = label_trace({"traceEvents": events}, scopes)
    assert [event["name"] for event in trace["traceEvents"]][2:4] == ["decoder/fc1 · dot.1", "(other) · fusion.9"]
    shares = share_out_time(trace)
    assert (shares.seconds, shares.inside) == (1.0, 0.8)
    assert shares.parts["decoder/fc1"] == pytest.approx((0.5, 0.3))
    assert shares.parts["(other)"] == pytest.approx((0.1, 0.0))
    assert "| decoder/fc1 | 500.0 ms | 300.0 ms | 88.9% |" in tabulate_shares(2, shares)
