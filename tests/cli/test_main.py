"""The command line: what `--help` may import, how bad input ends, and what reaches the functions that do the work."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import fedvlm_jax.training
from fedvlm_jax.cli.main import commands_available, main
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import Run, to_json

HEAVY = ("jax", "flax", "transformers", "datasets", "matplotlib", "scipy.stats", "numpy", "jaxtyping")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        [],
        *([command, "--help"] for command in ("train", "compare", "explain", "plan", "ask", "demo", "report")),
        *([command, "--help"] for command in ("deploy", "node")),
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom fedvlm_jax.cli.main import main\n"
        f"try:\n    main({words})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "usage: fedvlm" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_every_command_is_listed_in_order() -> None:
    named = "data explain plan train compare evaluate ask demo report audit export deploy node cache"
    assert list(commands_available()) == named.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tain"], "there is no command tain; there are data, explain, plan, train, compare"),
        (["train", "--methd", "x"], "did you mean --method?"),
        (["train", "--data.prompt", "bad"], "invalid choice 'bad' for argument '--data.prompt'"),
        (["train", "--data.alpha", "-1"], "--data.alpha is -1.0: it must be above 0"),
        (["train", "--train.rounds", "x"], "--rounds: x is not a whole number"),
        (["train", "--train.rounds", "0"], "--train.rounds is 0: it must be 1 or more"),
        (["train", "--mesh", "4"], "--mesh 4: expected clients=N or clients=N,model=M, for example"),
        (["train", "--system.unroll", "-1"], "--system.unroll is -1: it must be 0 or more"),
        (["train", "--system.mesh", "clients=0"], "--mesh clients=0: every axis must be 1 or more"),
        (["train", "--mesh", "clients=4", "--wave", "6"], "--wave 6 does not divide over --mesh clients=4"),
        (["compare", "--mesh", "model=2,clients=4"], "--mesh model=2,clients=4: expected"),
        (["train", "--mesh", "clients=4096"], "--mesh clients=4096 takes 4,096 devices: there are"),
        (["train", "--resume", "nowhere", "--mesh", "clients=2"], "leave out --system.mesh"),
        (["train", "--method", "plorra"], "did you mean plora?"),
        (["explain", "--privacy.noise", "1"], "--privacy.* is explained for a method"),
        (["train", "--model", "./nowhere"], "there is no such folder"),
        (["train", "--resume", "nowhere"], "no config.json there"),
        (["train", "--resume", "nowhere", "--seed", "3", "--data", "x"], "leave out --seed"),
        (["compare", "--seeds", "0"], "--seeds is 0: it must be 1 or more"),
        (["compare", "--methods", "plora", "plora"], "names plora twice"),
        (["compare", "--method", "local"], "here say --methods local"),
        (["train", "--share", "(b"], "--share '(b' is not a regular expression"),
        (["train", "--method", "local", "--share", "b$"], "leave out --method local, or leave out --share"),
        (["compare", "--methods", "local", "plora", "--share", "b$"], "compare share too"),
        (["train", "--method.lambda", "2"], "--method.lambda belongs to ditto, lora-fair, pfedme; --method plora has"),
        (["train", "--method", "ditto", "--method.lamda", "2"], "did you mean --method.lambda?"),
        (["train", "--method", "apfl", "--method.alpha", "2"], "--method.alpha is 2.0: it must be from 0 to 1"),
        (["compare", "--methods", "ditto", "--method.lambda", "2"], "--methods ditto has --method.ditto.lambda"),
        (["explain", "ditto", "--method.alpha", "2"], "belongs to apfl, feddpa-f, feddpa-t; --method ditto has --meth"),
        (["compare", "--methods", "local", "share"], "--methods share needs its rule: add --share REGEX"),
        (["explain", "plorra"], "did you mean plora?"),
        (["explain", "plora", "--cohort", "17"], "there are only 16 clients"),
        (["plan", "--topology", "v9:2x2"], "nothing is known of v9; there are v4, v5e, v5p, v6e"),
        (["plan", "--topology", "v5e:3x3"], "there is no such slice; v5e has 1x1, 2x2, 2x4"),
        (["plan", "--price-per-chip-hour", "2"], "nothing is known of the speed of cpu"),
        (["plan", "--cohort", "20"], "there are only 16 clients"),
        (["plan", "--system.cache-gib", "3"], "--system.cache-gib means nothing to a plan"),
        (["plan", "--sizes.prompt-tokens", "0"], "--sizes.prompt-tokens is 0: it must be 1 or more"),
        (["plan", "--train.local-epochs", "2"], "say --sizes.examples too"),
        (["plan", "--method", "plorra"], "did you mean plora?"),
        (["evaluate", "nowhere"], "not the folder of a run"),
        (["report"], "say whose report"),
        (["report", "nowhere"], "there is no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert expected in shown.err
    assert shown.err.startswith("fedvlm: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_flag_that_was_meant_is_named_in_every_locale(encoding: str) -> None:
    # tyro draws other frames where stdout is not UTF-8, and the message is read out of the frame.
    program = "from fedvlm_jax.cli.main import main; main(['train', '--methd', 'x'])"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fedvlm: Unrecognized options: --methd, x; did you mean --method? (fedvlm train")


def replace_work(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    """Put a module without jax in the place of the one that does the work."""
    module = types.ModuleType(f"fedvlm_jax.training.{name}")
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fedvlm_jax.training, name, module, raising=False)


def test_train_hands_over_the_options_and_shows_table_and_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from made_up import write_run

    def train(run: Run, show: object) -> Path:
        assert run.data.source == "emoji"
        assert run.data.prompt == "client-language"
        assert (run.method, run.train.rounds) == ("local", 3)
        assert run.out is not None
        return write_run(run.out, {"a": 0.25, "b": 0.25}, {"a": 0.5, "b": 0.75}, run)

    replace_work(monkeypatch, "federated_run", train=train)
    flags = ["--method", "local", "--data", "emoji", "--data.prompt", "client-language", "--train.rounds", "3"]
    main(["train", *flags, "--no-baseline", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "62.5 %" in shown
    assert "report.html" in shown
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_folder_is_chosen_before_the_work_so_that_ctrl_c_can_name_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: Run, show: object) -> Path:
        assert run.out is not None
        (run.out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)

    replace_work(monkeypatch, "federated_run", train=train)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--no-baseline"])
    assert stop.value.code == 130
    shown = capsys.readouterr().err
    assert "fedvlm train --resume runs/" in shown
    assert shown.endswith(" --no-baseline\n")


def test_resume_reaches_the_loop_with_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from made_up import write_run

    folder = write_run(tmp_path / "run", {"a": 0.25}, {"a": 0.5})
    seen: list[Path] = []

    def resume(run: Path, show: object) -> Path:
        seen.append(run)
        return run

    replace_work(monkeypatch, "federated_run", resume=resume)
    main(["train", "--resume", str(folder), "--no-baseline"])
    assert seen == [folder]


@pytest.mark.parametrize(
    ("traced", "told"), [(["round-2"], "round-2.json.gz open in https://ui.perf"), ([], "nothing")]
)
def test_profile_watches_the_run_and_the_end_says_where_it_is(
    traced: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from made_up import write_run

    def train(run: Run, show: object, callbacks: Any) -> Path:
        (watch,) = callbacks
        assert run.out is not None
        assert to_json(run) == to_json(Run(out=run.out)), "what is traced is no part of what the run is"
        watch.written += [watch.folder / f"{name}.json.gz" for name in traced]
        return write_run(run.out, {"a": 0.25}, {"a": 0.5}, run)

    replace_work(monkeypatch, "federated_run", train=train)
    main(["train", "--profile", "--no-baseline", "--out", str(tmp_path / "run")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("profile ")
    assert told in last
    assert (f"--logdir {tmp_path / 'run' / 'profile'}" in last) == bool(traced)


def test_compare_takes_the_flags_of_train_for_all_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from made_up import write_comparison

    seen: list[Compare] = []

    def compare(comparison: Compare, show: object) -> Path:
        seen.append(comparison)
        assert comparison.out is not None
        return write_comparison(comparison.out, {"local": {0: {"a": 0.5}}}, {0: {"a": 0.2}})

    replace_work(monkeypatch, "compare", compare=compare)
    flags = ["--methods", "local", "plora", "--seeds", "5", "--train.rounds", "7"]
    short = ["--mesh", "clients=2,model=2", "--wave", "4", "--data.partition", "iid", "--clients", "8"]
    main(["compare", *flags, *short, "--out", str(tmp_path / "c")])
    assert seen[0].methods == ("local", "plora")
    assert seen[0].seeds == 5
    assert seen[0].base.train.rounds == 7
    assert (seen[0].base.system.mesh, seen[0].base.system.wave) == ("clients=2,model=2", 4)
    assert seen[0].base.data.partition.clients == 8
    assert json.dumps(to_json(seen[0].base))
