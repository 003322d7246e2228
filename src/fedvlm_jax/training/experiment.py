"""One run over federated data: from its options to what its rounds and evaluations need."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from fedvlm_jax import lora
from fedvlm_jax.config.method_checks import list_left_out
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.config.option_checks import check_pool_size
from fedvlm_jax.config.run_options import Run, without_extras
from fedvlm_jax.config.start_folder import continue_from, name_other_base, read_start
from fedvlm_jax.data.classes import count_ambiguous, describe_ambiguous, describe_classes, find_novel, find_own
from fedvlm_jax.data.federated_dataset import describe_lost, list_reasons
from fedvlm_jax.data.picture_views import Views
from fedvlm_jax.data.tokenization import Examples, find_question_column
from fedvlm_jax.distributed import processes
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.evaluation.answer_generation import Answering
from fedvlm_jax.evaluation.evaluator import Evaluator, Reward
from fedvlm_jax.evaluation.knn_per import Neighbours
from fedvlm_jax.evaluation.reward_tables import RewardTables, make_reward_tables
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.inputs.batch_reader import Inputs, add_questions, make_blank_inputs, make_inputs
from fedvlm_jax.federation.inputs.feature_cache import GIB, FeatureStore, is_vision_frozen
from fedvlm_jax.federation.inputs.poisoned_rows import (
    Backdoor,
    flip_labels,
    mark_pictures,
    open_backdoor,
    plan_backdoor,
)
from fedvlm_jax.federation.inputs.reference_log_probs import Reference, add_reference
from fedvlm_jax.federation.simulator import Simulator, start_adapter
from fedvlm_jax.messages.attacks import OF_MESSAGES, draw_attackers
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods.config import LocalOptions, MethodOptions, ServerOptions
from fedvlm_jax.objectives import Objective, load_objective
from fedvlm_jax.objectives.reward import find_frame, judge_answers
from fedvlm_jax.privacy.budget import Budget, describe_budget, draw_secret, settle
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.training.federated_data import BaseScoring, FederatedData, open_data
from fedvlm_jax.training.loaded_model import LoadedModel
from fedvlm_jax.training.round_setup import (
    check_frozen,
    check_room,
    choose_program_options,
    deal_ranks,
    lay_out_sizes,
)
from fedvlm_jax.utils.memoized import memoized
from fedvlm_jax.utils.progress import Progress, SilentProgress
from fedvlm_jax.utils.random_streams import Stream

MANY, SOME = 128, 64
"""Of more than `MANY` clients only `SOME` are evaluated, unless the options say how many."""
IN_MEMORY = 2 * GIB
"""More image features than this go to disk, unless the options say where they are kept."""
FINETUNING = "local"
"""The method of the local steps after a federation."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """One run, with its data and the adapter that all methods start from.

    Attributes:
        run: the options; with differential privacy the noise is settled in them, and rounds beyond its ε are left out.
        data: the clients and the model, shared with other runs.
        adapter: the one to start from; a federation's is drawn by the seed alone.
        show: receives the run's progress.
        wave: clients side by side, once it is known what fits on a device; before that, what the options say.
        budget: what was settled; None without differential privacy.
        asked: the options as they were given, where something was settled.
    """

    run: Run
    data: FederatedData
    adapter: lora.Adapter
    show: Progress = field(default_factory=SilentProgress)
    wave: int | None = None
    budget: Budget | None = None
    asked: Run | None = None

    @property
    def model(self) -> LoadedModel:
        """Return the model under the data."""
        return self.data.model

    @property
    def examples(self) -> Examples:
        """Return the clients with their tokenised examples."""
        return self.data.examples

    @property
    def folder(self) -> Path:
        """Return the run's folder, which a run that trains has."""
        assert self.run.out is not None
        return self.run.out

    @property
    def spec(self) -> lora.LoRA:
        """Return the adapter's form."""
        return make_spec(self.run, self.model.vlm)

    @cached_property
    def objective(self) -> Objective:
        """Load what the clients minimise."""
        return load_objective(self.run.objective, self.run.preference)

    @property
    def select_by(self) -> str:
        """Return the metric by which the best round is chosen."""
        return self.run.evaluation.select_by or self.objective.select_by

    @property
    def scored(self) -> list[int]:
        """List the clients that may train whose models are evaluated."""
        return self._sample(held_out=False)

    @cached_property
    def attackers(self) -> tuple[int, ...]:
        """Draw the clients that are hostile, or would be if there were an attack."""
        numbers = np.flatnonzero([client.trains for client in self.examples.clients])
        return draw_attackers(self.run.seed, numbers, min(self.run.participation.attackers, len(numbers)))

    @property
    def judged(self) -> list[int]:
        """List those of the scored clients that are not hostile: what a run is worth is what these get."""
        return [number for number in self.scored if number not in self.attackers]

    @property
    def scored_newcomers(self) -> list[int]:
        """List the held-out clients whose models are evaluated."""
        return self._sample(held_out=True)

    def _sample(self, *, held_out: bool) -> list[int]:
        numbers = [number for number, client in enumerate(self.examples.clients) if client.held_out == held_out]
        asked = self.run.evaluation.clients
        count = asked if asked is not None else len(numbers) if len(numbers) <= MANY else SOME
        rng = np.random.default_rng([Stream.EVALUATED, self.run.seed])  # so that all methods are scored on the same
        return numbers if count >= len(numbers) else sorted(rng.choice(numbers, count, replace=False).tolist())

    @cached_property
    def store(self) -> FeatureStore | None:
        """Open where image features are kept; None where the adapter changes them or the options keep none.

        Pictures on grids of their own are read as features always: where none are kept, each is computed every time.
        """
        model, system = self.model, self.run.system
        if system.cache == "off" and model.processor.grids is not None:
            return model.feature_store(0, False, None)
        if system.cache == "off" or not is_vision_frozen(model.vlm, self.adapter):
            return None
        limit = int(system.cache_gib * GIB)
        on_disk = system.cache == "disk"
        store = model.feature_store(limit, on_disk, system.cache_dir if on_disk else None)
        # What a picture takes is known by a store; one in memory that stays empty costs nothing.
        if system.cache == "auto" and store.count_bytes(self.examples.views).sum() > IN_MEMORY:
            store = model.feature_store(limit, True, system.cache_dir)
        return store

    def find_reference(self) -> Reference:
        """Compute the bare base's log-probabilities of all answers, once for all runs on these data."""
        system, store = self.run.system, self.store
        on_disk = system.cache == "disk" or (store is not None and store.on_disk)
        inputs, batch = make_inputs(self.examples, self.model.processor, store), self.run.evaluation.batch_size
        place = system.cache_dir if on_disk else None
        return self.data.reference(batch, on_disk, place, store is None, inputs=inputs, note=self.show.note)

    @cached_property
    def inputs(self) -> Inputs:
        """Make the function from rows to batches."""
        return self._add_columns(make_inputs(self.examples, self.model.processor, self.store))

    @cached_property
    def marked_inputs(self) -> Inputs:
        """Make the inputs of rows with a backdoor's mark on their pictures."""
        return make_inputs(mark_pictures(self.examples), self.model.processor, self.store)

    @cached_property
    def backdoor(self) -> Backdoor | None:
        """Choose the rows and the answer of a backdoor; None where the attack is another."""
        if self.run.participation.attack != "backdoor":
            return None
        return plan_backdoor(self.examples, self.attackers, self.run.seed)

    @property
    def trained_inputs(self) -> Inputs:
        """Return what clients train on: the inputs, but for those of hostile clients.

        Raises:
            UserError: the attack has nothing to choose from.
        """
        if self.backdoor is not None:
            return open_backdoor(self.inputs, self.marked_inputs, self.examples, self.backdoor)
        if self.run.participation.attack == "label-flip":
            return flip_labels(self.inputs, self.examples, self.attackers, self.run.seed)
        return self.inputs

    @cached_property
    def blank_inputs(self) -> Inputs:
        """Make the same but for the pictures, which are not looked at."""
        return self._add_columns(make_blank_inputs(self.examples, self.model.processor, self.store))

    def _add_columns(self, inputs: Inputs) -> Inputs:
        """Put what the objective reads of a row beside its tokens."""
        if (questions := self.reward_tables.questions) is not None:
            return add_questions(inputs, questions)
        return add_reference(inputs, self.find_reference()) if self.objective.reference else inputs

    @cached_property
    def layout(self) -> Layout:
        """Choose the shapes of the federation's rounds.

        Raises:
            UserError: a round would take more rows than a computer can list.
        """
        sizes = [len(client.train) for client in self.examples.clients if client.trains]
        return lay_out_sizes(self.run, sizes, self.model.mesh, self.run.cohort, self.wave or self.run.system.wave)

    @property
    def answering(self) -> Answering:
        """Return how answers are generated."""
        options = self.run.evaluation
        most = options.max_answer_tokens or self.data.fitted.max_answer_tokens
        return self.data.answering(options.decoding, most, options.splits)

    @property
    def neighbours(self) -> Neighbours | None:
        """Return the programs of nearest neighbours, where the options ask for them."""
        options = self.run.evaluation
        asked = options.neighbours
        return self.model.neighbours(asked, options.neighbour_temperature) if asked else None

    @property
    def base_scoring(self) -> BaseScoring:
        """Return what decides the bare base's scores."""
        # What is only reported of a run's models changes nothing of the base's answers: the baseline run leaves it out.
        evaluation = replace(without_extras(self.run).evaluation, examples=0, cross_clients=False)
        return BaseScoring(evaluation, self.run.preference, pixels=self.store is None)

    @cached_property
    def reward_tables(self) -> RewardTables:
        """Make what the objective's rewards read beside an example.

        Raises:
            UserError: the file of rewards cannot be used.
        """
        if not self.objective.samples:
            return RewardTables({})
        table, most = self.data.table, max(self.data.fitted.max_answer_tokens, self.answering.gold.budget)
        asked = table.read_stripped(find_question_column(table, self.data.options), self.examples.rows)
        frame = find_frame(self.model.vlm.settings())
        return make_reward_tables(self.run.preference, self.examples, asked, self.model.processor, frame, most)

    @property
    def judge(self) -> Reward | None:
        """Return what rewards answers, where the objective trains for that."""
        if not self.objective.samples:
            return None
        options, settings, labels = self.run.preference, self.model.vlm.settings(), self.examples.labels
        tables, questions, _ = self.reward_tables

        def judge(ids: np.ndarray, rows: np.ndarray, client: int) -> np.ndarray:
            of_rows = {} if questions is None else {"reward_question": questions[rows]}
            return judge_answers(options, settings, ids, labels[rows], client, tables | of_rows)

        return judge

    @cached_property
    def evaluator(self) -> Evaluator:
        """Make what scores clients."""
        model, options, gold = self.model, self.run.evaluation, self.answering.gold
        agreed = {"own": self.run.data.agreed_classes, "novel": self.run.data.agreed_novel}
        asked = (options.neighbours, options.neighbour_temperature) if options.neighbours else (0, 0.0)
        return Evaluator(
            examples=self.examples,
            inputs=self.inputs,
            processor=model.processor,
            wave=self.layout.wave,
            batch=options.batch_size,
            mesh=model.mesh,
            answer=model.answer_program(gold.budget, options.decoding, *asked),
            gold=gold.all,
            metrics=options.metrics,
            novel=find_novel(self.examples, agreed["own"]) if model.vlm.classes else None,
            own=find_own(self.examples) if model.vlm.classes else None,
            elsewhere=frozenset(kind for kind, classes in agreed.items() if classes),
            beta=self.run.preference.beta,
            reward=self.judge,
            base=self.data.base_numbers(self.base_scoring),
            advance=self.show.advance,
        )


def open_experiment(
    run: Run, model: LoadedModel, show: Progress | None = None, *, reference: bool = True, budget: Budget | None = None
) -> Experiment:
    """Cut the data into clients, tokenise, compute what is frozen, and lay out the rounds.

    Without `reference` the bare base's log-probabilities, which objectives may need, are left until they are asked for.
    `budget` is that of a run that has begun.

    Raises:
        UserError: data, targets, ranks or sizes that cannot work; each with what to change.
    """
    show = show or SilentProgress()
    check_room(run, model.vlm)  # the model may have been loaded for another run
    if model.processor.grids is not None:
        check_frozen(run, model.vlm, "--image-pixels")
    adapter = start_adapter(jax.random.key(run.seed), model.vlm.sites, make_spec(run, model.vlm))
    if run.start is not None:
        found = read_start(run.start, run.model, model.vlm)
        if other := name_other_base(found, run.model):
            show.note(f"{run.start} says that it was trained on {other}; its shapes fit {run.model}")
        adapter = continue_from(adapter, found.adapter)
    if run.lora.targets and (dead := lora.find_dead_targets(model.vlm.sites, run.lora.targets)):
        show.note(f"--lora.targets: {', '.join(dead)} match no weight of {run.model}; the others have adapters")
    experiment = Experiment(run, open_data(model, run), adapter, show)
    if experiment.objective.samples and model.vlm.bind is not None:
        raise UserError(
            f"--objective {run.objective} draws answers token by token, and {run.model} chooses among classes: use sft"
        )
    examples, clients = experiment.examples, experiment.examples.clients
    show.note(
        f"{format_count(len(clients), 'client')}, "
        f"{format_count(sum(len(c.train) for c in clients), 'training example')}"
    )
    trainable = sum(client.trains for client in clients)
    if run.privacy.on and trainable:
        if budget is None:
            budget = settle(run.privacy, trainable, run.cohort, run.train.rounds)
            budget = replace(budget, secret=processes.tell_all(draw_secret) if run.privacy.secret else "")
        show.note(describe_budget(budget, run.train.rounds))
        if not budget.secret:
            show.note(f"noise and draws come from --seed {run.seed}: for what is to be released add --privacy.secret")
        experiment = replace(experiment, run=keep_within(run, budget), budget=budget, asked=run)
    for sentence in list_left_out(experiment.run):
        show.note(sentence)
    most = examples.view.shape[1]
    if (tokens := examples.image_tokens) is not None:
        show.note(f"prompts have up to {format_count(most, 'picture')}, {format_count(tokens, 'image token')}")
    elif most > 1:
        tokens = most * model.processor.image_tokens
        show.note(f"prompts have up to {most} pictures and tiles, {tokens:,} image tokens")
    if experiment.model.learner is not None:
        show.note(describe_classes(experiment.model.learner.classes, experiment.model.vlm.classes))
        if pictures := count_ambiguous(examples):
            show.note(describe_ambiguous(pictures))
    if examples.skipped:
        lost = describe_lost(experiment.data.table, examples.skipped)
        show.note(f"left out: {list_reasons(examples.skipped)} (listed in the run's config.json). {lost}".rstrip())
    cut = f"answers cut to {format_count(experiment.data.fitted.max_answer_tokens, 'token')}"
    if examples.truncated:
        show.note(f"{examples.truncated} {cut}")
    if experiment.data.pairs and examples.rejected_truncated:
        show.note(f"{examples.rejected_truncated} rejected {cut}")
    if experiment.store is not None:
        _announce(model, examples.views.keys, views=examples.views, store=experiment.store, note=show.note)
    if not trainable:
        raise UserError(
            f"none of the {format_count(len(clients), 'client')} has a training example, so there is "
            "nothing to train on"
        )
    if run.cohort is not None and run.cohort > trainable:
        raise UserError(f"--cohort {run.cohort}: {format_count(trainable, 'client trains', 'clients train')} at most")
    if run.participation.attackers >= trainable:
        raise UserError(
            f"--participation.attackers {run.participation.attackers}: there are {trainable} clients that train, and "
            "somebody has to be left whose model counts"
        )
    check_pool_size(run.messages, min(run.cohort or trainable, trainable))
    if not experiment.judged:
        raise UserError("--evaluation.clients: all that would be scored are hostile, and scores leave these out")
    if note := experiment.reward_tables.note:  # refuses a file before anything is computed
        show.note(note)
    if reference and experiment.objective.reference:
        experiment.find_reference()  # takes long and reports, so it is no part of the first round
    _ = experiment.layout  # refuses rounds of too many rows
    for text in experiment.answering.explain(chosen=experiment.model.learner is not None):
        show.note(text)
    return experiment


def keep_within(run: Run, budget: Budget) -> Run:
    """Put what was settled into a run's options: its noise, and the rounds that its ε allows."""
    privacy, train = replace(run.privacy, noise=budget.noise), replace(run.train, rounds=budget.rounds)
    return replace(run, privacy=privacy, train=train)


@memoized
def _announce(
    model: LoadedModel, keys: tuple[str, ...], /, *, views: Views, store: FeatureStore, note: Callable[[str], None]
) -> None:
    """Say what keeping these views' features takes, once for all runs of a model."""
    note(store.announce(views))


def find_programs(experiment: Experiment) -> Programs:
    """Find the programs of a run's method, which runs of one model share.

    Raises:
        UserError: options that the method cannot work with.
    """
    clients, layout = experiment.examples.clients, experiment.layout
    trainable = sum(client.trains for client in clients)
    options = choose_program_options(experiment.run)
    return experiment.model.programs(options, len(clients), layout.cohort, layout.places, layout.steps, trainable)


def make_simulator(experiment: Experiment, file: Path | None = None) -> Simulator:
    """Start the federation of a run; personal states are kept in `file`, a temporary one by default.

    Raises:
        UserError: options that the method cannot work with.
    """
    run, layout, clients = experiment.run, experiment.layout, len(experiment.examples.clients)
    budget = experiment.budget if run.privacy.on else None  # none in the fine-tuning after a federation
    secret, programs = "" if budget is None else budget.secret, find_programs(experiment)
    return Simulator(
        programs=programs,
        params=experiment.model.params,
        examples=experiment.examples,
        inputs=experiment.trained_inputs,
        layout=layout,
        seed=run.seed,
        key=_make_key(run.seed, secret),
        secret=secret,
        weighting="uniform" if budget else run.train.weighting,  # as the pool has it
        sampling=budget.drawn if budget else None,
        server=programs.method.init(adapter=experiment.adapter),
        ranks=deal_ranks(run.lora.ranks, clients),
        participation=run.participation,
        hostile=experiment.attackers if run.participation.attack in OF_MESSAGES else (),
        epochs=run.train.local_epochs,
        tables=experiment.reward_tables.arrays or None,
        file=file,
    )


def shape_messages(experiment: Experiment, rounds: Iterable[int]) -> dict[int, PyTree]:
    """Find the shapes of a client's message in each of these rounds; nothing is computed and no picture is read."""
    simulator, by_phase = make_simulator(experiment), dict[int, PyTree]()
    simulator.inputs = experiment.blank_inputs
    found = dict[int, PyTree]()
    for round_ in rounds:
        phase = simulator.phase_of(round_)
        if phase not in by_phase:
            by_phase[phase] = simulator.find_messages(simulator.read_round(round_))
        found[round_] = by_phase[phase]
    return found


def _make_key(seed: int, secret: str) -> PRNGKeyArray:
    """Make a run's key, of its seed and of 32 bits of its secret after another."""
    key = jax.random.key(seed)
    for place in range(0, len(secret), 8):
        key = jax.random.fold_in(key, int(secret[place : place + 8], 16))
    return key


def make_finetuner(experiment: Experiment, adapter: lora.Adapter, params: PyTree, file: Path) -> Simulator:
    """Start local fine-tuning of adapters of this form on the base that the federation ended with.

    What the options say of ranks, the server, proximal terms, participation and epochs was the federation's.

    Raises:
        UserError: options that local training cannot work with.
    """
    run = replace(
        experiment.run,
        method=FINETUNING,
        method_options=MethodOptions(),
        cohort=None,
        lora=replace(experiment.run.lora, ranks=(), private_a="common"),
        local=LocalOptions(),
        server=ServerOptions(),
        participation=ParticipationOptions(),
        messages=MessageOptions(),
        privacy=PrivacyOptions(),
    )
    alone = replace(experiment, run=run, adapter=adapter, wave=experiment.layout.wave)
    simulator = make_simulator(alone, file)
    simulator.params, simulator.epochs = params, None
    return simulator
