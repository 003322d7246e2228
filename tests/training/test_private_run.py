"""Runs with differential privacy: their lines' ε is the accountant's, and whoever goes on with them goes on with it."""

import dataclasses
import json
from types import SimpleNamespace

import dp_accounting as dp
import pytest
from tiny_run import StopAfter, StopError, assert_same_adapters, tiny_run

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.privacy.budget import settle
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.reporting.report import write_report
from fedvlm_jax.run_dir.reader import read_comparison, read_run
from fedvlm_jax.run_dir.validated_files import read_config
from fedvlm_jax.training import federated_run
from fedvlm_jax.training.callbacks import PrivacyLedger
from fedvlm_jax.training.compare import compare
from fedvlm_jax.training.extend_run import lengthen
from fedvlm_jax.utils.progress import SilentProgress


def ask(noise, rounds, delta=1e-2, chance=0.75):
    """The tiny run draws each of four clients with the chance 3/4, and has places for all of them."""
    event = dp.PoissonSampledDpEvent(chance, dp.GaussianDpEvent(noise))
    return dp.pld.PLDAccountant().compose(event, rounds).get_epsilon(delta)


def find_limit():
    """Return an ε that four rounds keep to, and five do not."""
    return round((ask(1.5, 4) + ask(1.5, 5)) / 2, 2)


@pytest.fixture(scope="module")
def stopped(model, loaded, tmp_path_factory):
    """A run whose ε is spent before its rounds are, killed once and resumed."""
    folder = tmp_path_factory.mktemp("private") / "run"
    run = tiny_run(model, folder, train=TrainOptions(rounds=6, local_steps=1, batch_size=4),
                   privacy=PrivacyOptions(noise=1.5, epsilon=find_limit(), delta=1e-2))  # fmt: skip
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(2), loaded)
    federated_run.resume(folder, show := SilentProgress(), loaded)
    return run, folder, show


def test_much_noise_is_told_once():
    ledger = PrivacyLedger(settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=3))
    show, lines = SilentProgress(), [{"noise_to_update": size} for size in (9.0, 11.0, 12.0)]
    trainer = SimpleNamespace(experiment=SimpleNamespace(show=show), is_validated=lambda round_: round_ == 3)
    for round_, line in enumerate(lines, start=1):
        ledger.on_round(trainer, SimpleNamespace(round=round_, line=line))
    (note,) = show.notes
    assert note.startswith("round 2: the noise is 11 times as large as the clients' mean update")
    assert [line["private"] for line in lines] == [False] * 3
    assert [set(line) & {"epsilon", "epsilon_bound"} for line in lines[1:]] == [
        {"epsilon_bound"}, {"epsilon", "epsilon_bound"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fractions", "quantile", "told"),
    [([0.0] * 5, None, 1), ([0.0, 0.0, 0.1, 0.0, 0.0, 0.0], None, 0), ([0.0] * 5, 0.5, 0), ([0.5] * 5, None, 0)],
)
def test_a_clip_that_nothing_reaches_is_told_once(fractions: list[float], quantile: float | None, told: int):
    options = PrivacyOptions(noise=5.0, clip=0.7, quantile=quantile, sampling="all")
    ledger = PrivacyLedger(settle(options, clients=100, cohort=None, rounds=9))
    show = SilentProgress()
    trainer = SimpleNamespace(experiment=SimpleNamespace(show=show), is_validated=lambda _: False)
    for round_, fraction in enumerate(fractions, start=1):
        ledger.on_round(trainer, SimpleNamespace(round=round_, line={"clip_fraction": fraction}))
    assert [note.startswith("no update of 3 rounds was as long as --privacy.clip 0.7") for note in show.notes] == [
        True
    ] * told


@pytest.mark.broad
def test_a_run_stops_where_its_epsilon_is_spent(stopped):
    run, folder, show = stopped
    lines, results = read_run(folder).rounds, read_run(folder).results
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert any(note.endswith(f"; stops after 4 of 6 rounds, where epsilon {run.privacy.epsilon} is spent")
               for note in show.notes)  # fmt: skip
    spent = {line["round"]: line["epsilon"] for line in lines if "epsilon" in line}
    assert spent == pytest.approx({2: ask(1.5, 2), 4: ask(1.5, 4)})
    assert [line["delta"] for line in lines] == [1e-2] * 4
    assert [line["private"] for line in lines] == [False] * 4
    assert [line["epsilon_bound"] > ask(1.5, line["round"]) for line in lines] == [True] * 4
    assert results["privacy"]["epsilon"] == spent[4]
    assert results["privacy"]["clients"] == results["selected_round"] == 4


@pytest.mark.broad
def test_what_was_settled_is_stored_beside_what_was_asked(stopped):
    run, folder, _ = stopped
    stored = read_config(folder)
    assert stored.run == run
    assert stored.budget is not None
    assert (stored.budget.noise, stored.budget.limit, stored.budget.places) == (1.5, run.privacy.epsilon, 4)
    assert stored.budget.rounds == 4


@pytest.mark.broad
def test_it_has_no_more_rounds(stopped):
    run, folder, _ = stopped
    with pytest.raises(
        UserError, match=rf"--train.rounds 9: epsilon {run.privacy.epsilon} of the run is spent after 4"
    ):
        lengthen(folder, 9)


@pytest.mark.broad
def test_a_killed_run_ends_like_one_that_was_not(stopped, loaded, tmp_path):
    run, folder, _ = stopped
    federated_run.train(dataclasses.replace(run, out=tmp_path / "whole"), model=loaded)
    assert_same_adapters(folder, tmp_path / "whole")


@pytest.mark.broad
def test_its_report_says_what_epsilon_covers(stopped):
    _, folder, _ = stopped
    page = write_report([folder])
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Differential privacy" in text
    assert "does not cover private factors" in text
    assert "the last; test was read once" in text
    assert "It was to have 6 rounds" in text
    assert "of what is shared, if nobody knows the seed" in text
    assert (folder / "figures" / "epsilon.png").is_file()
    assert "ε so far" in page.read_text(encoding="utf-8")


@pytest.mark.broad
def test_noise_of_a_secret_is_no_other_runs_and_is_kept_and_not_told(model, loaded, tmp_path):
    """Who knows the seed could take noise that comes from it off again."""
    run = tiny_run(model, tmp_path / "one", train=TrainOptions(rounds=2, local_steps=1, batch_size=4),
                   privacy=PrivacyOptions(noise=1.5, delta=1e-2, secret=True))  # fmt: skip
    other = dataclasses.replace(run, out=tmp_path / "other")
    with pytest.raises(StopError):
        federated_run.train(run, StopAfter(1), loaded)
    federated_run.resume(run.out, model=loaded)
    federated_run.train(other, model=loaded)
    one, two = (read_config(folder).budget.secret for folder in (run.out, other.out))
    assert len(one) == len(two) == 32
    assert one != two
    noise = [[line["noise_norm"] for line in read_run(folder).rounds] for folder in (run.out, other.out)]
    assert not set(noise[0]) & set(noise[1])
    assert "of what is shared, if" not in write_report([run.out]).read_text(encoding="utf-8")
    told = [file for file in run.out.rglob("*") if file.is_file() and one.encode() in file.read_bytes()]
    assert [file.name for file in told] == ["config.json"]
    assert "seed" not in read_run(run.out).results["privacy"]["does_not_cover"]


@pytest.mark.broad
def test_noise_of_a_seed_is_said_to_protect_from_who_does_not_know_it(stopped):
    run, folder, show = stopped
    assert "who knows or guesses the run's seed" in read_run(folder).results["privacy"]["does_not_cover"]
    assert f"noise and draws come from --seed {run.seed}: for what is to be released add --privacy.secret" in show.notes


@pytest.mark.slow
def test_a_comparison_has_the_noise_of_its_epsilon(model, loaded, tmp_path):
    base = tiny_run(
        model, tmp_path / "compare", train=TrainOptions(rounds=2, local_steps=1, batch_size=4),
        privacy=PrivacyOptions(epsilon=5.0, delta=1e-2),
    )  # fmt: skip
    comparison = Compare(methods=("local", "plora", "plora+ft"), seeds=1, finetune_steps=1, base=base)
    compare(comparison, SilentProgress(), loaded)
    compare(comparison, SilentProgress(), loaded)  # it is read again
    record = read_comparison(tmp_path / "compare")
    spent = {run["method"]: run.get("epsilon") for run in record.runs}
    noise = read_config(record.folder_of(record.runs[1])).budget.noise
    assert spent == {"local": None, "plora": spent["plora+ft"], "plora+ft": pytest.approx(ask(noise, 2))}
    assert 4.98 < ask(noise, 2) <= 5
    lines = [json.loads(line) for line in (record.folder_of(record.runs[2]) / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["method"] == "local"
    assert lines[-1]["epsilon"] == spent["plora"]
    write_report([tmp_path / "compare"])
    assert "It does not concern local" in (tmp_path / "compare" / "report.md").read_text(encoding="utf-8")
