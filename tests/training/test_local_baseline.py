"""Training alone beside a run: one load for both, stopped and resumed like every run, never trained twice."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import StopAfter, StopError, tiny_run

from fedvlm_jax.config.method_setup import VECTORS
from fedvlm_jax.config.run_options import PromptOptions, Run
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.run_dir.stored_baseline import read_baseline
from fedvlm_jax.training import federated_run, final_evaluation
from fedvlm_jax.training.extend_run import lengthen
from fedvlm_jax.training.local_baseline import find_reason_against, make_baseline, train_alone
from fedvlm_jax.utils.progress import SilentProgress


@pytest.mark.broad
def test_both_share_what_is_loaded_and_the_second_is_resumed(model, tmp_path, monkeypatch):
    loads = []
    opened = federated_run.load_model
    monkeypatch.setattr(federated_run, "load_model", lambda run, note: loads.append(run.out) or opened(run, note))
    run, show = tiny_run(model, tmp_path / "run", method="plora"), SilentProgress()
    bases, score_base = [], final_evaluation.score_base
    monkeypatch.setattr(final_evaluation, "score_base", lambda experiment: bases.append(1) or score_base(experiment))
    loaded = federated_run.load_later(show)
    federated_run.train(run, show, loaded)
    assert read_baseline(read_run(run.out)) is None
    with pytest.raises(StopError):
        train_alone(run.out, StopAfter(2), loaded)
    rest = SilentProgress()
    train_alone(run.out, rest, loaded)
    assert [line["round"] for line in rest.lines] == [3, 4]
    assert {line["method"] for line in rest.lines} == {"local"}
    assert loads == [run.out]
    alone = read_baseline(read_run(run.out))
    assert alone is not None
    assert alone.scores("zero_shot") == read_run(run.out).scores("zero_shot")
    assert len(bases) == 1, "the bare base is asked once for both"
    again = SilentProgress()
    train_alone(run.out, again, loaded)
    assert again.lines == []
    lengthen(run.out, 6)
    federated_run.resume(run.out, model=loaded)
    assert read_baseline(read_run(run.out)) is None, "of fewer rounds"
    train_alone(run.out, again, loaded)
    assert [line["round"] for line in again.lines] == [5, 6]
    assert read_baseline(read_run(run.out)) is not None


def test_a_client_that_is_alone_trains_an_adapter_of_the_run_s_form():
    """A soft prompt beside soft prompts, where low-rank factors in all layers are another question."""
    base = Run(model="clip-nano", objective="classify", out=Path("runs/a"))
    for changes, vectors in (
        ({"method": "plora"}, None),
        ({"method": "promptfl"}, VECTORS),
        ({"method": "pfedmoap"}, VECTORS),
        ({"method": "fedotp", "soft_prompt": PromptOptions(7)}, 7),
    ):
        assert make_baseline(replace(base, **changes)).soft_prompt.vectors == vectors
    assert find_reason_against(replace(base, method="pfedmma")).startswith("--method pfedmma has adapters beside whole")
