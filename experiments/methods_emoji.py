"""Every method on the shipped data with equal effort, which factor to share under which shift, and a search for better.

    python experiments/methods_emoji.py run                       # everything; goes on where it was stopped
    python experiments/methods_emoji.py run --cells lang-20       # one cell
    python experiments/methods_emoji.py run --part 0/2 & python experiments/methods_emoji.py run --part 1/2
    python experiments/methods_emoji.py curve --cells lang-20     # how soon each method gets how far
    python experiments/methods_emoji.py search                    # for a better sharing pattern
    python experiments/methods_emoji.py report                    # tables and pictures of what there is
    python experiments/methods_emoji.py run --model smolvlm-nano --methods local plora --cells lang-20
    python experiments/methods_emoji.py run --quick --out smoke   # a smoke run

A *cell* is a way to cut the data. In every cell every method takes the same local steps of the same size; its learning
rates of A and B are chosen on validation from the same grid, with a seed that is not used again, and where a cell says
so, in the smaller cell that it resembles. Then come the study's seeds, and test is scored once.

Cells of the study: the client's language in the prompt (`lang`), the neutral prompt (`neutral`), and the same pictures
dealt to 16 clients at random (`iid`), each with 20 and 60 images per client. Cells of the shift study, four clients
each and no other difference between them: drawing styles alone (`style`), languages alone, of which the neutral prompt
does not tell (`language`), and both at once (`both`).

The search tries sharing patterns on the validation split of `lang-20` with two seeds of its own, and confirms the best
two against local and plora on five fresh seeds. The curves are validated every second round, with the tuning's seed.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import methods_summary as summary
import tyro

from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import EvaluationOptions, MethodOptions, Run, TrainOptions, methods_available
from fedvlm_jax.data.config import DataOptions, Iid
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.methods import rule_based
from fedvlm_jax.methods.zoo import pfedme

RESULTS = Path(__file__).parent / "results"
Rates = tuple[float, ...]
"""Learning rates of A and B; of pfedme also that of its local copy of the global model."""
GRID: tuple[Rates, ...] = ((2e-3, 2e-3), (5e-3, 2e-3), (1e-2, 5e-3))
PFEDME_RATES = (0.1, 0.4, 0.8)
"""pFedMe's inner rate decides as much as the other two (26.1 and 40.1 % were seen), so its grid has it: nine points."""
FIRST = ("local", "fedavg-lora", "plora", "fedavg-lora+ft", "fedavg-lora+knn")
SHIFT_METHODS = ("local", "fedavg-lora", "plora", "fedsa-lora", "iat", "iat-inverted")
TUNE_SEED, SEARCH_SEEDS, FRESH_SEEDS = 100, (101, 102), (200, 201, 202, 203, 204)
FINETUNE_STEPS, NEIGHBOURS = 20, 10

ENCODER, DECODER = "language_model/encoder/", "language_model/decoder/"
PATTERNS = {
    "B of the encoder": f"{ENCODER}.*/b$",
    "B of the decoder": f"{DECODER}.*/b$",
    "A of the encoder": f"{ENCODER}.*/a$",
    "A of the decoder": f"{DECODER}.*/a$",
    "all of the encoder": f"{ENCODER}.*/(a|b)$",
    "all of the decoder": f"{DECODER}.*/(a|b)$",
    "B of attention": r"_proj/b$",
    "B of feed-forward": r"fc[12]/b$",
    "all of attention": r"_proj/(a|b)$",
    "all of feed-forward": r"fc[12]/(a|b)$",
    "B of queries and keys": r"(q|k)_proj/b$",
    "B of values and outputs": r"(v|out)_proj/b$",
    "all of fc1": r"fc1/(a|b)$",
    "all of the decoder's own attention": f"{DECODER}.*self_attn/.*/(a|b)$",
    "all of cross attention": r"encoder_attn/.*/(a|b)$",
}
"""Candidates of the search: what is averaged; everything else stays with its client."""
TWO_ADAPTERS = ("feddpa-t", "feddpa-f", "fedalt", "ditto", "apfl")
"""Candidates of another kind: a global and a private adapter, which a share rule cannot say."""
SEARCH_RATES = (5e-3, 2e-3)
HEALTH = ("aggregation_error", "angle_a", "update_dissimilarity", "update_norm")
"""What a line keeps of the last federated round."""
TESTED = ("run", "confirm")
"""Stages that score test; the others leave it alone."""


@dataclass(frozen=True)
class Cell:
    """A way to cut the data, what is compared on it, and the cell whose learning rates it uses."""

    data: DataOptions
    methods: tuple[str, ...]
    tuned_in: str


@dataclass(frozen=True)
class Study:
    """The study's options; the defaults are those of the README"""

    stage: tyro.conf.Positional[Literal["run", "curve", "search", "report"]]
    out: Path = Path("runs/methods-emoji")
    """Folder of what is measured: in a folder of the base's name, one line per finished run."""
    results: Path | None = None
    """Where the report goes (default: experiments/results, or a folder in it for another base than Florence2-nano; with
    --quick, into --out)."""
    cells: tuple[str, ...] = ()
    """Only these cells; all by default."""
    methods: tuple[str, ...] = ()
    """Only these methods; all by default."""
    part: str = "0/1"
    """i/n: every n-th method from the i-th, so that n processes share the work."""
    seeds: int = 5
    """How many seeds, from 0."""
    model: str = "florence2-nano"
    """The base."""
    rounds: int = 12
    local_steps: int = 4
    batch_size: int = 8
    quick: bool = False
    """A smoke run: four clients, two rounds, two seeds, two points of the grid, four methods."""
    grid: tyro.conf.Suppress[tuple[Rates, ...]] = GRID
    data: tyro.conf.Suppress[emoji.Options] = field(default_factory=lambda: emoji.Options(prompt="neutral"))

    @property
    def folder(self) -> Path:
        """Where the base's lines are."""
        return self.out / Path(self.model).name

    @property
    def scratch(self) -> Path:
        """Where this process's runs are, one after the other."""
        return self.folder / "scratch" / f"part-{self.part.replace('/', '-')}"

    @property
    def report_folder(self) -> Path:
        """Where the report goes."""
        usual = RESULTS if self.model == "florence2-nano" else RESULTS / f"methods_{Path(self.model).name}"
        return self.results or (self.folder / "results" if self.quick else usual)

    def plan(self) -> dict[str, Cell]:
        """The cells by name, in the order in which they are run."""
        names = [name for name in methods_available() if name not in FIRST and not declare(name, Run()).classes]
        everything = FIRST if self.quick else (*FIRST, *names)
        cells: dict[str, Cell] = {}
        evenly = Iid(clients=len(self.data.vendors) * len(self.data.languages))
        for images in (20, 60):
            for name, changes in {
                "lang": {"prompt": "client-language"},
                "neutral": {},
                "iid": {"prompt": "client-language", "partition": evenly},
            }.items():
                options = self.data.replace(images_per_client=images, **changes)
                cells[f"{name}-{images}"] = Cell(options, everything, f"{name}-20")
        alike = self.data.replace(partition=emoji.Topics(alpha=float("inf")))
        vendors, languages = self.data.vendors, self.data.languages
        for name, changes in {
            "style": {"languages": languages[:1]},
            "language": {"vendors": vendors[:1]},
            "both": {"vendors": vendors[:2], "languages": languages[:2]},
        }.items():
            cells[name] = Cell(alike.replace(**changes), SHIFT_METHODS, name)
        return cells

    def list_rates(self, method: str) -> tuple[Rates, ...]:
        """The points among which a method's rates are chosen."""
        if method != "pfedme":
            return self.grid
        return tuple((*rates, inner) for rates in self.grid for inner in PFEDME_RATES)

    def make_run(self, stage: str, cell: Cell, method: str, seed: int, rates: Rates) -> Run:
        """One run; `method` may end with +ft or +knn, or be a pattern of the search."""
        share = PATTERNS.get(method, "")
        train = TrainOptions(
            rounds=self.rounds, local_steps=self.local_steps, batch_size=self.batch_size,
            learning_rate_a=rates[0], learning_rate_b=rates[1],
            finetune_steps=FINETUNE_STEPS if method.endswith("+ft") else 0,
        )  # fmt: skip
        evaluation = EvaluationOptions(
            every=2 if stage == "curve" else self.rounds, global_model=False, before_redistribution=False, examples=0,
            metrics=("exact_match",), neighbours=NEIGHBOURS if method.endswith("+knn") else 0, test=stage in TESTED,
        )  # fmt: skip
        name = "share" if share else method.partition("+")[0]
        options = MethodOptions()
        if share:
            options = rule_based.Options(share)
        elif len(rates) > 2:
            options = pfedme.Options(rate=rates[2])
        return Run(
            model=self.model, method=name, method_options=options, seed=seed, data=cell.data, train=train,
            evaluation=evaluation, checkpoint_every=self.rounds, out=self.scratch,
        )  # fmt: skip

    def mine(self, names: Iterator[str] | list[str] | tuple[str, ...]) -> list[str]:
        """What this process runs: a method stays with one process, which compiles it once."""
        place, of = map(int, self.part.split("/"))
        return [name for number, name in enumerate(names) if number % of == place]


class Bench:
    """Runs what has no line yet, and writes the line."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.log = study.folder / f"lines-{study.part.replace('/', '-')}.jsonl"
        self.model: Any = None
        self.began, self.count = time.monotonic(), 0

    def score(self, stage: str, cell: str, method: str, seed: int, rates: Rates) -> summary.Json:
        """The line of a run, from the log or from running it."""
        key = {"stage": stage, "cell": cell, "method": method, "seed": seed, "rates": list(rates)}
        for line in summary.read_all(self.study.folder):
            if all(line[name] == value for name, value in key.items()):
                return line
        from fedvlm_jax.run_dir.artifacts import describe_environment
        from fedvlm_jax.run_dir.reader import read_run
        from fedvlm_jax.training import federated_run
        from fedvlm_jax.training.loaded_model import load_model
        from fedvlm_jax.utils.progress import SilentProgress

        run = self.study.make_run(stage, self.study.plan()[cell], method, seed, rates)
        assert run.out is not None
        shutil.rmtree(run.out, ignore_errors=True)
        self.model = self.model or load_model(run)
        start = time.monotonic()
        record = read_run(federated_run.train(run, SilentProgress(), self.model))
        validation = record.scores("personal", split="validation")
        federated = record.rounds[: self.study.rounds]  # what follows is fine-tuning
        line = key | {
            "validation": sum(validation.values()) / len(validation),
            "test": record.scores("personal") if stage in TESTED else None,
            "zero_shot": record.scores("zero_shot", split="test" if stage in TESTED else "validation"),
            "curve": [[one["round"], one["validation"]["exact_match"]] for one in record.rounds if one["validation"]],
            "bytes_up": _mean(federated, "bytes_up_per_client"),
            "bytes_down": _mean(federated, "bytes_down_per_client"),
            "health": {name: federated[-1][name] for name in HEALTH if name in federated[-1]},
            "neighbours": record.results.get("neighbours", {}).get("share"),
            "seconds": round(time.monotonic() - start, 1),
            "commit": describe_environment()["commit"],
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.count += 1
        passed = (time.monotonic() - self.began) / 60
        which = f"{stage} {cell} {method} seed {seed} rates {' '.join(f'{rate:g}' for rate in rates)}"
        print(f"[{passed:6.1f} min, {self.count} runs] {which}: validation {line['validation']:.1%}", flush=True)
        return line

    def tune(self, cell: str, method: str) -> Rates:
        """The rates that do best on validation; the first of equals."""
        points = self.study.list_rates(method)
        return max(points, key=lambda rates: self.score("tune", cell, method, TUNE_SEED, rates)["validation"])

    def run(self) -> None:
        """All cells that were asked for, method by method; or, in the stage curve, one run of each."""
        for name, cell in self.study.plan().items():
            if self.study.cells and name not in self.study.cells:
                continue
            asked = [method for method in cell.methods if not self.study.methods or method in self.study.methods]
            for method in self.study.mine(asked):
                rates = self.tune(cell.tuned_in, method)
                if self.study.stage == "curve":
                    self.score("curve", name, method, TUNE_SEED, rates)
                else:
                    for seed in range(self.study.seeds):
                        self.score("run", name, method, seed, rates)
                self.forget()

    def search(self) -> None:
        """Try the patterns on validation, then confirm the best two on fresh seeds; a single process does this."""
        candidates = (*PATTERNS, *TWO_ADAPTERS, "plora", "local")
        candidates = ("B of attention", "plora", "local") if self.study.quick else candidates
        tried = {}
        for method in self.study.mine(candidates):
            scores = [self.score("search", "lang-20", method, seed, SEARCH_RATES) for seed in SEARCH_SEEDS]
            tried[method] = sum(line["validation"] for line in scores) / len(scores)
            self.forget()
        if self.study.part != "0/1":
            print("the search's part is done; once all are, run it without --part to confirm the best")
            return
        best = sorted((name for name in tried if name not in ("plora", "local")), key=lambda name: -tried[name])[:2]
        self.confirm("lang-20", dict.fromkeys((*best, "local", "plora"), SEARCH_RATES))

    def confirm(self, cell: str, rates: Mapping[str, Rates]) -> None:
        """Score methods with their rates on test, with seeds that no choice has seen."""
        for method, chosen in rates.items():
            for seed in FRESH_SEEDS[: self.study.seeds]:
                self.score("confirm", cell, method, seed, chosen)
            self.forget()

    def forget(self) -> None:
        """Drop a method's programs: they would fill the memory."""
        if self.model is not None:
            self.model.drop_programs()


def _mean(rounds: list[summary.Json], name: str) -> int:
    return round(sum(one[name] for one in rounds) / len(rounds))


QUICK: dict[str, Any] = {
    "grid": GRID[1:], "seeds": 2, "rounds": 2, "local_steps": 2, "batch_size": 4,
    "data": emoji.Options(
        prompt="neutral", vendors=("noto", "fluent"), languages=("en", "de"), images_per_client=6,
        validation_per_client=4, test_per_client=6,
    ),
}  # fmt: skip


def start(study: Study) -> None:
    """Refuse cells that there are not, and make the folder.

    Raises:
        SystemExit: an unknown cell.
    """
    unknown = [name for name in study.cells if name not in study.plan()]
    if unknown:
        raise SystemExit(f"--cells {unknown[0]}: there are {', '.join(study.plan())}")
    study.folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_bench(study: Study) -> Iterator[Bench]:
    """Open a bench whose runs leave nothing but their lines.

    Programs are kept between processes: a method that was compiled for one cell starts at once when it goes on.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", os.fspath(study.folder.resolve() / "compiled"))
    yield Bench(study)
    shutil.rmtree(study.scratch, ignore_errors=True)


def main() -> None:
    """Run the stage that was asked for."""
    study = tyro.cli(Study, description=__doc__)
    if study.quick:
        study = dataclasses.replace(study, **QUICK)
    start(study)
    if study.stage == "report":
        summary.write(study.folder, study.report_folder, study.plan(), study.model)
        return
    with open_bench(study) as bench:
        bench.search() if study.stage == "search" else bench.run()


if __name__ == "__main__":
    main()
