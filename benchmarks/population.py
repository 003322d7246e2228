"""Does a round cost more, or memory grow, where there are ten times as many clients?

    python benchmarks/population.py                          # 200 and 2,000 clients, cohort 16, 50 rounds of each
    python benchmarks/population.py --rounds 5               # to try it

One process per population, on the data and base that ship. They take turns, a round each, so that whatever else the
machine does slows both. A round here is all that `fedvlm train` does in one: the cohort's rows are read, its states
gathered, the compiled round run, states and checkpoint written. Evaluation, which goes by `--evaluation.clients`, is
left out. Resident memory is read by the kernel's count after every round.
"""

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from harness.command import name_command

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.run_dir.artifacts import describe_environment
from fedvlm_jax.utils.files import write_json

HERE = Path(__file__).parent
SETTLED = 5
"""Rounds after which memory must stay as it is: the first make buffers that the later ones use again."""


@dataclass(frozen=True)
class Options:
    """What may be chosen."""

    clients: tuple[int, ...] = (200, 2000)
    """Populations."""
    cohort: int = 16
    """Clients a round."""
    rounds: int = 50
    """Of each."""
    serve: int = 0
    """Be the process of this population; started by the script itself."""


def main() -> None:
    """Start a process for each, let them take turns, and say what came out."""
    options = tyro.cli(Options, description=__doc__)
    if options.serve:
        serve(options)
        return
    children = {count: start(count) for count in options.clients}
    lines: dict[int, list[dict[str, float]]] = {count: [] for count in options.clients}
    for child in children.values():
        ask(child)  # ready
    for number in range(1, options.rounds + 1):
        for count, child in children.items():
            lines[count].append(ask(child))
        told = ", ".join(f"{c} clients {x[-1]['seconds']:.2f} s {x[-1]['mib']:.0f} MiB" for c, x in lines.items())
        print(f"round {number}: {told}", flush=True)
    result = {"command": name_command(), **summarise(options, lines)}
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results" / "population.json", {**result, **describe_environment()})
    print(json.dumps(result, indent=1))


def start(count: int) -> "subprocess.Popen[str]":
    """A process that runs a round whenever a line is written to it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", str(count)]
    quiet = {**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)


def ask(child: "subprocess.Popen[str]") -> dict[str, float]:
    """Its next answer."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        sys.exit(f"a process ended early, with {child.wait()}")
    return json.loads(answer)


def serve(options: Options) -> None:
    """Prepare a federation, then run a round for every line."""
    from fedvlm_jax.federation.checkpoint import Checkpoints
    from fedvlm_jax.training.experiment import make_simulator, open_experiment
    from fedvlm_jax.training.loaded_model import load_model

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = make_run(options)
        experiment = open_experiment(run, load_model(run))
        simulator = make_simulator(experiment, Path(folder) / "states.bin")
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=2)
        rates = {"a": run.train.learning_rate_a, "b": run.train.learning_rate_b}
        for number, _ in enumerate(sys.stdin):
            answer: dict[str, float] = {}
            if number:
                began = time.perf_counter()
                simulator.run_round(simulator.read_round(number), rates)
                client_states = simulator.client_states
                client_states.flush()
                client_states.keep(number)
                client_states.let_go(number - 2)
                about: dict[str, Any] = {"best_round": 0, "best_phase": 0, "best_score": [None, None]}
                checkpoints.save(number, simulator.state(), about, {"states": client_states.shapes})
                answer = {"seconds": time.perf_counter() - began, "mib": resident()}
            print(json.dumps(answer), flush=True)
        checkpoints.close()


def make_run(options: Options) -> Run:
    """The shipped data, dealt to as many clients as this process serves."""
    data = emoji.Options(partition=emoji.Topics(clients=options.serve), prompt="neutral")
    return Run(cohort=options.cohort, data=data)


def resident() -> float:
    """MiB that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def summarise(options: Options, lines: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, ratios to the first population, and how far memory went from where it settled."""
    settled = {count: rounds[min(SETTLED, len(rounds) - 1) :] for count, rounds in lines.items()}
    seconds = {count: statistics.median(line["seconds"] for line in rounds) for count, rounds in settled.items()}
    first = options.clients[0]
    pairs = {
        count: statistics.median(
            line["seconds"] / other["seconds"] for line, other in zip(settled[count], settled[first], strict=True)
        )
        for count in options.clients
    }
    memory = {count: [line["mib"] for line in rounds] for count, rounds in settled.items()}
    return {
        "cohort": options.cohort,
        "rounds": options.rounds,
        "populations": {
            str(count): {
                "seconds_per_round": round(seconds[count], 3),
                f"time_to_that_of_{first}": round(pairs[count], 3),
                "mib_settled": round(memory[count][0]),
                "mib_at_the_end": round(memory[count][-1]),
                "furthest_from_settled": round(max(abs(x / memory[count][0] - 1) for x in memory[count]), 4),
            }
            for count in options.clients
        },
    }


if __name__ == "__main__":
    main()
