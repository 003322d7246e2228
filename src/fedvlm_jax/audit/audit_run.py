"""`fedvlm audit`: attacks on the messages that a finished run kept, client by client, and what came out as JSON.

A client's members are the rows that its local steps read in the rounds that are audited; its others are rows of its
test split, which no client trained on and by which no round was chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.audit import reconstruction
from fedvlm_jax.audit.attacker import Attacker, Known, list_known
from fedvlm_jax.audit.candidates import Batches, Rows, choose_clients, choose_rounds, draw_rows, read_batches
from fedvlm_jax.audit.epsilon import bound_run
from fedvlm_jax.audit.summaries import MembershipScores, SpanScores
from fedvlm_jax.data.batches import pad_rows
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.simulator import Simulator
from fedvlm_jax.methods.components.factors import leaf_name
from fedvlm_jax.run_dir import kept_messages
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.kept_messages import KeptRound
from fedvlm_jax.run_dir.reader import RunRecord, read_finished, read_run
from fedvlm_jax.run_dir.validated_files import StoredConfig
from fedvlm_jax.training.evaluate import FinishedRun, open_finished
from fedvlm_jax.training.experiment import Experiment, make_simulator, shape_messages
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress import Progress, SilentProgress, working
from fedvlm_jax.utils.random_streams import Stream

NAME = "audit.json"
VERSION = 1
LOSS, PROJECTION, SPAN, BASE = "loss", "projection", "span", "base"
"""Tests: by the loss that a message takes off a row, by its product with the row's gradient, by the inputs that are in
its span; and by the loss of the bare base, which no message has touched: where that tells members from others, the two
are not alike."""


@dataclass(frozen=True)
class AuditChoices:
    """How much is looked at.

    Attributes:
        rounds: rounds, evenly spread over those that were kept, the first and the last among them.
        clients: clients, drawn by the seed.
        candidates: members and others of a client, so many of each at most, drawn by the seed.
        others: the split of the rows that were not trained on.
        canaries: for the lower bound on ε.
    """

    rounds: int = 8
    clients: int = 32
    candidates: int = 128
    others: Literal["test", "validation"] = "test"
    canaries: int = 256


def audit(folder: Path, choices: AuditChoices = AuditChoices(), show: Progress | None = None) -> dict[str, Any]:
    """Attack the messages that a finished run kept; writes `audit.json` into its folder and returns it.

    Raises:
        UserError: the run is not finished or kept no messages, a file is damaged, or data, model or options are not
            those of the run.
    """
    show = show or SilentProgress()
    stored, record, kept = open_kept(folder)
    kept_messages.check_rounds(folder, choose_rounds(kept, choices.rounds))  # before anything is loaded
    with Claim(folder):
        target = open_target(open_finished(folder, stored, show, scoring=False), kept, choices)
        found = attack(target, record, show)
        write_json(folder / NAME, found)
    return found


def open_kept(folder: Path) -> tuple[StoredConfig, RunRecord, list[int]]:
    """Read what a finished run says of itself and which rounds it kept; nothing is loaded.

    Raises:
        UserError: it is not finished, of another version, or kept none.
    """
    stored = read_finished(folder)
    return stored, read_run(folder), kept_messages.list_rounds(folder)


@dataclass(frozen=True, eq=False)
class Target:
    """A run under attack.

    Attributes:
        experiment, simulator: of the run; the simulator stands at its start.
        attacker: see `Attacker`.
        choices: how much is looked at.
        batches: round -> client -> the rows that its local steps read.
        clients: the numbers of those that are attacked.
        known: client -> what is known of its private factor, by attacker.
        kept: round -> what was kept of it.
    """

    experiment: Experiment
    simulator: Simulator
    attacker: Attacker
    choices: AuditChoices
    batches: Batches
    clients: list[int]
    known: Mapping[int, Known]
    kept: Mapping[int, KeptRound]

    @cached_property
    def names(self) -> list[str]:
        """Name the clients of the run."""
        return [client.name for client in self.experiment.examples.clients]

    def others_of(self, number: int) -> Rows:
        """List the rows of a client's that nobody trained on."""
        return self.experiment.examples.clients[number].rows_of(self.choices.others)

    def message_of(self, round_: int, number: int) -> PyTree | None:
        """Return what a client sent in a round; None where it did not count."""
        kept = self.kept[round_]
        place = np.flatnonzero(kept.numbers == number)
        return jax.tree.map(lambda leaf: leaf[place[0]], kept.messages) if len(place) else None


def open_target(finished: FinishedRun, kept: list[int], choices: AuditChoices) -> Target:
    """Read all that an audit attacks.

    Raises:
        UserError: a file is missing or damaged, or of a round or a client that the run had not.
    """
    experiment = finished.experiment
    if not 1 <= kept[0] <= kept[-1] <= experiment.run.train.rounds:
        raise UserError(
            f"{experiment.folder / kept_messages.FOLDER} lists rounds {kept[0]} to {kept[-1]}, and the run had 1 to "
            f"{experiment.run.train.rounds}: put it back from a copy, or train again"
        )
    simulator, rounds = make_simulator(experiment), choose_rounds(kept, choices.rounds)
    batches = read_batches(experiment, rounds)
    found = read_kept(experiment, rounds)
    for round_ in rounds:
        if not batches[round_].keys() >= set(found[round_].numbers.tolist()):
            file = experiment.folder / kept_messages.FOLDER / kept_messages.name_file(round_)
            raise UserError(
                f"{file} holds messages of clients that took no part in that round: put it back from a copy, or train "
                "again"
            )
    clients = choose_clients(batches, choices.clients, experiment.run.seed)
    method = simulator.programs.method
    shared = method.download(server=simulator.server)
    adapters = {
        number: jax.tree.map(lambda leaf: np.asarray(leaf)[0], finished.personal(np.asarray([number])))
        for number in clients
    }
    return Target(
        experiment,
        simulator,
        make_attacker(experiment),
        choices,
        batches,
        clients,
        {number: list_known(method, shared, adapters, number) for number in clients},
        found,
    )


def make_attacker(experiment: Experiment) -> Attacker:
    """Make the attacker of a run, who knows its code, its options and the base."""
    run, model = experiment.run, experiment.model
    if experiment.objective.samples:
        raise UserError(
            f"--objective {run.objective} draws answers anew in every step, so an example has no loss of its own that "
            "an attack could compare: audit a run of another objective"
        )
    common = replace(experiment, run=replace(run, lora=replace(run.lora, private_a="common")))
    return Attacker(
        vlm=model.learner or model.vlm,
        objective=experiment.objective,
        params=model.params,
        method=make_simulator(common).programs.method,
        inputs=experiment.inputs,
        batch=run.evaluation.batch_size,
    )


def read_kept(experiment: Experiment, rounds: list[int]) -> dict[int, KeptRound]:
    """Read rounds in the structure that the run's method has its messages and its server in.

    Raises:
        UserError: a file is missing, damaged or another method's.
    """
    server = make_simulator(experiment).server
    return {
        round_: kept_messages.read_round(experiment.folder, round_, message, server)
        for round_, message in shape_messages(experiment, rounds).items()
    }


def attack(target: Target, record: RunRecord, show: Progress) -> dict[str, Any]:
    """Attack all clients: -> the content of `audit.json`."""
    membership, spans = MembershipScores(), SpanScores()
    experiment, total = target.experiment, len(target.clients)
    rounds = format_count(len(target.kept), "round")
    text = f"attacking what {format_count(total, 'client')} sent in {rounds}, which compiles first"
    with working(show, text):
        for done, number in enumerate(target.clients, start=1):
            attack_client(target, number, membership, spans)
            show.advance(done, total, "clients")
    return {
        "version": VERSION,
        "method": record.method,
        "private_a": experiment.run.lora.private_a,
        "shares": describe_shared(target.simulator.programs.method.download(server=target.simulator.server)),
        "seed": experiment.run.seed,
        "rounds": list(target.kept),
        "clients": [target.names[number] for number in target.clients],
        "others": target.choices.others,
        "membership": membership.summarise(),
        "attribution": spans.summarise_rankings(),
        "reconstruction": spans.summarise_spans(),
        "epsilon": bound_run(experiment, target.simulator, target.choices.canaries, show),
    }


def attack_client(target: Target, number: int, membership: MembershipScores, spans: SpanScores) -> None:
    """Attack a client's messages with its rows: which were trained on, in which round, and what inputs they have."""
    batches, attacker = target.batches, target.attacker
    sent = {round_: target.message_of(round_, number) for round_ in target.kept}
    rounds = [round_ for round_, message in sent.items() if message is not None and number in batches[round_]]
    if not rounds:
        return
    rng = np.random.default_rng([Stream.CANDIDATES, target.experiment.run.seed, number])
    trained = np.unique(np.concatenate([batches[round_][number] for round_ in rounds]))
    members, others = (draw_rows(rng, rows, target.choices.candidates) for rows in (trained, target.others_of(number)))
    if not len(others):
        return
    rows, name, count = np.concatenate([members, others]), target.names[number], len(members)
    within = {round_: np.isin(rows, batches[round_][number]) for round_ in rounds}
    inputs = capture_candidates(target, rows, target.kept[rounds[0]].server, sent[rounds[0]])
    bases = reconstruction.find_bases(inputs)
    membership.add(BASE, "", name, -attacker.score_base(rows), count)
    for who, private in target.known[number].items():
        scores: dict[str, list[np.ndarray]] = {LOSS: [], PROJECTION: [], SPAN: []}
        for round_ in rounds:
            server, message = target.kept[round_].server, sent[round_]
            probed = attacker.probe(rows, server, message, private)
            nothing = jax.tree.map(np.zeros_like, message)
            found = reconstruction.find_spans(message, attacker.assemble_quickly(server, nothing, private))
            spans.add_captured(who, measure_round(found, inputs, within[round_], count))
            scores[LOSS].append(rank_last(probed.before - probed.after))
            scores[PROJECTION].append(rank_last(probed.aligned))
            scores[SPAN].append(reconstruction.rank_rows(found, bases))
        for test, by_round in scores.items():
            membership.add(test, who, name, np.mean(by_round, axis=0), count)
            for round_, of_round in zip(rounds, by_round, strict=True):
                spans.add_ranking(test, who, of_round, within[round_])


def rank_last(scores: np.ndarray) -> np.ndarray:
    """Put rows last whose score is no finite number: a message may be so large that a loss with it is none.

    >>> rank_last(np.asarray([0.5, np.nan, -np.inf])).tolist()
    [0.5, -1e+30, -1e+30]
    """
    return np.where(np.isfinite(scores), scores, -1e30)


def capture_candidates(target: Target, rows: Rows, server: PyTree, message: PyTree) -> reconstruction.Inputs:
    """Capture the layer inputs of candidates with what everybody knows: the server's state, and the start."""
    attacker = target.attacker
    adapter = attacker.assemble_quickly(server, jax.tree.map(np.zeros_like, message), None)
    params, parts = attacker.base_at(server), list[reconstruction.Inputs]()
    # Of one shape for all clients: what is done operation by operation is compiled so, too.
    for start in range(0, len(rows), attacker.batch):
        part = rows[start : start + attacker.batch]
        batch = attacker.inputs(pad_rows(part, attacker.batch))
        found = reconstruction.capture_inputs(attacker.vlm, params, adapter, batch)
        parts.append({layer: x[: len(part)] for layer, x in found.items()})
    return {layer: np.concatenate([part[layer] for part in parts]) for layer in parts[0]}


def measure_round(
    found: Mapping[reconstruction.Layer, np.ndarray], inputs: reconstruction.Inputs, within: np.ndarray, members: int
) -> reconstruction.Captured | None:
    """Compare a message's span on the rows of its batch, and on rows that were never trained on."""
    if not within.any():
        return None
    batch, others = (
        {layer: x[kept] for layer, x in inputs.items()} for kept in (within, np.arange(len(within)) >= members)
    )
    return reconstruction.measure_spans(found, batch, others)


def describe_shared(shared: PyTree) -> str:
    """Say which factors are shared.

    >>> describe_shared({"fc": {"a": 1, "b": 2}})
    'A and B'
    """
    names = "".join(sorted({leaf_name(path) for path in tree.flatten(shared)}))
    return {"a": "A", "b": "B", "ab": "A and B"}.get(names, "other factors")
