"""Should a client keep its optimiser's state between its rounds, or start afresh? Decided on validation.

    python experiments/optimizer_state.py            # runs what is missing, then reports; goes on where it was stopped
    python experiments/optimizer_state.py --quick    # a smoke run, reported below --out

The cell of `study_emoji.py` with the question in the client's language and 20 images per client; methods that average
(fedavg-lora), that keep A (plora) and that train a second adapter (ditto), each with AdamW's state kept and fresh.
Learning rates are those that the study chose on validation, with a seed that is not used here, while states were kept;
ditto, which it did not tune, has the defaults. Validation is scored once, after the last round; test is never read.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import study_summary
import tyro
from study_emoji import QUICK, RESULTS, Study

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.evaluation.statistics.over_seeds import BySeed, compare_paired, count_seeds_ahead, spread
from fedvlm_jax.reporting.tables import Table, format_paired, to_markdown

CELL = "client-language-20"
RATES = {"fedavg-lora": (2e-3, 2e-3), "plora": (5e-3, 2e-3), "ditto": (5e-3, 2e-3)}
"""Learning rates of A and B; `rates` of results/emoji_study.json, and the defaults."""
State = Literal["kept", "fresh"]
STATES: tuple[State, State] = ("kept", "fresh")
SMALL = ("vendors", "languages", "held_out", "rounds", "local_steps", "batch_size")
"""What a smoke run takes from that of the study."""


@dataclass(frozen=True)
class Options:
    """What is run"""

    out: Path = Path("runs/optimizer-state")
    """Folder of what is measured: a line per finished run."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = tuple(RATES)
    quick: bool = False
    """A smoke run: four clients, two rounds, two seeds."""

    @property
    def study(self) -> Study:
        """The settings of the study that this one belongs to."""
        small = {name: QUICK[name] for name in SMALL} if self.quick else {}
        return Study(prompts=("client-language",), images=(20,), **small)


def make_run(options: Options, method: str, state: State, seed: int) -> Run:
    """One run, which leaves the test split alone."""
    base = options.study.base(CELL, seed, options.out / "scratch", test=False)
    train = options.study.rates(base.train, method, RATES[method])
    evaluation = dataclasses.replace(base.evaluation, global_model=False, examples=0, metrics=("exact_match",))
    train = dataclasses.replace(train, optimizer_state=state)
    return dataclasses.replace(base, method=method, train=train, evaluation=evaluation)


def list_missing(options: Options) -> Iterator[tuple[str, State, int]]:
    """Runs without a line; a method's programs are compiled once for all its seeds."""
    there = {(line["method"], line["state"], line["seed"]) for line in read_lines(options)}
    for method in options.methods:
        for state in STATES:
            for seed in options.seeds:
                if (method, state, seed) not in there:
                    yield method, state, seed


def read_lines(options: Options) -> list[dict[str, Any]]:
    """The finished runs."""
    return study_summary.read_lines(options.out / "lines.jsonl")


def run_missing(options: Options) -> None:
    """Run what has no line yet; a run that was stopped begins anew."""
    from fedvlm_jax.run_dir.reader import read_run
    from fedvlm_jax.training import federated_run
    from fedvlm_jax.training.loaded_model import load_model
    from fedvlm_jax.utils.progress import SilentProgress

    model = None
    for method, state, seed in list(list_missing(options)):
        run = make_run(options, method, state, seed)
        assert run.out is not None
        shutil.rmtree(run.out, ignore_errors=True)
        model = model or load_model(run)
        began = time.monotonic()
        record = read_run(federated_run.train(run, SilentProgress(), model))
        scores = record.scores("personal", split="validation")
        line = {
            "method": method, "state": state, "seed": seed, "rates": RATES[method], "scores": scores,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        with (options.out / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{method} {state} seed {seed}: {sum(scores.values()) / len(scores):.1%}", flush=True)


def summarise(lines: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Method -> the mean and spread over seeds with either state, and kept minus fresh, paired by client and seed."""
    found = {}
    for method in methods:
        own = [line for line in lines if line["method"] == method]
        by_state: dict[str, BySeed] = {
            state: {line["seed"]: line["scores"] for line in own if line["state"] == state} for state in STATES
        }
        means = {s: [sum(one.values()) / len(one) for one in by.values()] for s, by in by_state.items()}
        difference = compare_paired(by_state["kept"], by_state["fresh"])
        found[method] = {
            "rates": RATES[method],
            **{state: {**vars(spread(values)), "by_seed": values} for state, values in means.items() if values},
            "kept_minus_fresh": None if difference is None else vars(difference),
            "seeds_in_which_kept_is_ahead": count_seeds_ahead(by_state["kept"], by_state["fresh"]),
        }
    return found


def tabulate(found: dict[str, Any]) -> Table:
    """A row per method."""
    from fedvlm_jax.evaluation.statistics.over_seeds import Difference

    rows = [
        (
            method,
            *(_format(one.get(state)) for state in STATES),
            format_paired(one["kept_minus_fresh"] and Difference(**one["kept_minus_fresh"])),
            f"{one['seeds_in_which_kept_is_ahead']} of {len(one.get('kept', {}).get('by_seed', ()))}",
        )
        for method, one in found.items()
    ]
    columns = ("method", "kept", "fresh", "kept minus fresh, points", "seeds with kept ahead")
    return Table("Optimiser state between a client's rounds", columns, tuple(rows))


def _format(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    error = "" if one["std"] is None else f" ± {100 * one['std']:.1f}"
    return f"{100 * one['mean']:.1f}{error} %"


def _name_command(options: Options) -> str:
    words = ["python experiments/optimizer_state.py", *(["--quick"] if options.quick else [])]
    return " ".join([*words, *(["--methods", *options.methods] if options.methods != tuple(RATES) else [])])


def report(options: Options) -> None:
    """Write JSON and table, and print the table."""
    found = summarise(read_lines(options), options.methods)
    folder = options.out / "results" if options.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": _name_command(options),
        "cell": CELL, "seeds": options.seeds, "methods": found, "lines": read_lines(options),
    }  # fmt: skip
    (folder / "optimizer_state.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    note = (
        f"Exact match on validation after the last round, mean over clients ± standard deviation over "
        f"{len(options.seeds)} seeds; differences in percentage points on the same clients and seeds, with a 95 % "
        "t-interval over seeds. The learning rates were chosen while states were kept. Made by "
        f"`{content['command']}`."
    )
    text = f"{to_markdown(tabulate(found))}\n\n{note}\n"
    (folder / "optimizer_state.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Run what is missing, and report."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, seeds=options.seeds[:2])
    options.out.mkdir(parents=True, exist_ok=True)
    run_missing(options)
    report(options)


if __name__ == "__main__":
    main()
