"""FedVLM's experiment (arXiv 2507.17088) as far as the paper tells it, and its small twin on what ships.

    python experiments/rlaif_v_noniid.py --path DIR --model florence-community/Florence-2-base
    python experiments/rlaif_v_noniid.py --twin        # the README's table: emoji, Florence2-nano, two cores

Settled by the paper: a frozen vision-language model, LoRA on every client, clients that are not iid, RLAIF-V, and the
method (plora: B averaged and sent back, A kept) against LoRA with FedAvg. Everything else in `shared_options` and
`Preset` is ours: the paper gives neither rank, alpha, targets, number of clients, rounds, rates, partition nor what
its accuracy is. The clients here are RLAIF-V's sources, and what is measured is how often a model finds the preferred
of two answers likelier (summed log-probabilities, and per token), besides metrics of generated answers.

SFT learns the preferred answer alone, DPO (arXiv 2305.18290) to prefer it. Both rates of every objective and method are
scaled by the factor that did best on validation, with a seed that the comparison does not use. Every objective's
comparison is a folder that `fedvlm report` reads; started again, it goes on where it stopped.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, Run, SystemOptions, TrainOptions
from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.evaluation.metrics.metric_labels import find_measure
from fedvlm_jax.evaluation.statistics.over_clients import summarise
from fedvlm_jax.evaluation.statistics.over_seeds import spread
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.reporting.tables import Table, to_markdown
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.run_dir.reader import ComparisonRecord, read_comparison, read_run
from fedvlm_jax.training.compare import compare, finish_run
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress import Progress
from fedvlm_jax.utils.progress_display import open_progress

RESULTS = Path(__file__).parent / "results"
METRICS = ("preference_accuracy", "preference_accuracy_per_token", "reward_margin", "exact_match", "token_f1")


@dataclass(frozen=True)
class Preset:
    """What may be chosen; the defaults are ours, the paper gives none of them."""

    path: Path | None = None
    """Folder of RLAIF-V's parquet shards; without it the Hugging Face hub is asked."""
    model: str = "florence-community/Florence-2-base"
    """A Florence-2 folder or hub id."""
    twin: bool = False
    """The shipped emoji set and Florence2-nano instead."""
    objectives: tuple[str, ...] = ("sft", "dpo")
    methods: tuple[str, ...] = ("local", "fedavg-lora", "plora")
    seeds: int = 3
    rate_factors: tuple[float, ...] = (1.0, 0.3, 0.1)
    """Times the learning rates of A and B, which are 5e-3 and 2e-3 in the twin and a fifth of it otherwise."""
    tune_seed: int = 100
    """Decides the clients and cohorts on whose validation split the factor is chosen."""
    rounds: int | None = None
    """16 in the twin, 40 otherwise."""
    max_answer_tokens: int = 128
    """Longest answer that is generated, where the data are RLAIF-V's."""
    beta: float = 0.1
    """DPO's usual value for RLAIF-V."""
    limit: int | None = None
    """Use so many rows of RLAIF-V only."""
    cache_gib: float = 200.0
    """Bound of the image features on disk: all of RLAIF-V takes about 148 GiB in float32 at base size."""
    out: Path | None = None
    """Folder of the comparisons (default: runs/rlaif-v-noniid, runs/rlaif-v-twin)."""

    @property
    def name(self) -> str:
        """Of the folder and of the results."""
        return "rlaif_v_twin" if self.twin else "rlaif_v_noniid"


def shared_options(preset: Preset) -> Run:
    """The run that all methods and objectives have in common."""
    lora = LoraOptions(rank=8, alpha=16.0)  # targets: all projections of the language model, the default
    preference = PreferenceOptions(beta=preset.beta)
    if preset.twin:
        data = make_options(prompt="client-language")
        train = TrainOptions(rounds=preset.rounds or 16, local_steps=4, batch_size=16)
        evaluation = EvaluationOptions(every=4, before_redistribution=False)
        return Run(data=data, train=train, lora=lora, preference=preference, evaluation=evaluation, checkpoint_every=16)
    data = make_options(source="rlaif-v", path=preset.path, limit=preset.limit, partition="natural", prompt="neutral")
    train = TrainOptions(
        rounds=preset.rounds or 40, local_steps=16, batch_size=8, learning_rate_a=1e-3, learning_rate_b=4e-4
    )
    evaluation = EvaluationOptions(
        every=10, max_answer_tokens=preset.max_answer_tokens, batch_size=8, before_redistribution=False
    )
    system = SystemOptions(compute="bfloat16", cache="disk", cache_gib=preset.cache_gib, remat=True)
    return Run(
        model=preset.model, data=data, train=train, lora=lora, preference=preference, evaluation=evaluation,
        system=system,
    )  # fmt: skip


def run(preset: Preset) -> dict[str, ComparisonRecord]:
    """Compare the methods under every objective; returns what was stored."""
    out = preset.out or Path("runs") / preset.name.replace("_", "-")
    records, model, show = {}, None, open_progress()
    for objective in preset.objectives:
        select = EvaluationOptions.select_by if preset.twin else "preference_accuracy"  # long answers never match
        base = shared_options(preset)
        evaluation = dataclasses.replace(base.evaluation, select_by=select)
        base = dataclasses.replace(base, objective=objective, evaluation=evaluation, out=out / objective)
        model = model or load_model(base, show.note)
        if not (out / objective / "comparison.json").is_file():
            settings = tune(preset, base, show, model)
            compare(Compare(preset.methods, preset.seeds, base=base), show, model, settings)
        records[objective] = read_comparison(out / objective)
    show.finish()
    return records


def tune(preset: Preset, base: Run, show: Progress, model: LoadedModel) -> dict[str, TrainOptions]:
    """Method -> its training options, with the rates that did best on validation; the test split stays shut."""
    assert base.out is not None
    evaluation = dataclasses.replace(base.evaluation, test=False)
    chosen = {}
    for method in preset.methods:
        scores: dict[float, float] = {}
        for factor in preset.rate_factors:
            out = base.out / "tuning" / f"{method}-{factor:g}"
            train = _scale(base.train, factor)
            one = dataclasses.replace(
                base, method=method, train=train, evaluation=evaluation, seed=preset.tune_seed, out=out
            )
            found = finish_run(one, show, model).scores("personal", split="validation")
            scores[factor] = sum(found.values()) / len(found)
        best = max(scores, key=lambda factor: scores[factor])  # the first of equals
        show.note(f"{base.objective} {method}: " + ", ".join(f"x{f:g} {s:.1%}" for f, s in scores.items()))
        chosen[method] = _scale(base.train, best)
    return chosen


def _scale(train: TrainOptions, factor: float) -> TrainOptions:
    return dataclasses.replace(
        train, learning_rate_a=factor * train.learning_rate_a, learning_rate_b=factor * train.learning_rate_b
    )


def tabulate(records: dict[str, ComparisonRecord]) -> Table:
    """A row per objective and method: every metric, mean over clients, then mean ± deviation over seeds."""
    rows = []
    first = next(iter(records.values()))
    rows.append(("–", "zero-shot", *(_write(first, "zero-shot", metric) for metric in METRICS)))
    for objective, record in records.items():
        for method in record.methods:
            rows.append((objective, method, *(_write(record, method, metric) for metric in METRICS)))
    columns = ("objective", "method", *(find_measure(metric).label for metric in METRICS))
    note = (
        f"Test, mean over clients ± standard deviation over {len(first.seeds)} seeds. Preference accuracy: how "
        "often the preferred of two answers is the likelier one; zero-shot is before training, the other rows after."
    )
    return Table("Preferences", columns, tuple(rows), note=note)


def _write(record: ComparisonRecord, method: str, metric: str) -> str:
    by_seed = record.scores(method, metric)
    if not by_seed:
        return "–"
    measure, found = find_measure(metric), spread([summarise(one).mean for one in by_seed.values()])
    written = measure.write(found.mean)
    if found.std is None or method == "zero-shot":
        return written
    return f"{100 * found.mean:.1f} ± {100 * found.std:.1f} %" if measure.share else f"{written} ± {found.std:.3f}"


def _read_rates(record: ComparisonRecord) -> dict[str, tuple[float, float]]:
    train = {run["method"]: read_run(record.folder_of(run)).options["train"] for run in record.runs}
    return {method: (options["learning_rate_a"], options["learning_rate_b"]) for method, options in train.items()}


def main() -> None:
    """Run, and write the table."""
    preset = tyro.cli(Preset, description=__doc__)
    records = run(preset)
    table = tabulate(records)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{preset.name}.md").write_text(to_markdown(table) + "\n", encoding="utf-8")
    content = {
        "command": "python experiments/rlaif_v_noniid.py" + (" --twin" if preset.twin else ""),
        "seeds": next(iter(records.values())).seeds,
        "settings": {objective: record.settings for objective, record in records.items()},
        "rates": {objective: _read_rates(record) for objective, record in records.items()},
        "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
        **describe_environment(),
    }
    write_json(RESULTS / f"{preset.name}.json", content)
    print(json.dumps(content["rows"], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
