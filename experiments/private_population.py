"""What client-level differential privacy costs a federation of thousands: methods by epsilon, one table.

    python experiments/private_population.py            # runs what is missing, then reports; goes on if it was stopped
    python experiments/private_population.py --quick    # a smoke run, reported below --out

4,000 clients of the emoji set, each drawn into a round with the chance that makes 256 of them on average, and the noise
that spends epsilon (delta 1e-5) over all rounds; the clipping norm follows the median of the clients' norms, privately.
All are asked in English and answer in German, which the base does not guess: what there is to learn is the same for
all, so that sharing can be worth something, and noise can be seen to cost it. Learning rates are the defaults of
`fedvlm train` for every epsilon, of Fed-SB fifty times these: nothing is tuned for noise, so the numbers are no best
case of private training. The last round is taken. A bound on epsilon covers what is shared alone: factors that stay
with their client are not in it.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study_summary
import tyro
from matplotlib.figure import Figure
from study_emoji import RESULTS

from fedvlm_jax.config.run_options import EvaluationOptions, Run, TrainOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.evaluation.statistics.over_seeds import spread
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, to_markdown

RATES = (5e-3, 2e-3)
"""Learning rates of A and B: the defaults of `fedvlm train`."""
SCALES = {"fed-sb": 50.0}
"""What a method's rates are multiplied by. Fed-SB trains a matrix of 8 × 8 a layer, which hardly moves at the others'
rates: without noise its loss went from 1.94 to 1.88 in twelve rounds. With ten times as much it came to 0.96 and 21.2 %
on validation, with fifty times to 0.54 and 34.8 % (`--methods fed-sb --epsilons 0 --scale 50`)."""
CLIPS = {"fed-sb": 10.0}
"""The clipping norm of the first round, after which it follows the median. The others' updates have a norm of 0.7 at
first, Fed-SB's at its rates of 7; from the default, 1, it would take most of the rounds to get there."""
TOLD = ("spent", "noise", "clip", "noise_to_update", "shared_norm", "bytes_up")
"""What the last round told, of the first seed."""
NOISELESS = 0.0
"""No noise: epsilon is infinite."""


@dataclass(frozen=True)
class Options:
    """What is run"""

    out: Path = Path("runs/private-population")
    """Folder of the runs, and of a line per finished one."""
    results: Path | None = None
    """Where the report goes (default: experiments/results; with --quick, into --out)."""
    methods: tuple[str, ...] = ("plora", "ffa-lora", "fedsa-lora", "fed-sb", "local")
    epsilons: tuple[float, ...] = (NOISELESS, 8.0, 3.0, 1.0, 0.1)
    """Epsilons that all rounds spend; 0 for no noise. The last is there to see noise that spoils everything."""
    seeds: tuple[int, ...] = (0,)
    clients: int = 4000
    cohort: int = 256
    rounds: int = 12
    local_steps: int = 2
    batch_size: int = 8
    images: int = 20
    scale: float | None = None
    """Multiplies the default learning rates (default: 50 for Fed-SB, 1 for the others)."""
    clip: float | None = None
    """The clipping norm of the first round (default: 10 for Fed-SB, 1 for the others)."""
    scored: int = 64
    """Clients whose models are evaluated, drawn by the seed."""
    model: str = "florence2-nano"
    quick: bool = False
    """A smoke run: 24 clients, two rounds."""

    @property
    def place(self) -> Path:
        """Where the report goes."""
        return self.results or (self.out if self.quick else RESULTS)


SMALL: dict[str, Any] = {"clients": 24, "cohort": 8, "rounds": 2, "images": 6, "scored": 4, "epsilons": (0.0, 8.0)}


def make_run(options: Options, method: str, epsilon: float, seed: int) -> Run:
    """One run; who trains alone does so in the rounds that it would be drawn into."""
    rate_a, rate_b = find_rates(options, method)
    train = TrainOptions(
        rounds=options.rounds, local_steps=options.local_steps, batch_size=options.batch_size, learning_rate_a=rate_a,
        learning_rate_b=rate_b,
    )  # fmt: skip
    data = emoji.Options(
        partition=emoji.Topics(clients=options.clients), languages=("de",), prompt="neutral",
        images_per_client=options.images, validation_per_client=6, test_per_client=12,
    )  # fmt: skip
    evaluation = EvaluationOptions(
        every=train.rounds, clients=options.scored, before_redistribution=False, metrics=("exact_match",), examples=0
    )
    clip = find_clip(options, method, epsilon)
    privacy = PrivacyOptions() if clip is None else PrivacyOptions(epsilon=epsilon, quantile=0.5, clip=clip)
    out = options.out / f"{method}-{epsilon:g}-{seed}-rate{rate_b:g}-clip{clip or 0:g}"
    return Run(
        method=method, model=options.model, seed=seed, cohort=options.cohort, data=data, train=train,
        evaluation=evaluation, privacy=privacy, out=out, checkpoint_every=5,
    )  # fmt: skip


def find_rates(options: Options, method: str) -> tuple[float, float]:
    """Return the learning rates of A and B of a method."""
    scale = SCALES.get(method, 1.0) if options.scale is None else options.scale
    return RATES[0] * scale, RATES[1] * scale


def find_clip(options: Options, method: str, epsilon: float) -> float | None:
    """Return the clipping norm of the first round; None without noise."""
    return (options.clip or CLIPS.get(method, PrivacyOptions.clip)) if epsilon else None


def list_missing(options: Options) -> Iterator[tuple[str, float, int]]:
    """Runs without a line, those of the first seed first."""
    there = {(line["method"], line["epsilon"], line["seed"]) for line in read_lines(options)}
    for seed in options.seeds:
        for method in options.methods:
            for epsilon in (NOISELESS,) if method == "local" else options.epsilons:
                if (method, epsilon, seed) not in there:
                    yield method, epsilon, seed


def read_lines(options: Options) -> list[dict[str, Any]]:
    """The finished runs at the learning rates and first clipping norms of the options."""

    def fits(line: dict[str, Any]) -> bool:
        set_up = [*find_rates(options, line["method"])], find_clip(options, line["method"], line["epsilon"])
        return (line["rates"], line["first_clip"]) == set_up

    return [line for line in study_summary.read_lines(options.out / "lines.jsonl") if fits(line)]


def run_missing(options: Options) -> None:
    """Run what has no line yet; a run that was stopped goes on. A finished run's states (gigabytes) are let go of."""
    from fedvlm_jax.run_dir.reader import read_metrics, read_run
    from fedvlm_jax.training import federated_run
    from fedvlm_jax.training.loaded_model import load_model
    from fedvlm_jax.utils.progress import SilentProgress

    model = None
    for method, epsilon, seed in list(list_missing(options)):
        run = make_run(options, method, epsilon, seed)
        assert run.out is not None
        model = model or load_model(run)
        began = time.monotonic()
        begun = (run.out / "config.json").exists()
        show = SilentProgress()
        folder = federated_run.resume(run.out, show, model) if begun else federated_run.train(run, show, model)
        record = read_run(folder)
        rounds = [line for line in read_metrics(folder) if line["method"] == method]
        line = {
            "method": method, "epsilon": epsilon, "seed": seed, "rates": find_rates(options, method),
            "first_clip": find_clip(options, method, epsilon),
            "scores": record.scores("personal", split="test"), "zero_shot": record.scores("zero_shot", split="test"),
            "spent": rounds[-1].get("epsilon"), "noise": rounds[-1].get("noise"), "clip": rounds[-1].get("clip"),
            "noise_to_update": rounds[-1].get("noise_to_update"), "shared_norm": rounds[-1].get("shared_norm"),
            "bytes_up": rounds[-1]["bytes_up_per_client"],
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        with (options.out / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for name in ("checkpoints", "adapters"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for file in folder.glob("states-*.bin"):
            file.unlink()
        print(f"{method} epsilon {epsilon or 'inf'} seed {seed}: {_mean(line['scores']):.1%}", flush=True)


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> epsilon, as text -> mean and spread over seeds, and what the last round told."""
    found: dict[str, dict[str, Any]] = {}
    for method, epsilon in dict.fromkeys((line["method"], line["epsilon"]) for line in lines):
        own = [line for line in lines if (line["method"], line["epsilon"]) == (method, epsilon)]
        means = [_mean(line["scores"]) for line in own]
        told = {name: own[0][name] for name in TOLD}
        cell = {**vars(spread(means)), "by_seed": means, **told, "zero_shot": _mean(own[0]["zero_shot"])}
        found.setdefault(method, {})[f"{epsilon:g}"] = cell
    return found


def tabulate(found: Mapping[str, Mapping[str, Any]], epsilons: Sequence[float]) -> Table:
    """A row per method, a column per epsilon, from no noise to the most."""
    columns = ["method", *map(_name_epsilon, epsilons), "sent, KiB"]
    rows = []
    for method, cells in found.items():
        sent = next(iter(cells.values()))["bytes_up"] / 1024
        rows.append((method, *(_format(cells.get(f"{e:g}")) for e in epsilons), f"{sent:.0f}"))
    return Table("Thousands of clients, by epsilon", tuple(columns), tuple(rows))


def tabulate_norms(found: Mapping[str, Mapping[str, Any]], epsilons: Sequence[float]) -> Table:
    """A row per method that shares, a column per epsilon: the norm of what is shared at the end, noise included."""
    rows = []
    for method, cells in found.items():
        norms = [cells[f"{e:g}"]["shared_norm"] if f"{e:g}" in cells else None for e in epsilons]
        if any(norms):
            rows.append((method, *("–" if norm is None else f"{norm:.2f}" for norm in norms)))
    title = "Norm of what was learnt and shared, with the noise of all rounds"
    return Table(title, ("method", *map(_name_epsilon, epsilons)), tuple(rows))


def _name_epsilon(epsilon: float) -> str:
    return f"ε = {epsilon:g}" if epsilon else "no noise"


def _format(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    error = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    noise = cell["noise_to_update"]
    return f"{100 * cell['mean']:.1f}{error} %" + ("" if noise is None else f" (noise {noise:.1f})")


def draw(found: Mapping[str, Mapping[str, Any]], epsilons: Sequence[float]) -> Figure:
    """Draw exact match against epsilon, with the bare base and training alone as lines."""
    figure, axes = theme.make_figure(6.4, 4.0)
    ax, places = axes[0], range(len(epsilons))
    federated = [method for method in found if method != "local"]
    for number, method in enumerate(federated):
        cells = found[method]
        there = [(place, cells[f"{e:g}"]) for place, e in zip(places, epsilons, strict=True) if f"{e:g}" in cells]
        errors = [100 * (cell["std"] or 0) for _, cell in there]
        ax.errorbar(
            [place for place, _ in there], [100 * cell["mean"] for _, cell in there], yerr=errors, label=method,
            color=theme.SERIES[number], marker=theme.MARKERS[number], markersize=5, capsize=2, linewidth=1.4,
        )  # fmt: skip
    any_cell = next(iter(next(iter(found.values())).values()))
    lines = {"zero-shot": any_cell["zero_shot"]}
    if "local" in found:
        lines["training alone"] = found["local"]["0"]["mean"]
    for style, (name, value) in zip(("--", ":"), lines.items(), strict=False):
        ax.axhline(100 * value, color=theme.MUTED, linewidth=1, linestyle=style, label=name)
    ax.set_xticks(list(places), ["no noise" if not e else f"{e:g}" for e in epsilons])
    ax.set_xlabel("ε that all rounds spend")
    ax.set_ylabel("exact match on test, %")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def report(options: Options) -> None:
    """Write JSON, table and picture, and print the table."""
    lines = read_lines(options)
    found = summarise(lines)
    place = options.place
    place.mkdir(parents=True, exist_ok=True)
    command = "python experiments/private_population.py" + " --quick" * options.quick
    content = {
        "command": command, "clients": options.clients, "cohort": options.cohort, "rounds": options.rounds,
        "methods": found, "lines": lines,
    }  # fmt: skip
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (place / "private_population.json").write_text(text, encoding="utf-8")
    seeds = sorted({line["seed"] for line in lines})
    note = (
        f"Exact match on test of {options.scored} of {options.clients:,} clients after {options.rounds} rounds of "
        f"{options.cohort} on average; {_describe_seeds(seeds)}; in "
        "brackets how large the last round's noise is, as a multiple of the mean update. Delta is 1e-5. "
        f"Made by `{command}`."
    )
    tables = [to_markdown(make(found, options.epsilons)) for make in (tabulate, tabulate_norms)]
    table = "\n\n".join(tables)
    (place / "private_population.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    theme.save_png(draw(found, options.epsilons), place / "private_population.png")
    print(f"{table}\n\n{note}")


def _describe_seeds(seeds: Sequence[int]) -> str:
    return "one seed" if len(seeds) == 1 else f"± the standard deviation over {len(seeds)} seeds"


def main() -> None:
    """Run what is missing, and report."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, **SMALL)
    options.out.mkdir(parents=True, exist_ok=True)
    run_missing(options)
    report(options)


if __name__ == "__main__":
    main()
