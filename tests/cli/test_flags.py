"""Short forms of the command line: --version, --lr, and the aliases of what people use most."""

import pytest

import fedvlm_jax
from fedvlm_jax.cli import main, train
from fedvlm_jax.cli._flags import expand_rate


@pytest.fixture
def asked(monkeypatch):
    """-> the options with which training was asked for; it is not done."""
    seen = []
    monkeypatch.setattr(train, "_train", lambda run, *others: seen.append(run))
    monkeypatch.setattr(train, "start_quickly", lambda **options: None)
    return seen


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version(flag, capsys):
    main.main([flag])
    assert capsys.readouterr().out == f"fedvlm {fedvlm_jax.__version__}\n"


def test_aliases_are_the_options_that_they_stand_for(asked):
    main.main(["train", "--rounds", "3", "--rank", "4", "--batch-size", "5", "--lr", "1e-3"])
    (run,) = asked
    assert (run.train.rounds, run.lora.rank, run.train.batch_size) == (3, 4, 5)
    assert (run.train.learning_rate_a, run.train.learning_rate_b) == (1e-3, 1e-3)


@pytest.mark.parametrize("words", [["--lr=0.5", "--seed", "1"], ["--seed", "1", "--lr", "0.5"]])
def test_one_rate_sets_both(words):
    expanded = expand_rate(words)
    for flag in ("--train.learning-rate-a", "--train.learning-rate-b"):
        assert expanded[expanded.index(flag) + 1] == "0.5"
    assert len(expanded) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1e-3", "--train.learning-rate-b", "1"], "leave out --lr or --train.learning-rate-b"),
        (["--train.learning_rate_a=1", "--lr", "1e-3"], "leave out --lr or --train.learning-rate-a"),
        (["--lr"], "--lr: expected a learning rate"),
        (["--lr="], "--lr: expected a learning rate"),
        (["--lr", "--seed", "1"], "--lr: expected a learning rate"),
        (["--lr", "fast"], "--train.learning-rate-a"),
        (["--methdo", "local"], "did you mean --method?"),
        (["--learning-rate-a", "1"], "did you mean --train.learning-rate-a?"),
        (["--learning-rate-b", "1"], "did you mean --train.learning-rate-b?"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, asked, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["train", *words])
    said = capsys.readouterr().err
    assert (stop.value.code, asked) == (2, [])
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--rank", "--batch-size", "--lr"])
def test_a_short_form_beside_resume_is_refused_like_the_long_one(flag, asked, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main(["train", "--resume", str(tmp_path), flag, "1"])
    assert (stop.value.code, asked) == (2, [])
    assert "--resume takes all options from the run's folder" in capsys.readouterr().err


def test_compare_has_methods_and_not_a_method(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["compare", "--method", "local"])
    assert stop.value.code == 2
    assert "--methods" in capsys.readouterr().err


def test_help_begins_with_what_is_used_most(capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("--method {", "--model NAME", "--data NAME", "--rounds", "--rank")]
    assert places == sorted(places)
    assert "--server." not in text
    assert max(map(len, text.splitlines())) <= 80


def test_all_options_are_listed_in_groups_when_asked_for(capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--method", "ditto", "--help-all"])
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("method options", "--method.lambda", "train options", "--server.beta1")]
    assert places == sorted(places)
    assert "--method.alpha" not in text  # apfl's
    assert max(map(len, text.splitlines())) <= 80
