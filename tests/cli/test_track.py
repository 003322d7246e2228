"""`--track` on the command line: what is refused before anything is loaded, and what reaches a run."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from made_up import write_run

import fedvlm_jax.training
from fedvlm_jax.cli.main import main
from fedvlm_jax.config.run_options import Run, to_json
from fedvlm_jax.config.track_options import TrackOptions
from fedvlm_jax.training.tracking import base


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tracker's package is there, and nobody is asked whether they are logged in."""
    monkeypatch.setattr(base, "require", lambda options: None)


def replace_work(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    module = types.ModuleType("fedvlm_jax.training.federated_run")
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fedvlm_jax.training, "federated_run", module, raising=False)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--track", "wandbb"], "invalid choice 'wandbb' for argument '--track'"),
        (["--track", "mlflow", "mlflow"], "--track names mlflow twice"),
        (["--track.project", "x"], "--track.project says nothing without --track"),
        (["--track.client-names"], "--track.client-names says nothing without --track"),
        (["--track", "wandb", "--track.project", ""], "--track.project is empty"),
        (["--track", "wandb", "--track.name", "a/b"], "--track.name 'a/b': at most 128 characters"),
        (["--track", "wandb", "--track.name", "x" * 129], "at most 128 characters"),
        (["--track", "wandb", "--track.name", "a\x1b[31m"], "that are seen"),
        (["--track", "trackio"], "needs the package no_such_package, which is not installed: pip install 'trackio>="),
    ],
)
def test_what_cannot_work_is_one_line(
    command: str, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base.load_tracker("trackio"), "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit) as stop:
        main([command, *words])
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert expected in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.usefixtures("installed")
def test_trackers_reach_a_run_and_are_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: Run, show: object, callbacks: Any) -> Path:
        (tracking,) = callbacks
        assert tracking.options == TrackOptions(("mlflow", "wandb"), project="mine", name="first")
        assert run.out is not None
        assert to_json(run) == to_json(Run(out=run.out))
        folder = write_run(run.out, {"a": 0.25}, {"a": 0.5}, run)
        record = base.make_record(folder, "wandb", tracking.options)
        base.write_record(folder, base.dataclasses.replace(record, view="wandb sync x", results=6))
        return folder

    replace_work(monkeypatch, train=train)
    named = ["--track", "mlflow", "wandb", "--track.project", "mine", "--track.name", "first"]
    main(["train", *named, "--no-baseline", "--out", str(tmp_path / "run")])
    assert "track   wandb sync x\n" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("words", "expected"), [([], ("wandb",)), (["--track", "mlflow"], ("mlflow",)), (["--track"], None)]
)
def test_a_run_that_goes_on_has_its_trackers_or_those_that_are_named(
    words: list[str], expected: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.25}, {"a": 0.5})
    base.write_record(folder, base.make_record(folder, "wandb", TrackOptions(project="mine", name="first")))
    seen: list[Any] = []
    replace_work(monkeypatch, resume=lambda run, show, callbacks=(): seen.extend(callbacks) or run)
    main(["train", "--resume", str(folder), "--no-baseline", *words])
    assert [tracking.options.trackers for tracking in seen] == ([] if expected is None else [expected])


@pytest.mark.usefixtures("installed")
def test_another_project_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", {"a": 0.25}, {"a": 0.5})
    base.write_record(folder, base.make_record(folder, "wandb", TrackOptions(project="mine")))
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(folder), "--track", "wandb", "--track.project", "other"])
    assert "is at wandb already, with --track.project mine" in capsys.readouterr().err
