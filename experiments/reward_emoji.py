"""Does PFIT raise its reward on held-out questions over zero-shot and over SFT, and how far from the base does it go?

    python experiments/reward_emoji.py            # runs what is missing, then reports; goes on where it was stopped
    python experiments/reward_emoji.py --quick    # a smoke run, reported below --out

Four clients of the emoji set, questions in the client's language, Florence2-nano. The reward is token F1 mixed with
brevity, by a weight of each client's own. Both arms share and pull alike (`--method pfit`, the last layers) and take
the same steps on the same rows; one minimises cross-entropy of the gold answers, the other follows the reward. Each
arm's learning rates are those of four pairs with the highest reward on validation, with a seed that is not among the
study's; the best round is chosen on validation by the reward, or by exact match for SFT, which knows no reward. What
is reported is of the test split: rewards of greedy answers, and the KL of the model to the frozen base over answers
that it draws.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import study_summary
import tyro

from fedvlm_jax.config.run_options import EvaluationOptions, PreferenceOptions, Run, TrainOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.evaluation.statistics.over_seeds import BySeed, compare_paired, count_seeds_ahead, spread
from fedvlm_jax.reporting.tables import Table, format_paired, to_markdown

RESULTS = Path(__file__).parent / "results"
ARMS = {"sft": "sft", "pfit": "reward"}
"""Arm -> its objective."""
GRID = ((5e-3, 2e-3), (2e-2, 8e-3), (8e-2, 3.2e-2), (0.32, 0.128))
"""Learning rates of A and B."""
REWARD = PreferenceOptions(rewards=("token-f1", "brevity"), mix=(0.3, 0.7), beta=0.03, samples=6)
TUNING_SEED = 100
SHARES = ("reward", "token_f1", "exact_match")
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Options:
    """What is run"""

    out: Path = Path("runs/reward-emoji")
    """Folder of what is measured: a line per finished run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 12
    local_steps: int = 4
    quick: bool = False
    """A smoke run: one round, two seeds, one pair of rates."""

    @property
    def grid(self) -> tuple[tuple[float, float], ...]:
        """The pairs of rates that are tried."""
        return GRID[:1] if self.quick else GRID


def make_run(options: Options, arm: str, rates: tuple[float, float], seed: int) -> Run:
    """One run of an arm."""
    data = emoji.Options(
        prompt="client-language", vendors=("noto", "fluent"), languages=("en", "de"), images_per_client=40,
        validation_per_client=20, test_per_client=40,
    )  # fmt: skip
    train = TrainOptions(
        rounds=options.rounds, local_steps=options.local_steps, batch_size=8, learning_rate_a=rates[0],
        learning_rate_b=rates[1],
    )  # fmt: skip
    evaluation = EvaluationOptions(
        every=max(1, options.rounds // 3), metrics=("exact_match", "token_f1"), examples=0, global_model=False,
        before_redistribution=False, test=False,
    )  # fmt: skip
    return Run(
        method="pfit", objective=ARMS[arm], preference=REWARD if arm == "pfit" else PreferenceOptions(), seed=seed,
        data=data, train=train, evaluation=evaluation, out=options.out / "scratch", checkpoint_every=options.rounds,
    )  # fmt: skip


@functools.cache
def make_measure(vlm: Any) -> Any:
    """Make (params, adapters, batch [V, B, …]) -> the KL to the base of answers that are drawn to each example."""
    import jax

    from fedvlm_jax.data.batches import LABELS
    from fedvlm_jax.objectives.answer_rewards import cut_at_end
    from fedvlm_jax.objectives.reward import measure_kl

    @jax.jit
    def measure(params: Any, adapters: Any, batch: Any) -> Any:
        def one(adapter: Any, batch: Any) -> Any:
            keys = jax.random.split(jax.random.key(0), len(batch["labels"]))
            drawn = vlm.generate(params, adapter, batch, batch["labels"].shape[-1], samples=REWARD.samples, keys=keys)
            answers = cut_at_end(drawn, vlm.settings().eos_token_ids)
            asked = {name: value for name, value in batch.items() if name not in LABELS} | {"labels": answers}
            logits, base = (vlm.logits(params, each, asked) for each in (adapter, None))
            return measure_kl(logits, base, answers).mean(axis=-1)

        return jax.vmap(one)(adapters, batch)

    return measure


def score(run: Run, model: Any, split: Split) -> dict[str, dict[str, dict[str, float]]]:
    """Score the stored adapters of a run and the bare base: model -> metric -> client -> value."""
    import numpy as np

    from fedvlm_jax.run_dir.artifacts import open_adapters
    from fedvlm_jax.training.experiment import open_experiment

    assert run.out is not None
    experiment = open_experiment(dataclasses.replace(run, objective="reward", preference=REWARD), model)
    clients = experiment.examples.clients
    personal = open_adapters(run.out / "adapters", [client.name for client in clients])
    scored = experiment.evaluator(model.params, {"zero_shot": None, "personal": personal}, split, experiment.scored)
    found = {name: {metric: one.scores[metric] for metric in SHARES} for name, one in scored.items()}

    rows = {number: clients[number].rows_of(split) for number in experiment.scored}
    parts = experiment.evaluator.visit(make_measure(model.vlm), model.params, {"personal": personal}, rows)["personal"]
    found["personal"]["kl"] = {clients[n].name: float(np.concatenate(kl).mean()) for n, kl in parts.items()}
    return found


def measure_missing(options: Options) -> None:
    """Tune both arms, then run all seeds; what has a line is not run again."""
    from fedvlm_jax.run_dir.reader import read_metrics
    from fedvlm_jax.training import federated_run
    from fedvlm_jax.training.loaded_model import load_model
    from fedvlm_jax.utils.progress import SilentProgress

    model = None
    for arm in ARMS:
        plan = [(TUNING_SEED, rates) for rates in options.grid] + [(seed, None) for seed in options.seeds]
        for seed, rates in plan:
            lines = [line for line in read_lines(options) if line["arm"] == arm]
            pair = rates or choose_rates(lines)
            if any(line["seed"] == seed and tuple(line["rates"]) == pair for line in lines):
                continue
            run = make_run(options, arm, pair, seed)
            assert run.out is not None
            shutil.rmtree(run.out, ignore_errors=True)
            model = model or load_model(run)
            began = time.monotonic()
            federated_run.train(run, SilentProgress(), model)
            told = [{k: line[k] for k in ("loss", "reward", "kl") if k in line} for line in read_metrics(run.out)]
            split: Split = "validation" if rates else "test"
            scores = score(run, model, split)
            line = {
                "arm": arm, "seed": seed, "rates": pair, "split": split, "scores": scores, "rounds": told,
                "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
            with (options.out / "lines.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            means = {name: f"{average(values):.3f}" for name, values in scores["personal"].items()}
            print(f"{arm} seed {seed} rates {pair} {split}: {means}", flush=True)


def average(by_client: Mapping[str, float]) -> float:
    """The mean over clients."""
    return sum(by_client.values()) / len(by_client)


def choose_rates(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """The pair with the highest reward on validation."""
    tuned = [line for line in lines if line["split"] == "validation"]
    best = max(tuned, key=lambda line: average(line["scores"]["personal"]["reward"]))
    return tuple(best["rates"])


def list_tested(lines: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """An arm's runs on test at the rates that were chosen; a grid that grew may have chosen others before."""
    own = [line for line in lines if line["arm"] == arm]
    rates = choose_rates(own)
    return [line for line in own if line["split"] == "test" and tuple(line["rates"]) == rates]


def read_lines(options: Options) -> list[dict[str, Any]]:
    """The finished runs."""
    return study_summary.read_lines(options.out / "lines.jsonl")


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Model -> its metrics over seeds, on test, and PFIT's reward minus each of the others', paired."""
    tested = [line for arm in ARMS for line in list_tested(lines, arm)]
    rewards: dict[str, BySeed] = {}
    found: dict[str, Any] = {}
    for name, arm, key in (
        ("zero-shot", "pfit", "zero_shot"),
        ("sft", "sft", "personal"),
        ("pfit", "pfit", "personal"),
    ):
        own = [line for line in tested if line["arm"] == arm]
        means = {
            metric: [average(line["scores"][key][metric]) for line in own if metric in line["scores"][key]]
            for metric in (*SHARES, "kl")
        }
        found[name] = {metric: vars(spread(values)) | {"by_seed": values} for metric, values in means.items() if values}
        found[name]["rates"] = own[0]["rates"] if own and key == "personal" else None
        rewards[name] = {line["seed"]: line["scores"][key]["reward"] for line in own}
    for name in ("zero-shot", "sft"):
        difference = compare_paired(rewards["pfit"], rewards[name])
        found[name]["pfit_ahead"] = None if difference is None else vars(difference)
        found[name]["seeds_in_which_pfit_is_ahead"] = count_seeds_ahead(rewards["pfit"], rewards[name])
    return found


def tabulate(found: dict[str, Any]) -> Table:
    """A row per model."""
    from fedvlm_jax.evaluation.statistics.over_seeds import Difference

    def write(one: dict[str, Any], metric: str) -> str:
        if metric not in one:
            return "0" if metric == "kl" else "–"
        error = "" if one[metric]["std"] is None else f" ± {one[metric]['std']:.3f}"
        return f"{one[metric]['mean']:.3f}{error}"

    rows = [
        (
            name,
            *(write(one, metric) for metric in (*SHARES, "kl")),
            format_paired(Difference(**one["pfit_ahead"])) if one.get("pfit_ahead") else "–",
            " / ".join(f"{rate:g}" for rate in one["rates"]) if one["rates"] else "–",
        )
        for name, one in found.items()
    ]
    columns = (
        "model",
        "reward",
        "token F1",
        "exact match",
        "KL to the base, nats",
        "pfit's reward minus this one's",
        "A / B",
    )
    return Table("Reward on held-out questions", columns, tuple(rows))


def report(options: Options) -> None:
    """Write JSON and table, and print the table."""
    lines = read_lines(options)
    found = summarise(lines)
    folder = options.out / "results" if options.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    command = "python experiments/reward_emoji.py" + (" --quick" if options.quick else "")
    content = {"command": command, "seeds": options.seeds, "reward": vars(REWARD), "models": found, "lines": lines}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / "reward_emoji.json").write_text(text, encoding="utf-8")
    mixes = " and ".join(map(str, REWARD.mix))
    note = (
        f"Test split, mean over four clients ± standard deviation over {len(options.seeds)} seeds. The reward is token "
        f"F1 and brevity, mixed by {mixes} for clients in turn, of greedy answers; beta is {REWARD.beta}. Differences: "
        "percentage points on the same clients and seeds, with a 95 % t-interval over seeds. A / B: the learning rates "
        f"with the highest reward on validation, with another seed. Made by `{command}`."
    )
    table = f"{to_markdown(tabulate(found))}\n\n{note}\n"
    (folder / "reward_emoji.md").write_text(table, encoding="utf-8")
    print(table)


def main() -> None:
    """Run what is missing, and report."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, seeds=options.seeds[:2], rounds=1)
    options.out.mkdir(parents=True, exist_ok=True)
    measure_missing(options)
    report(options)


if __name__ == "__main__":
    main()
