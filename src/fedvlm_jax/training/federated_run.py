"""A run from start to end: rounds, evaluation, one line per round, checkpoints, the stored adapters and results.

Everything that a later round depends on is in the checkpoint of the round before, so a run that is killed at any
moment and resumed ends with the same adapters, bit for bit, on the same machine, mesh and wave width.

Several processes run the same loop side by side, in a folder that all of them reach; the first one writes into it.
"""

import dataclasses
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import jax
from jaxtyping import PyTree

from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import Run, to_json, without_extras
from fedvlm_jax.config.start_folder import fit_start
from fedvlm_jax.data.sources.registry import read_table
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import fetch, replicate
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.evaluator import Adapters
from fedvlm_jax.federation.simulator import Moment
from fedvlm_jax.models import resolve_folder
from fedvlm_jax.privacy.accounting import import_accounting
from fedvlm_jax.privacy.budget import describe_coverage
from fedvlm_jax.run_dir import absolute_paths, artifacts, fingerprints, kept_messages
from fedvlm_jax.run_dir.config_seal import check_seal, seal
from fedvlm_jax.run_dir.folder_lock import Claim, clear, is_used
from fedvlm_jax.run_dir.reader import read_run, refuse_server
from fedvlm_jax.run_dir.validated_files import StoredConfig, read_config
from fedvlm_jax.training import final_evaluation
from fedvlm_jax.training.best_round import BestRound
from fedvlm_jax.training.callbacks import (
    FiniteCheck,
    MessageKeeper,
    MetricsWriter,
    PrivacyLedger,
    ProgressReporter,
    SelectionWriter,
)
from fedvlm_jax.training.checkpointing import CheckpointWriter
from fedvlm_jax.training.example_outputs import write_examples
from fedvlm_jax.training.experiment import Experiment, find_programs, open_experiment
from fedvlm_jax.training.failures import describe_lost
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.training.personalization import each_model
from fedvlm_jax.training.start_description import describe_start
from fedvlm_jax.training.trainer import Callback, FederatedTrainer
from fedvlm_jax.training.wave_width import fit
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress import Progress, SilentProgress, working

Model = LoadedModel | Callable[[Run], LoadedModel]
"""A model that runs share, or a function that loads it for the first of them that needs it."""


def load_later(show: Progress) -> Callable[[Run], LoadedModel]:
    """Return a function that loads the model when a run first asks for it, and keeps it for the next."""
    kept: list[LoadedModel] = []

    def load_once(run: Run) -> LoadedModel:
        if not kept:
            kept.append(load_model(run, show.note))
        return kept[0]

    return load_once


def train(
    run: Run, show: Progress | None = None, model: Model | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Run a federation from the start; return the folder that holds everything about it.

    A model that an earlier run on the same mesh has loaded saves a start; `callbacks` come after those of every run.

    Raises:
        UserError: the options, the data or the model cannot work, the folder is in use, or the loss is not finite.
    """
    run, out = _check_new(run)
    with _claim(out):
        processes.tell_all(partial(_refuse_used, out))  # the first looks, before it writes what the others would see
        return _run_to_end(callbacks, lambda: _execute(run, show or SilentProgress(), model, callbacks))


def _check_new(run: Run) -> tuple[Run, Path]:
    validate(run)
    if run.privacy.on:
        import_accounting()
    run = fit_start(absolute_paths.anchor(run))
    if run.out is None:
        raise UserError("a run needs a folder: set out")
    return run, run.out


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
    model: Model | None = None,
    callbacks: Sequence[Callback] = (),
    places: Run | None = None,
) -> Path:
    """Go on with a run from its newest checkpoint, or from the start where there is none yet.

    Arguments are those of `train`, but for `places`, which says where data and model are now if they have moved.

    Raises:
        UserError: the folder is no run's, its checkpoint does not fit, the devices of then are not there, or data,
            clients, model or options are not those that it began with.
    """
    refuse_server(read_config(folder), folder)  # before the folder is claimed, for it may be none
    with _claim(folder):
        return _run_to_end(callbacks, lambda: _go_on(folder, show or SilentProgress(), model, callbacks, places))


def _run_to_end(callbacks: Sequence[Callback], work: Callable[[], Path]) -> Path:
    """Do the work of a run, and have callbacks let go whatever comes of it."""
    try:
        return work()
    finally:
        for callback in callbacks:
            callback.close()


def _finish(folder: Path, show: Progress, callbacks: Sequence[Callback]) -> Path:
    for callback in callbacks:
        callback.on_finished(folder, show)
    return folder


def _go_on(
    folder: Path, show: Progress, model: Model | None, callbacks: Sequence[Callback] = (), places: Run | None = None
) -> Path:
    stored = read_config(folder)
    run = dataclasses.replace(stored.run, out=folder, resume=None)
    finished = processes.tell_all((folder / "results.json").exists)
    if finished and places is None:
        show.note(f"{folder} is finished")
        return _finish(folder, show, callbacks)
    run = run if places is None else absolute_paths.move(run, places)
    absolute_paths.find_places(folder, run)
    try:
        validate(run)  # options may have been edited
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    check_seal(folder / "config.json", stored.content)
    if stored.budget is not None and not finished:
        import_accounting()
    if finished:
        sources = {"data": read_table(run.data).digest, **fingerprints.describe_model(resolve_folder(run.model))}
        fingerprints.compare_sources(folder, run, stored.content["fingerprint"], sources)
        _note_places(run, stored)
        show.note(f"{folder} is finished; it is noted where its data and model are now")
        return _finish(folder, show, callbacks)
    fingerprints.tell_versions(stored.content["versions"], show.note)
    if stored.mesh.devices > len(jax.devices()):
        raise UserError(
            f"{folder} ran on {format_count(stored.mesh.devices, 'device')} ({stored.mesh}) and there are "
            f"{len(jax.devices())} now. "
            "Numbers on another mesh agree to rounding only, so the run is not continued; start a new one."
        )
    # A wave of another width would round otherwise.
    system = dataclasses.replace(run.system, mesh=str(stored.mesh), wave=stored.wave)
    return _execute(dataclasses.replace(run, system=system), show, model, callbacks, stored)


def extend(
    folder: Path, run: Run, show: Progress | None = None, model: Model | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Run `run`: the rounds of the finished run in `folder`, with local fine-tuning or neighbours after them.

    Nothing is trained twice: what the finished run left is copied, and the copy goes on. It ends as `train(run)` would,
    bit for bit.

    Raises:
        UserError: the folder's run is not finished or differs in more than these, or `run.out` is in use.
    """
    run, out = _check_new(run)
    record, done = read_run(folder), read_config(folder).run
    if dataclasses.replace(without_extras(run), out=done.out) != done:
        raise UserError(
            f"{folder} differs from {out} in more than local fine-tuning or neighbours: it cannot go on as that run"
        )
    scratch = out.with_name(out.name + ".partial")  # a kill leaves the run whole or not begun
    with Claim(scratch) as claim:
        with Claim(out):
            _refuse_used(out)
        clear(scratch)
        with Claim(folder):  # what is copied is at rest
            shutil.copy(folder / "metrics.jsonl", scratch)
            if (folder / "checkpoints").is_dir():  # without checkpoints the copy starts anew
                shutil.copytree(folder / "checkpoints", scratch / "checkpoints")
                if (folder / kept_messages.FOLDER).is_dir():
                    shutil.copytree(folder / kept_messages.FOLDER, scratch / kept_messages.FOLDER)
                for file in folder.glob("states-*.bin"):
                    shutil.copy(file, scratch)
        if processes.is_first():
            write_json(scratch / "config.json", seal({**record.config, "run": to_json(run)}))
        claim.move(out)
        return _run_to_end(callbacks, lambda: _go_on(out, show or SilentProgress(), model, callbacks))


def _execute(
    run: Run, show: Progress, given: Model | None, callbacks: Sequence[Callback], stored: StoredConfig | None = None
) -> Path:
    """Run all that is not done; `stored` is what the folder of a run that goes on says."""
    experiment = _open(run, show, given, stored)
    model, folder = experiment.model, experiment.folder
    trainer, best_round = _run_rounds(experiment, callbacks)
    zero_shot = final_evaluation.ask_base(experiment)
    best, federation, personal = best_round.best, trainer.simulators[0], best_round.give_models()
    at = Moment(replicate(model.mesh, best.server), federation.client_states.slots)
    base = federation.base_at(at.server)
    shared = jax.device_get(federation.programs.method.download(server=at.server))
    artifacts.save_base(folder / "adapters" / artifacts.BASE, model.params, base)
    about = {"method": run.method, "round": best.round}
    general = partial(federation.global_adapters, at=at) if jax.tree.leaves(shared) else None
    listed = [_list_adapters(experiment, models) for models in (personal, general) if models is not None]
    artifacts.save_adapters(folder / "adapters", listed[0], shared, about, *listed[1:])
    with working(show, "evaluating every client's own model"):
        scored, scores = final_evaluation.score_models(experiment, base, personal, general, zero_shot)
        results = {"selected_round": best.round, "selected_by": experiment.select_by, **scores}
    if experiment.budget is not None:
        results["privacy"] = describe_coverage(experiment.budget)
    if lost := describe_lost(results):
        show.note(lost)
    if processes.is_first():
        write_examples(experiment, scored)
        write_json(folder / "results.json", results)
    return _finish(folder, show, callbacks)


def _open(run: Run, show: Progress, given: Model | None, stored: StoredConfig | None) -> Experiment:
    """Load what a run needs, and write its config, or see that all is as the config of a run that goes on has it."""
    folder, then = run.out, stored.content["fingerprint"] if stored else {}
    assert folder is not None
    check = partial(fingerprints.compare_sources, folder, run, then) if stored else lambda sources: None
    if stored:
        fingerprints.compare_given(folder, run, then)
    if given is None:
        model = load_model(run, show.note, check)
    else:
        model = given(run) if callable(given) else given
        check(model.sources(run.data))
    experiment = fit(open_experiment(run, model, show, budget=stored.budget if stored else None))
    if stored:
        fingerprints.compare_clients(folder, then["clients"], experiment.data.fingerprint["clients"])
        _note_places(run, stored)
    else:
        _write_config(experiment)
    return experiment


def _run_rounds(experiment: Experiment, more: Sequence[Callback]) -> tuple[FederatedTrainer, BestRound]:
    """Run all rounds that are in no checkpoint; return the trainer after the last, and the best round."""
    trainer = FederatedTrainer(experiment)
    best = BestRound(trainer)
    checkpoints = CheckpointWriter(trainer, best)
    # The line is complete before it is written, and on the disk before the checkpoint of its round.
    check = FiniteCheck(checkpoints.describe_newest)
    ledger = () if experiment.budget is None else (PrivacyLedger(experiment.budget),)
    keeper = (MessageKeeper(),) if experiment.run.audit.keep else ()
    judged = (check, SelectionWriter(), best, *ledger)
    callbacks = (*judged, MetricsWriter(), *keeper, checkpoints, ProgressReporter(), *more)
    try:
        trainer.run(checkpoints.load(), callbacks)
    finally:
        checkpoints.close()
    return trainer, best


def _list_adapters(experiment: Experiment, models: Adapters) -> Iterator[tuple[str, PyTree]]:
    """Yield everybody's name and adapter, on the host."""
    clients = experiment.examples.clients
    for numbers, adapters in each_model(models, len(clients), experiment.layout.wave):
        held = fetch(adapters)
        for place, number in enumerate(numbers):
            yield clients[number].name, jax.tree.map(lambda leaf, place=place: leaf[place], held)


def _note_places(run: Run, stored: StoredConfig) -> None:
    """Keep where data and model are now."""
    assert run.out is not None
    here = {name: to_json(run)[name] for name in ("model", "data")}
    if processes.is_first() and here != {name: stored.content["run"][name] for name in here}:
        write_json(run.out / "config.json", seal({**stored.content, "run": {**stored.content["run"], **here}}))


def _write_config(experiment: Experiment) -> None:
    """Write the record of the start, which a resumed run keeps."""
    file = experiment.folder / "config.json"
    if processes.is_first() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, seal(describe_start(experiment, find_programs(experiment).method)))
    processes.wait_for_all()
    if not file.exists():
        raise UserError(
            f"process {jax.process_index()} does not see {file}, which process 0 wrote: the run's folder must be on a "
            "disk that all processes share; choose it with --out"
        )
    if processes.count() > 1:  # each reads data and model from what it takes for the same place
        then, now = read_config(file.parent).content["fingerprint"], experiment.data.fingerprint
        fingerprints.compare_sources(file.parent, experiment.run, then, now)
        fingerprints.compare_given(file.parent, experiment.run, then)
        fingerprints.compare_clients(file.parent, then["clients"], now["clients"])
