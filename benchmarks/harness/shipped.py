"""Rounds of the model that ships on its own data, at several batches and waves: `benchmarks/shipped.py`."""

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax

from fedvlm_jax.config.run_options import EvaluationOptions, Run, TrainOptions
from fedvlm_jax.data.batches import read_ahead
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.models import Vlm, resolve_folder
from fedvlm_jax.training.experiment import Experiment, make_simulator, open_experiment
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from harness.cells import compare_factors
from harness.machine import MatmulPeak, describe_machine
from harness.memory import measure_clients
from harness.ours import METHOD, Ours, choose_examples, count_round_flops
from harness.peer import Peer
from harness.timing import describe_times, interleave, ratio
from harness.world import Shape, World, read_world

MODEL, CLIENTS, IMAGES = "florence2-nano", 16, 60
"""What ships, and how many clients of so many training images its data make."""

DRIVEN = 9
"""Rounds of a whole simulator: the first, which may compile, and those of which the host's share is taken."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured."""

    batches: tuple[int, ...] = (1, 8)
    waves: tuple[int, ...] = (1, CLIENTS)
    steps: int = 4
    repeats: int = 5
    peer_python: str | None = None


@dataclass(frozen=True)
class Shipped:
    """The shipped model with a federation that is ready to run, and its first round as a world."""

    experiment: Experiment
    simulator: Simulator
    world: World

    @property
    def vlm(self) -> Vlm:
        """The model."""
        return self.experiment.model.vlm

    @property
    def params(self) -> Any:
        """Its weights."""
        return self.experiment.model.params


def open_shipped(shape: Shape, model: LoadedModel | None = None, name: str = MODEL) -> Shipped:
    """Prepare the federation that ships, of all its clients.

    Args:
        shape: its rounds; as many clients as the data have.
        model: of an earlier call, to start faster.
        name: of the model, one that ships.
    """
    run = Run(
        model=name,
        method=METHOD,
        data=emoji.Options(images_per_client=IMAGES, prompt="neutral"),
        train=TrainOptions(local_steps=shape.steps, batch_size=shape.batch, weighting="uniform"),
        evaluation=EvaluationOptions(examples=0),
    )
    experiment = open_experiment(run, model or load_model(run))
    simulator = make_simulator(experiment)
    world = read_world(experiment, simulator)
    if world.shape != shape:
        raise ValueError(f"the data that ships make rounds of {world.shape}, not {shape}")
    return Shipped(experiment, simulator, world)


def measure_shipped(options: BenchOptions, note: Note = lambda text: None) -> dict[str, Any]:
    """Measure what the options name; returns what goes into JSON."""
    note("measuring this machine's float32 matmul peak")
    peak, rounds, model = MatmulPeak(), [], None
    shipped: Shipped | None = None
    for batch in options.batches:
        note(f"batch {batch}: compiling, then {options.repeats} interleaved runs")
        shipped = open_shipped(Shape(CLIENTS, options.steps, batch), model)
        model = shipped.experiment.model
        rounds += _measure_batch(shipped, peak, options)
    assert shipped is not None
    note(f"{DRIVEN} rounds as `fedvlm train` runs them")
    driven = measure_simulator(shipped.simulator)
    note("memory of one more client, from the compiler")
    rows = shipped.world.examples["input_ids"].shape[-1]
    size = shipped.experiment.model.processor.size
    memory = measure_clients(
        shipped.vlm,
        shipped.params,
        dataclasses.replace(shipped.world.shape, batch=options.batches[0]),
        size=size,
        prompt=rows - shipped.vlm.image_tokens(*size),
        answer=shipped.world.examples["labels"].shape[-1],
    )
    return {
        "model": MODEL,
        "clients": CLIENTS,
        "steps": options.steps,
        "tokens": rows,
        "matmul_peak_gflops": max(line["matmul_peak_gflops"] for line in rounds),
        "rounds": rounds,
        "simulator": driven,
        "client_bytes": {"batch": options.batches[0], **memory},
        **describe_machine(),
    }


def measure_simulator(simulator: Simulator, rounds: int = DRIVEN) -> dict[str, Any]:
    """Run whole rounds, data read ahead and states written back, and tell the compiled programs' time from the rest.

    Returns:
        `host_share`: of a round after the first, what passes outside of compiled programs; `health_share`: in the
        program that measures the aggregation's health; `round_seconds`; and `compiles`: programs of the round, and
        whatever XLA compiled after the first round, which should be nothing.
    """
    timed: list[_Timed] = []
    host: list[float] = []
    healths: list[float] = []
    seconds: list[float] = []
    programs = copy.copy(simulator.programs)  # other simulators share them
    programs.compiled = compiled = dict(programs.compiled)
    health = _Timed(programs.health)
    ahead, after_first, rates = read_ahead(simulator.read_round, 1, rounds + 1), 0, {"a": 5e-3, "b": 2e-3}
    with (
        mock.patch.object(programs, "health", health),
        mock.patch.object(simulator, "programs", programs),
        _count_compilations() as counted,
    ):
        for number in range(rounds):
            for program in (health, *timed):
                program.seconds = 0.0
            began = time.perf_counter()
            simulator.run_round(next(ahead), rates)
            jax.block_until_ready(simulator.server)
            total = time.perf_counter() - began
            if number == 0:
                timed = [_Timed(program) for program in compiled.values()]
                compiled.update(zip(compiled, timed, strict=True))
                after_first = counted[0]
                continue
            seconds.append(total)
            host.append(1 - sum(program.seconds for program in (health, *timed)) / total)
            healths.append(health.seconds / total)
    return {
        "host_share": round(statistics.median(host), 4),
        "health_share": round(statistics.median(healths), 4),
        "round_seconds": describe_times(seconds),
        "compiles": {"rounds": rounds, "programs_of_the_round": len(compiled), "later": counted[0] - after_first},
    }


@contextlib.contextmanager
def _count_compilations() -> Generator[list[int]]:
    """Give a list whose one number grows with everything that XLA compiles."""
    counted = [0]

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        counted[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def _measure_batch(shipped: Shipped, peak: MatmulPeak, options: BenchOptions) -> list[dict[str, Any]]:
    """A line per wave, all interleaved with each other, the matmul peak, and the peer where there is one."""
    world, vlm = shipped.world, shipped.vlm
    ours = {wave: Ours(vlm, shipped.params, world, "cached", wave) for wave in options.waves}
    for run in ours.values():
        run()
    contestants: dict[str, Callable[[], float]] = {"peak": peak, **{str(wave): run for wave, run in ours.items()}}
    theirs: dict[str, Any] = {}
    if options.peer_python is None:
        found = interleave(contestants, options.repeats)
    else:
        with Peer(options.peer_python, resolve_folder(MODEL), world) as peer:
            choice = peer.choose("cached", "float32")
            last = ours[options.waves[-1]].give_factors()
            apart = compare_factors(world.start, last, peer.give_factors(choice, "cached"))
            found = interleave(contestants | {"theirs": peer.runner(choice, "cached")}, options.repeats)
        theirs = {"seconds": describe_times(found["theirs"]), "threads": choice[0], "adapters": apart}
    batch = {
        name: jax.ShapeDtypeStruct((world.shape.batch, *rows.shape[2:]), rows.dtype)
        for name, rows in choose_examples(world.examples, "cached").items()
    }
    flops = count_round_flops(vlm, world.shape, world.settings, batch)
    return [_describe(run, found, flops, options.waves, theirs) for run in ours.values()]


def _describe(
    run: Ours, found: dict[str, list[float]], flops: int, waves: Sequence[int], theirs: dict[str, Any]
) -> dict[str, Any]:
    shape, seconds = run.world.shape, found[str(run.wave)]
    median = statistics.median(seconds)
    line: dict[str, Any] = {
        "batch": shape.batch,
        "wave": run.wave,
        "seconds": describe_times(seconds),
        "step_seconds": median / (shape.steps * (shape.clients // run.wave)),
        "clients_per_second": shape.clients / median,
        "examples_per_second": shape.examples / median,
        "gflop": flops / 1e9,
        "matmul_peak_gflops": statistics.median(found["peak"]) / 1e9,
        "share_of_peak": statistics.median(flops / s / p for s, p in zip(seconds, found["peak"], strict=True)),
        "times_first_wave": ratio(found[str(waves[0])], seconds),
        "compile_seconds": run.compile_seconds,
    }
    if theirs:
        line |= {"theirs": theirs, "times_theirs": ratio(found["theirs"], seconds)}
    return line


@dataclass
class _Timed:
    """A compiled program that keeps the time until its results are there."""

    program: Any
    seconds: float = 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        out = jax.block_until_ready(self.program(*arguments))
        self.seconds += time.perf_counter() - began
        return out
