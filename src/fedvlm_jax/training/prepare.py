"""From options to everything a run needs: model, data, cached features, mesh, programs.

A `Session` holds what the runs of a comparison have in common (the base on the devices, image features, compiled
programs), so that the second run starts at once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fedvlm_jax import lora
from fedvlm_jax.config.method_options import check_rule
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.federated_dataset import Federation
from fedvlm_jax.data.partitioning.federate import federate
from fedvlm_jax.data.skipped_rows import count_reasons, describe_lost
from fedvlm_jax.data.sources.registry import read_table
from fedvlm_jax.data.tokenization import Examples, encode, require_pairs
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.mesh_shape import parse_mesh
from fedvlm_jax.distributed.sharding import connect, make_mesh, refuse_split_groups
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.evaluator import Evaluator, make_answer
from fedvlm_jax.evaluation.knn_per import Neighbours, make_neighbours
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.inputs.batch_reader import Inputs, make_blank_inputs, make_inputs
from fedvlm_jax.federation.inputs.feature_cache import is_vision_frozen
from fedvlm_jax.federation.inputs.reference_log_probs import add_reference
from fedvlm_jax.federation.participation import ParticipationOptions
from fedvlm_jax.federation.simulator import Simulator, start_adapter
from fedvlm_jax.methods.config import LocalOptions, ServerOptions
from fedvlm_jax.models import Vlm, load_weights, open_model, resolve_folder
from fedvlm_jax.objectives import Objective, load_objective
from fedvlm_jax.run_dir.fingerprints import describe_sources
from fedvlm_jax.training.answer_generation import Answering, check_room, plan_answers
from fedvlm_jax.training.progress import Progress
from fedvlm_jax.training.round_setup import build_programs, choose_arithmetic, deal_ranks, lay_out_sizes
from fedvlm_jax.training.session import Note, Session, choose_store, reference_of
from fedvlm_jax.utils.random_streams import Stream

MANY, SOME = 128, 64
"""Of more than so many clients only some are evaluated, unless the options say how many."""


@dataclass(frozen=True)
class Experiment:
    """Everything one run needs.

    Attributes:
        run: its options.
        session: what it shares with others.
        objective: what its clients minimise.
        federation, examples, inputs: its clients and their data.
        blank: as `inputs` but for the pictures, which are not looked at.
        spec, adapter: the adapter's form, and the one that all methods start from.
        layout: the shapes of its rounds.
        key: decides everything drawn on devices.
        evaluator: scores clients.
        answering: how answers are generated.
        neighbours: what asking them takes, where the options ask for them.
    """

    run: Run
    session: Session
    objective: Objective
    federation: Federation
    examples: Examples
    inputs: Inputs
    blank: Inputs
    spec: lora.LoRA
    adapter: lora.Adapter
    layout: Layout
    key: Any
    evaluator: Evaluator
    answering: Answering
    neighbours: Neighbours | None

    @property
    def participants(self) -> list[int]:
        """Numbers of the clients that are not held out; those without training examples are never drawn."""
        return [number for number, client in enumerate(self.examples.clients) if not client.held_out]

    @property
    def held_out(self) -> list[int]:
        """Numbers of the clients that never do."""
        return [number for number, client in enumerate(self.examples.clients) if client.held_out]

    @property
    def scored(self) -> list[int]:
        """Numbers of the clients that train whose models are evaluated."""
        return self._sample(self.participants)

    @property
    def scored_newcomers(self) -> list[int]:
        """The same of those that never do."""
        return self._sample(self.held_out)

    def _sample(self, numbers: list[int]) -> list[int]:
        """All, or as many as the options say, drawn by the seed alone."""
        asked = self.run.evaluation.clients
        count = asked if asked is not None else len(numbers) if len(numbers) <= MANY else SOME
        rng = np.random.default_rng([Stream.EVALUATED, self.run.seed])
        return numbers if count >= len(numbers) else sorted(rng.choice(numbers, count, replace=False).tolist())

    @property
    def select_by(self) -> str:
        """The metric by which the best round is chosen."""
        return self.run.evaluation.select_by or self.objective.select_by


def open_session(
    run: Run, note: Note = lambda text: None, check: Callable[[Mapping[str, Any]], None] = lambda sources: None
) -> Session:
    """Load the model and open the data.

    Args:
        run: names both.
        note: where to report.
        check: judges the digests of their files before weights are read.

    Raises:
        UserError: files are missing or do not fit, there are fewer devices than asked for, or no weight can be cut.
    """
    table = read_table(run.data)  # first: it is quick to fail
    if load_objective(run.objective, run.preference).pairs:
        require_pairs(table)
    mesh = make_mesh(*(parse_mesh(run.system.mesh) or ()))
    refuse_split_groups(mesh)
    if processes.count() > 1:
        processes.wait_for_all()
        connect(mesh)
    vlm, processor = open_model(run.model, **choose_arithmetic(run.system))
    check_room(run, vlm)
    check_rule(run, vlm)  # before gigabytes are read
    folder = resolve_folder(run.model)
    sources = describe_sources(table, folder)
    check(sources)
    note(f"loading {run.model}")
    params = load_weights(vlm, folder, mesh=mesh)
    return Session(vlm, params, processor, mesh, table, sources)


def prepare(run: Run, session: Session, note: Note = lambda text: None) -> Experiment:
    """Cut the data into clients, tokenise, compute what is frozen, and lay out the rounds.

    Raises:
        UserError: data, targets, ranks or sizes that cannot work; each with what to change.
    """
    check_room(run, session.vlm)
    spec = make_spec(run, session.vlm)
    key = jax.random.key(run.seed)
    adapter = start_adapter(key, session.vlm.sites, spec)
    if run.lora.targets and (dead := lora.find_dead_targets(session.vlm.sites, run.lora.targets)):
        note(f"--lora.targets: {', '.join(dead)} match no weight of {run.model}; the others have adapters")
    objective = load_objective(run.objective, run.preference)
    federation = session.remember(
        ("federation", run.data, run.seed), lambda: federate(session.table, run.data, run.seed)
    )
    data_key = ("data", run.data, run.seed, objective.pairs)
    options = _fit_to_model(run, session.vlm)
    examples = session.remember(
        ("examples", *data_key, options),
        lambda: encode(session.table, federation, session.processor, options, pairs=objective.pairs),
    )
    clients = examples.clients
    note(f"{len(clients)} clients, {sum(len(c.train) for c in clients)} training examples")
    if examples.skipped:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in count_reasons(examples.skipped).items())
        lost = describe_lost(session.table, examples.skipped)
        note(f"left out: {reasons} (listed in the run's config.json). {lost}".rstrip())
    if examples.truncated:
        note(f"{examples.truncated} answers cut to {options.max_answer_tokens} tokens")
    if objective.pairs and examples.rejected_truncated:
        note(f"{examples.rejected_truncated} rejected answers cut to {options.max_answer_tokens} tokens")
    store = choose_store(run, session, examples.images, note) if is_vision_frozen(session.vlm, adapter) else None
    inputs, blank = (make(examples, session.processor, store) for make in (make_inputs, make_blank_inputs))
    trainable = sum(not client.held_out and len(client.train) > 0 for client in clients)
    if not trainable:
        raise UserError(f"none of the {len(clients)} clients has a training example, so there is nothing to train on")
    if run.cohort is not None and run.cohort > trainable:
        raise UserError(f"--cohort {run.cohort}: there are only {trainable} clients that train")
    if objective.reference:
        on_disk = run.system.cache == "disk" or (store is not None and store.on_disk)
        reference = session.remember(
            ("reference", *data_key), lambda: reference_of(run, session, examples, inputs, on_disk, note)
        )
        inputs, blank = add_reference(inputs, reference), add_reference(blank, reference)
    layout = lay_out(run, examples, session.mesh, run.cohort, run.system.wave)
    asked = (run.evaluation.neighbours, run.evaluation.neighbour_temperature) if run.evaluation.neighbours else None
    neighbours = asked and session.remember(("neighbours", *asked), lambda: make_neighbours(session.vlm, *asked))
    answering = session.remember(
        ("gold", *data_key, run.evaluation.decoding, run.evaluation.max_answer_tokens, run.evaluation.splits),
        lambda: plan_answers(run, session.vlm, examples, session.processor, options.max_answer_tokens),
    )
    answering.tell(note)
    answer = session.remember(
        ("answer", answering.gold.budget, run.evaluation.decoding, asked),
        lambda: make_answer(neighbours.vlm if neighbours else session.vlm, answering.gold.budget, answering.options),
    )
    evaluator = Evaluator(
        examples=examples,
        inputs=inputs,
        processor=session.processor,
        wave=layout.wave,
        batch=run.evaluation.batch_size,
        mesh=session.mesh,
        answer=answer,
        gold=answering.gold.all,
        metrics=run.evaluation.metrics,
        beta=run.preference.beta,
        base=session.remember(("numbers of the base", *data_key), dict),
    )
    return Experiment(
        run=run,
        session=session,
        objective=objective,
        federation=federation,
        examples=examples,
        inputs=inputs,
        blank=blank,
        spec=spec,
        adapter=adapter,
        layout=layout,
        key=key,
        evaluator=evaluator,
        answering=answering,
        neighbours=neighbours,
    )


def make_simulator(
    experiment: Experiment,
    method: str,
    *,
    cohort: int | None,
    go_on: tuple[lora.Adapter, Any] | None = None,
    file: Path | None = None,
) -> Simulator:
    """Start a federation with a method.

    Args:
        experiment: the run.
        method: its name.
        cohort: clients a round; None means everybody.
        go_on: for fine-tuning after a federation: an adapter of the form that it ended with, and its base. What the
            options say of ranks, the server, proximal terms, participation and epochs was the federation's.
        file: where the personal states are; a temporary file by default.

    Raises:
        UserError: options that the method cannot work with.
    """
    run, session = experiment.run, experiment.session
    train, clients = run.train, len(experiment.examples.clients)
    common = run.lora.private_a == "common" or go_on is not None
    layout = lay_out(run, experiment.examples, session.mesh, cohort, experiment.layout.wave)
    dealt = () if go_on else run.lora.ranks
    ranks = deal_ranks(dealt, clients)
    local, server = (run.local, run.server) if go_on is None else (LocalOptions(), ServerOptions())
    goal = (run.objective, run.preference, train.optimizer, train.weight_decay, train.clip_norm, train.optimizer_state)
    shape = (clients, layout.cohort, layout.places, layout.steps, train.rounds, ranks)
    static = (method, common, run.lora, *goal, *shape, run.method_options)

    def make() -> Programs:
        return build_programs(
            run,
            method,
            session.vlm,
            experiment.objective,
            session.mesh,
            population=clients,
            layout=layout,
            ranks=ranks,
            common_start=common,
            local=local,
            server=server,
        )

    programs = session.remember(("programs", *static, local, server), make)
    return Simulator(
        programs=programs,
        params=go_on[1] if go_on else session.params,
        examples=experiment.examples,
        inputs=experiment.inputs,
        layout=layout,
        seed=run.seed,
        key=experiment.key,
        weighting=train.weighting,
        server=programs.method.init(adapter=go_on[0] if go_on else experiment.adapter),
        ranks=ranks,
        participation=run.participation if go_on is None else ParticipationOptions(),
        epochs=train.local_epochs if go_on is None else None,
        file=file,
    )


def show_evaluation(experiment: Experiment, show: Progress) -> Experiment:
    """The same, with an evaluator that shows how far it is."""
    return dataclasses.replace(experiment, evaluator=dataclasses.replace(experiment.evaluator, advance=show.advance))


def _fit_to_model(run: Run, vlm: Vlm) -> DataOptions:
    """Longer prompts than the model has positions are left out, longer answers are cut; both are counted."""
    data, answer = run.data, min(run.data.max_answer_tokens, vlm.positions)
    prompt = vlm.most_prompt_tokens(max(answer, run.evaluation.max_answer_tokens or 0))
    return data.replace(max_prompt_tokens=min(data.max_prompt_tokens, prompt), max_answer_tokens=answer)


def lay_out(run: Run, examples: Examples, mesh: Mesh, cohort: int | None, wave: int | None) -> Layout:
    """The shapes of a run's rounds with so many clients each, so many of them side by side."""
    sizes = [len(client.train) for client in examples.clients if not client.held_out and len(client.train)]
    return lay_out_sizes(run, sizes, mesh, cohort, wave)
