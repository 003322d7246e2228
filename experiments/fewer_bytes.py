"""Accuracy against uploaded bytes: pLoRA, FFA-LoRA and Fed-SB, sent whole, as int8, and as their largest entries.

    python experiments/fewer_bytes.py            # tunes, runs what is missing, reports; goes on where it was stopped
    python experiments/fewer_bytes.py report     # the table and the picture of what there is
    python experiments/fewer_bytes.py --quick    # a smoke run, reported below --out

The cell `lang-20` of `methods_emoji.py`: 16 emoji clients, the question in the client's language, 20 images each,
twelve rounds of four steps. Every method with every way of sending has its learning rates of A and B chosen on
validation, from the grid of that study and with its seed, which is not used again; then come five seeds, and test is
scored once, after the last round. Training alone, which sends nothing, is beside them. Bytes are those of what was
encoded, as a round's line has them, over all rounds of a client.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import methods_emoji
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from methods_emoji import RESULTS, TUNE_SEED, Rates
from study_summary import format_mean, read_lines, summarise_scores

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.evaluation.statistics.over_seeds import Difference
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.reporting.figures import theme
from fedvlm_jax.reporting.tables import Table, format_bytes, format_paired, to_markdown

CELL = "lang-20"
METHODS = ("local", "plora", "ffa-lora", "fed-sb")
WAYS = {
    "float32": MessageOptions(),
    "int8": MessageOptions(compress="int8"),
    "top-k 0.1": MessageOptions(compress="top-k", keep=0.1),
    "top-k 0.01": MessageOptions(compress="top-k", keep=0.01),
}
WHOLE, ALONE = "float32", "local"
Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is run"""

    stage: tyro.conf.Positional[Literal["run", "report"]] = "run"
    out: Path = Path("runs/fewer-bytes")
    """Folder of what is measured: a line per finished run."""
    results: Path | None = None
    """Where the report goes (default: experiments/results; with --quick, into --out)."""
    seeds: int = 5
    """How many seeds, from 0."""
    quick: bool = False
    """A smoke run: four clients, two rounds, two seeds, two points of the grid."""

    @property
    def study(self) -> methods_emoji.Study:
        """The settings of the study that this one belongs to."""
        study = methods_emoji.Study("run", out=self.out)
        return dataclasses.replace(study, **methods_emoji.QUICK) if self.quick else study

    @property
    def grid(self) -> tuple[Rates, ...]:
        """Learning rates of A and B to choose from."""
        return self.study.grid

    @property
    def report_folder(self) -> Path:
        """Where the report goes."""
        return self.results or (self.out / "results" if self.quick else RESULTS)


def list_arms() -> Iterator[tuple[str, str]]:
    """List what is compared: a method and how it sends; training alone has nothing to send."""
    for method in METHODS:
        for way in WAYS if method != ALONE else (WHOLE,):
            yield method, way


def make_run(options: Options, method: str, way: str, seed: int, rates: Rates, *, test: bool) -> Run:
    """One run; while learning rates are chosen it leaves the test split alone."""
    study = options.study
    run = study.make_run("run" if test else "tune", study.plan()[CELL], method, seed, rates)
    return dataclasses.replace(run, messages=WAYS[way], out=options.out / "scratch")


class Bench:
    """Runs what has no line yet, and writes the line."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, None
        self.began, self.count = time.monotonic(), 0

    def score(self, stage: Literal["tune", "run"], method: str, way: str, seed: int, rates: Rates) -> Json:
        """The line of a run, from the log or from running it; a run that was stopped begins anew."""
        key = {"stage": stage, "method": method, "way": way, "seed": seed, "rates": list(rates)}
        for line in read_all(self.options):
            if all(line[name] == value for name, value in key.items()):
                return line
        from fedvlm_jax.run_dir.artifacts import describe_environment
        from fedvlm_jax.run_dir.reader import read_run
        from fedvlm_jax.training import federated_run
        from fedvlm_jax.training.loaded_model import load_model
        from fedvlm_jax.utils.progress import SilentProgress

        run = make_run(self.options, method, way, seed, rates, test=stage == "run")
        assert run.out is not None
        shutil.rmtree(run.out, ignore_errors=True)
        self.model = self.model or load_model(run)
        start = time.monotonic()
        record = read_run(federated_run.train(run, SilentProgress(), self.model))
        validation = record.scores("personal", split="validation")
        errors = [line["compression_error"] for line in record.rounds if "compression_error" in line]
        line = key | {
            "validation": sum(validation.values()) / len(validation),
            "test": record.scores("personal") if stage == "run" else None,
            "zero_shot": record.scores("zero_shot") if stage == "run" else None,
            "bytes_up": sum(line["bytes_up_per_client"] for line in record.rounds),
            "rounds": len(record.rounds),
            "compression_error": sum(errors) / len(errors) if errors else None,
            "seconds": round(time.monotonic() - start, 1),
            "commit": describe_environment()["commit"],
        }
        with (self.options.out / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.count += 1
        passed, which = (time.monotonic() - self.began) / 60, f"{stage} {method} {way} seed {seed} rates {rates}"
        print(f"[{passed:6.1f} min, {self.count} runs] {which}: validation {line['validation']:.1%}", flush=True)
        return line

    def run(self) -> None:
        """All methods and ways: choose the rates, then run the seeds with them."""
        for method, way in list_arms():
            points = [self.score("tune", method, way, TUNE_SEED, rates) for rates in self.options.grid]
            best = max(points, key=lambda line: line["validation"])  # the first of equals
            for seed in range(self.options.seeds):
                self.score("run", method, way, seed, tuple(best["rates"]))
            if self.model is not None:
                self.model.drop_programs()  # they would fill the memory


def read_all(options: Options) -> list[Json]:
    """The finished runs."""
    return read_lines(options.out / "lines.jsonl")


def summarise(lines: Sequence[Json]) -> list[Json]:
    """Summarise each method and way that has runs: scores on test, bytes, and the difference from sending it whole."""
    by_arm: dict[tuple[str, str], list[Json]] = {}
    for line in lines:
        if line["stage"] == "run":
            by_arm.setdefault((line["method"], line["way"]), []).append(line)
    scores = {arm: {line["seed"]: line["test"] for line in mine} for arm, mine in by_arm.items()}
    zero = {line["seed"]: line["zero_shot"] for line in lines if line["stage"] == "run"}
    found = []
    for arm in list_arms():
        if arm not in by_arm:
            continue
        method, way = arm
        rivals = {name: scores[other] for name, other in {"whole": (method, WHOLE), ALONE: (ALONE, WHOLE)}.items()
                  if other in scores and other != arm}  # fmt: skip
        mine = by_arm[arm]
        errors = [line["compression_error"] for line in mine if line["compression_error"] is not None]
        found.append(
            summarise_scores(scores[arm], rivals | ({"zero-shot": zero} if zero else {}))
            | {
                "method": method, "way": way, "seeds": sorted(scores[arm]), "rates": mine[0]["rates"],
                "bytes_up": float(np.mean([line["bytes_up"] for line in mine])), "rounds": mine[0]["rounds"],
                "compression_error": float(np.mean(errors)) if errors else None,
            }
        )  # fmt: skip
    return found


def tabulate(arms: Sequence[Json]) -> Table:
    """A row per method and way."""
    rows = []
    for one in arms:
        differences = [one["against"].get(rival) for rival in ("whole", ALONE, "zero-shot")]
        error = one["compression_error"]
        rows.append(
            (
                one["method"],
                one["way"] if one["method"] != ALONE else "nothing",
                format_bytes(one["bytes_up"] / one["rounds"]),
                format_bytes(one["bytes_up"]),
                "–" if error is None else f"{100 * error:.2g} %",
                format_mean(one),
                *("–" if each is None else format_paired(Difference(**each)) for each in differences),
                " / ".join(f"{rate:g}" for rate in one["rates"]),
            )
        )
    columns = (
        "method", "sent as", "a round", "all rounds", "error", "test", "against whole", "against local",
        "against zero-shot", "A / B",
    )  # fmt: skip
    return Table("Accuracy against uploaded bytes", columns, tuple(rows), frozenset())


@theme.style()
def draw(arms: Sequence[Json]) -> Figure:
    """Draw test accuracy over uploaded bytes, a line per method from its smallest message to the whole."""
    figure, (ax,) = theme.make_figure(theme.WIDE, 4.2)
    series = theme.choose_series([method for method in METHODS if any(one["method"] == method for one in arms)])
    names: list[theme.Name] = []
    for method, number in series.items():
        mine = sorted((one for one in arms if one["method"] == method), key=lambda one: one["bytes_up"])
        colour, means = theme.SERIES[number], [100 * one["mean"] for one in mine]
        if method == ALONE:
            ax.axhline(means[0], color=colour, linewidth=1.2, linestyle=theme.LEVEL)
            theme.annotate(ax, (0, means[0]), "local, which sends nothing", ax.get_yaxis_transform(), (3, 3), "left",
                           color=colour, fontsize=9)  # fmt: skip
            continue
        sent = [one["bytes_up"] for one in mine]
        ends = [[100 * abs(one["mean"] - one[end]) for one in mine] for end in ("low", "high")]
        ends = np.where(np.isfinite(ends), ends, 0)  # no interval of one seed
        ax.errorbar(sent, means, yerr=ends, color=colour, marker=theme.MARKERS[number], markersize=5, linewidth=1.4,
                    elinewidth=1, capsize=2)  # fmt: skip
        for one, x, y in zip(mine, sent, means, strict=True):
            text = f"{method}, {one['way']}" if one is mine[-1] else one["way"]
            names.append(theme.Name(text, x, y, one is mine[-1]))
    sending = [one["bytes_up"] for one in arms if one["bytes_up"]]
    ax.set_xscale("log")
    if sending:
        low, high = min(sending), max(sending)
        ax.set_xlim(low / 1.6, high * 1.6)
        ticks = [2.0**power for power in range(6, 30, 2) if low / 1.6 <= 2**power <= high * 1.6]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x)))
    ax.grid(axis="y")
    ax.set_xlabel("uploaded by a client in all rounds (log scale)")
    ax.set_title("Test exact match, %, mean over clients and seeds; bars: 95 % over seeds")
    theme.name_beside(figure, [(ax, names)], 8)
    return figure


def report(options: Options) -> None:
    """Write JSON, table and picture, and print the table."""
    lines = read_all(options)
    arms = summarise(lines)
    if not arms:
        raise SystemExit(f"{options.out} has no finished run yet")
    folder = options.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    command = "python experiments/fewer_bytes.py" + (" --quick" if options.quick else "")
    content = {
        "command": command, "cell": CELL, "arms": arms,
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "tuning": [line for line in lines if line["stage"] == "tune"],
    }  # fmt: skip
    (folder / "fewer_bytes.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    note = (
        f"Exact match on test, mean over clients ± standard deviation over {max(len(one['seeds']) for one in arms)} "
        "seeds. Differences: percentage points on the same clients and seeds, with a 95 % t-interval over seeds; ▲ "
        "ahead, ▼ behind, ≈ the interval holds zero; *whole* is the same method in float32. Bytes: sent by a client. "
        "Error: ‖sent − meant‖ / ‖meant‖ of a message, where top-k means what it owes as well; the mean over clients "
        f"and rounds. Learning rates of A and B: of {len(options.grid)} pairs the best on validation, for each method "
        f"and way of sending, with another seed. Made by `{command}`."
    )
    text = f"{to_markdown(tabulate(arms))}\n\n{note}\n"
    (folder / "fewer_bytes.md").write_text(text, encoding="utf-8")
    theme.save_png(draw(arms), folder / "fewer_bytes.png")
    print(text)


def main() -> None:
    """Run what is missing, and report."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, seeds=min(options.seeds, 2))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage == "run":
        import jax

        jax.config.update("jax_compilation_cache_dir", os.fspath(options.out.resolve() / "compiled"))
        Bench(options).run()
        shutil.rmtree(options.out / "scratch", ignore_errors=True)
    report(options)


if __name__ == "__main__":
    main()
