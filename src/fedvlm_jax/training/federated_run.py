"""A run from start to end: rounds, evaluation, one line per round, checkpoints, the stored adapters and results.

Everything that a later round depends on is in the checkpoint of the round before, so a run that is killed at any
moment and resumed ends with the same adapters, bit for bit, on the same machine, mesh and wave width.

Several processes run the same loop side by side, in a folder that all of them reach; the first one writes into it.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.config.run_options import Run, to_json, without_extras
from fedvlm_jax.config.validation import validate
from fedvlm_jax.data.config import SPLITS, Split
from fedvlm_jax.data.sources.registry import read_table
from fedvlm_jax.data.tokenization import find_question_column
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import fetch, replicate
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.evaluator import Adapters, Scored
from fedvlm_jax.federation.simulator import Moment
from fedvlm_jax.models import resolve_folder
from fedvlm_jax.run_dir.artifacts import BASE, describe_environment, describe_start, save_adapters, save_base
from fedvlm_jax.run_dir.fingerprints import (
    anchor,
    compare_clients,
    compare_sources,
    describe_clients,
    describe_sources,
    find_places,
    move,
    tell_versions,
)
from fedvlm_jax.run_dir.folder_lock import Claim, clear, is_used
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.run_dir.validated_files import StoredConfig, check_seal, read_config, seal
from fedvlm_jax.training.callbacks import BestRound, FiniteCheck, MetricsWriter, ProgressReporter
from fedvlm_jax.training.checkpointing import CheckpointWriter
from fedvlm_jax.training.example_outputs import write_examples
from fedvlm_jax.training.failures import describe_lost
from fedvlm_jax.training.final_evaluation import describe_scores, let_remember, score_base, score_matrix, score_models
from fedvlm_jax.training.personalization import each_model
from fedvlm_jax.training.prepare import Experiment, Session, open_session, prepare, show_evaluation
from fedvlm_jax.training.progress import Progress, SilentProgress, working
from fedvlm_jax.training.trainer import Callback, FederatedTrainer
from fedvlm_jax.training.wave_width import fit
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.files import write_json

Opened = Session | Callable[[Run], Session]
"""What runs of the same model and data share, or what opens it for the first of them that needs it."""


def open_later(show: Progress) -> Callable[[Run], Session]:
    """Load the model and open the data when a run first asks for them, and keep them for the next."""
    kept: list[Session] = []

    def open_once(run: Run) -> Session:
        if not kept:
            kept.append(open_session(run, show.note))
        return kept[0]

    return open_once


def train(
    run: Run, show: Progress | None = None, session: Opened | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Run a federation from the start; returns the folder that holds everything about it.

    Args:
        run: the options; `out` must be given.
        show: where to report.
        session: what an earlier run of the same model and data left, to start faster.
        callbacks: called after those that every run has; `analysis.profiling` has one.

    Raises:
        UserError: the options, the data or the model cannot work, the folder is in use, or the loss is not finite.
    """
    validate(run)
    run = anchor(run)
    if run.out is None:
        raise UserError("a run needs a folder: set out")
    with _claim(run.out):
        processes.tell_all(partial(_refuse_used, run.out))
        return _execute(run, show or SilentProgress(), session, callbacks)


@contextmanager
def _claim(folder: Path) -> Generator[None]:
    """Have a folder for this run alone: of several processes the first claims it."""
    with ExitStack() as claims:
        processes.tell_all(lambda: bool(claims.enter_context(Claim(folder))))
        yield


def _refuse_used(folder: Path) -> None:
    if is_used(folder):
        begun = (folder / "config.json").is_file()
        other = f", or go on with it: fedvlm train --resume {folder}" if begun else ""
        raise UserError(f"{folder} is not empty: choose another --out{other}")


def resume(
    folder: Path,
    show: Progress | None = None,
    session: Opened | None = None,
    callbacks: Sequence[Callback] = (),
    places: Run | None = None,
) -> Path:
    """Go on with a run from its newest checkpoint, or from the start where there is none yet.

    Args:
        folder: the run's.
        show: where to report.
        session: what an earlier run of the same model and data left, to start faster.
        callbacks: called after those that every run has.
        places: says where data and model are now, if they have moved.

    Raises:
        UserError: the folder is no run's, its checkpoint does not fit, the devices of then are not there, or data,
            clients, model or options are not those that it began with.
    """
    show = show or SilentProgress()
    read_config(folder)  # before the folder is claimed, for it may be none
    with _claim(folder):
        return _go_on(folder, show, session, callbacks, places)


def _go_on(
    folder: Path,
    show: Progress,
    session: Opened | None,
    callbacks: Sequence[Callback] = (),
    places: Run | None = None,
) -> Path:
    stored = read_config(folder)
    run = dataclasses.replace(stored.run, out=folder, resume=None)
    finished = processes.tell_all((folder / "results.json").exists)
    if finished and places is None:
        show.note(f"{folder} is finished")
        return folder
    run = run if places is None else move(run, places)
    find_places(folder, run)
    _validate_stored(folder, run)
    check_seal(folder / "config.json", stored.content)
    if finished:
        sources = describe_sources(read_table(run.data), resolve_folder(run.model))
        compare_sources(folder, run, stored.content["fingerprint"], sources)
        _note_places(run, stored)
        show.note(f"{folder} is finished; it is noted where its data and model are now")
        return folder
    tell_versions(stored.content["versions"], show.note)
    if stored.mesh.devices > len(jax.devices()):
        raise UserError(
            f"{folder} ran on {stored.mesh.devices} devices ({stored.mesh}) and there are {len(jax.devices())} now. "
            "Numbers on another mesh agree to rounding only, so the run is not continued; start a new one."
        )
    system = dataclasses.replace(run.system, mesh=str(stored.mesh), wave=stored.wave)
    return _execute(dataclasses.replace(run, system=system), show, session, callbacks, stored)


def _validate_stored(folder: Path, run: Run) -> None:
    """Options that were edited are judged as those of a new run are."""
    try:
        validate(run)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def extend(folder: Path, run: Run, show: Progress | None = None, session: Opened | None = None) -> Path:
    """Run `run`: the rounds of the finished run in `folder`, with local fine-tuning or neighbours after them.

    Nothing is trained twice: what the finished run left is copied, and the copy goes on. It ends as `train(run)` would,
    bit for bit.

    Raises:
        UserError: the folder's run is not finished or differs in more than these, or `run.out` is in use.
    """
    validate(run)
    run = anchor(run)
    if run.out is None:
        raise UserError("a run needs a folder: set out")
    record = read_run(folder)
    done = read_config(folder).run
    if dataclasses.replace(without_extras(run), out=done.out) != done:
        raise UserError(
            f"{folder} differs from {run.out} in more than local fine-tuning or neighbours: it cannot go on as that run"
        )
    scratch = run.out.with_name(run.out.name + ".partial")  # a kill leaves the run whole or not begun
    with Claim(scratch) as claim:
        with Claim(run.out):
            _refuse_used(run.out)
        clear(scratch)
        with Claim(folder):  # what is copied is at rest
            _copy(folder, scratch)
        if processes.is_first():
            write_json(scratch / "config.json", seal({**record.config, "run": to_json(run)}))
        claim.move(run.out)
        return _go_on(run.out, show or SilentProgress(), session)


def _copy(folder: Path, target: Path) -> None:
    """Copy what a run needs to go on; without checkpoints the copy starts anew."""
    shutil.copy(folder / "metrics.jsonl", target)
    if (folder / "checkpoints").is_dir():
        shutil.copytree(folder / "checkpoints", target / "checkpoints")
        for file in folder.glob("states-*.bin"):
            shutil.copy(file, target)


def _execute(
    run: Run,
    show: Progress,
    opened: Opened | None,
    callbacks: Sequence[Callback],
    stored: StoredConfig | None = None,
) -> Path:
    """Run all that is not done; `stored` is what the folder of a run that goes on says."""
    assert run.out is not None
    check = partial(compare_sources, run.out, run, stored.content["fingerprint"]) if stored else _accept
    if opened is None:
        session = open_session(run, show.note, check)
    else:
        session = opened(run) if callable(opened) else opened
        check(session.sources)
    experiment = fit(show_evaluation(prepare(run, session, show.note), show), show)
    if stored:
        compare_clients(run.out, stored.content["fingerprint"]["clients"], describe_clients(experiment.examples))
        _note_places(run, stored)
    else:
        _write_config(run, experiment)
    ask_base = partial(_ask_base, run, experiment, session, show)
    trainer, best_round = _run_rounds(experiment, run.out, show, ask_base, callbacks)
    zero_shot = ask_base()
    best, federation, own = best_round.best, trainer.simulators[0], best_round.give_models(trainer)
    at = Moment(replicate(session.mesh, best.server), federation.client_states.slots)
    base = federation.base_at(at.server)
    shared = jax.device_get(federation.programs.method.download(server=at.server))
    save_base(run.out / "adapters" / BASE, session.params, base)
    save_adapters(
        run.out / "adapters", _list_adapters(experiment, own), shared, {"method": run.method, "round": best.round}
    )
    general = partial(federation.global_adapters, at=at) if jax.tree.leaves(shared) else None
    with working(show, "evaluating every client's own model"):
        models, remembered = let_remember(experiment, base, own)
        scored = score_models(experiment, base, models, general, zero_shot)
        results = {
            "selected_round": best.round,
            "selected_by": experiment.select_by,
            **remembered,
            **describe_scores(experiment, scored),
            **score_matrix(experiment, base, models),
        }
    if lost := describe_lost(results):
        show.note(lost)
    if processes.is_first():
        write_examples(experiment, scored, run.out)
        write_json(run.out / "results.json", results)
    return run.out


def _run_rounds(
    experiment: Experiment, folder: Path, show: Progress, ask_base: Callable[[], Any], more: Sequence[Callback]
) -> tuple[FederatedTrainer, BestRound]:
    """Run all rounds that are in no checkpoint; return the trainer after the last, and the best round."""
    best = BestRound(show, ask_base)
    checkpoints = CheckpointWriter(folder, best, show.note)
    check = FiniteCheck(show, checkpoints.describe_newest)
    callbacks = (check, best, MetricsWriter(folder, show), checkpoints, ProgressReporter(folder, show), *more)
    try:
        trainer = FederatedTrainer(experiment, folder, show, callbacks)
        best.begin(trainer)
        trainer.run(checkpoints.load(trainer))
    finally:
        checkpoints.close()
    return trainer, best


def _ask_base(run: Run, experiment: Experiment, session: Session, show: Progress) -> dict[Split, Scored]:
    """What the bare base answers, asked once: rounds need not wait for it, but rewards are relative to it."""

    def ask() -> dict[Split, Scored]:
        with working(show, "asking the bare base (zero-shot), which compiles first"):
            return score_base(experiment)

    # What is only reported of a run's own models changes nothing of the base's answers: the baseline run leaves it out.
    options = dataclasses.replace(without_extras(run).evaluation, examples=0, cross_clients=False)
    return session.remember(("zero-shot", run.data, run.seed, options, run.preference, experiment.objective.pairs), ask)


def _list_adapters(experiment: Experiment, models: Adapters) -> Iterator[tuple[str, PyTree]]:
    """Everybody's name and adapter, on the host."""
    clients = experiment.examples.clients
    for numbers, adapters in each_model(models, len(clients), experiment.layout.wave):
        held = fetch(adapters)
        for place, number in enumerate(numbers):
            yield clients[number].name, jax.tree.map(lambda leaf, place=place: leaf[place], held)


def _accept(sources: Mapping[str, Any]) -> None:
    """A new run is of what there is."""


def _note_places(run: Run, stored: StoredConfig) -> None:
    """Keep where data and model are now."""
    assert run.out is not None
    here = {name: to_json(run)[name] for name in ("model", "data")}
    if processes.is_first() and here != {name: stored.content["run"][name] for name in here}:
        write_json(run.out / "config.json", seal({**stored.content, "run": {**stored.content["run"], **here}}))


def _write_config(run: Run, experiment: Experiment) -> None:
    """Write the record of the start, which a resumed run keeps."""
    assert run.out is not None
    file = run.out / "config.json"
    if processes.is_first() and not file.exists():
        run.out.mkdir(parents=True, exist_ok=True)
        write_json(file, seal(_describe_start(run, experiment)))
    processes.wait_for_all()
    if not file.exists():
        raise UserError(
            f"process {jax.process_index()} does not see {file}, which process 0 wrote: the run's folder must be on a "
            "disk that all processes share; choose it with --out"
        )
    if processes.count() > 1:  # each reads data and model from what it takes for the same place
        then = read_config(run.out).content["fingerprint"]
        compare_sources(run.out, run, then, experiment.session.sources)
        compare_clients(run.out, then["clients"], describe_clients(experiment.examples))


def _describe_start(run: Run, experiment: Experiment) -> dict[str, Any]:
    layout = experiment.layout
    resolved = {
        "wave": layout.wave,
        "waves": layout.waves,
        "cohort": layout.cohort,
        "rows": layout.rows,
        "steps": layout.steps,
        "mesh": dict(experiment.session.mesh.shape),
        "processes": processes.count(),
        "clients": [client.name for client in experiment.examples.clients],
        "evaluated": [experiment.examples.clients[number].name for number in experiment.scored],
        "train_examples": [len(client.train) for client in experiment.examples.clients],
        "adapter_parameters": sum(
            leaf.size for path, leaf in tree.flatten(experiment.adapter).items() if not path.endswith("scale")
        ),
        "targets": experiment.spec.targets,
        "adapted_sites": [path for path, _ in lora.sites_of(experiment.adapter)],
        "skipped": [dataclasses.asdict(row) for row in experiment.examples.skipped],
        "question_column": find_question_column(experiment.session.table, run.data),
    }
    clients = experiment.examples.clients
    about = {
        "devices": [f"{count} × {kind}" for kind, count in _count_devices(experiment.session.mesh).items()],
        "examples": {split: sum(len(client.rows_of(split)) for client in clients) for split in SPLITS},
        "resolved": resolved,
        "fingerprint": {**experiment.session.sources, "clients": describe_clients(experiment.examples)},
        "federation": experiment.federation.description,
    }
    return {"run": to_json(run), **describe_start(), **describe_environment(), **about}


def _count_devices(mesh: Mesh) -> Counter[str]:
    return Counter(device.device_kind for device in mesh.devices.flat)
