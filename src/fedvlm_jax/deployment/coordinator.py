"""The server of a deployment: it sends what the method broadcasts, aggregates what comes back, and sees no row.

It needs the base's configuration and neither weights nor data. Its folder is that of a run: options, a line per round,
checkpoints, what is shared, results and so a report. Who does not answer in time leaves no trace in a round, there or
at its node; a coordinator that is started again goes on from its last checkpoint.
"""

import math
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.config.method_checks import list_left_out
from fedvlm_jax.config.method_setup import make_spec
from fedvlm_jax.data.batches import count_steps
from fedvlm_jax.deployment.packets import Packet, SecureTransport, Transport
from fedvlm_jax.deployment.plan import SECURE, Plan
from fedvlm_jax.deployment.replies import (
    FINISHED,
    NO_SCORE,
    SCORED,
    Score,
    Trained,
    add_results,
    check_replies,
    join_results,
    mean_by_name,
    mean_scores,
    read_score,
    read_trained,
)
from fedvlm_jax.deployment.roll import Roll
from fedvlm_jax.deployment.server_folder import ServerFolder
from fedvlm_jax.deployment.server_program import ServerProgram, open_server_program
from fedvlm_jax.deployment.vectors import count_bytes, digest_schema, pack, unpack
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.participation import draw_cohort, find_shares
from fedvlm_jax.federation.simulator import start_adapter
from fedvlm_jax.models import resolve_folder
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.run_dir import metrics_lines
from fedvlm_jax.run_dir.fingerprints import describe_model
from fedvlm_jax.run_dir.folder_lock import Claim
from fedvlm_jax.run_dir.validated_files import AWAY
from fedvlm_jax.training.failures import UNFIT, describe_unfit, list_names
from fedvlm_jax.training.round_setup import MOST_ROWS
from fedvlm_jax.training.start_description import describe_adapter
from fedvlm_jax.utils.progress import Progress, working
from fedvlm_jax.utils.untrusted_text import clean, cut

HEADROOM = 1.25
"""The clip of a secure sum over the largest entry that a node says it sends."""
POLL, TELL = 0.5, 30.0
"""Seconds between two looks at who is there, and between two lines about who is missing."""


@dataclass
class Coordinator:
    """A deployment in progress.

    Attributes:
        plan, model: what is run, and where the base's configuration is.
        transport: to the nodes.
        show: receives progress.
        server: the server's state.
        best: the state of the round that did best on validation data, its number, and its score.
    """

    plan: Plan
    model: str
    transport: Transport
    folder: ServerFolder
    show: Progress
    program: ServerProgram
    roll: Roll
    server: PyTree
    best: tuple[PyTree, int, Score]
    last: dict[int, PyTree] = field(default_factory=dict)  # what each client sent last, where the method mixes

    def run(self) -> Path:
        """Run every round that is in no checkpoint, and have the nodes evaluate what comes of them.

        Raises:
            UserError: too few nodes come, two are the same client, or what is aggregated is not finite.
        """
        done, train = self._restore(), self.plan.run.train
        metrics_lines.drop_later(self.folder.path, done)
        if done:
            self.show.note(f"going on after round {done}")
            self._gather(range(self.plan.clients), "to go on", enough=self.plan.least)
        else:
            self._gather(range(self.plan.clients), "before the first round")
        self._check_least()
        for sentence in list_left_out(self.plan.run):
            self.show.note(sentence)
        vlm, steps = self.program.vlm, self._steps
        adapter = start_adapter(self.program.key, vlm.sites, make_spec(self.plan.run, vlm))
        described = describe_adapter(adapter, self.program.method, vlm, train, steps)
        self.folder.write_config(self.model, described, self.roll.members, steps)
        every = self.plan.run.evaluation.every
        validated = sum(self._is_validated(round_, every) for round_ in range(done + 1, train.rounds + 1))
        self.show.start(
            train.rounds, f"{self.plan.run.method} · {format_count(self.plan.clients, 'node')}", done, validated
        )
        for round_ in range(done + 1, train.rounds + 1):
            began = time.perf_counter()
            line = self._run_round(round_)
            line |= {"seconds": time.perf_counter() - began, "validation": None}
            if self._is_validated(round_, every):
                line["validation"] = self._validate(round_)
            metrics_lines.append(self.folder.path, line)
            self._save(round_)
            self.show.round(line)
        self._finish()
        self.show.finish()
        return self.folder.path

    @property
    def _steps(self) -> int:
        """Local steps of a round, those of the largest client where they go by epochs."""
        train, members = self.plan.run.train, self.roll.members.values()
        if train.local_epochs is None:
            return train.local_steps
        sizes = [member.sizes["train"] for member in members]
        steps = max((count_steps(size, train.local_epochs, train.batch_size) for size in sizes if size), default=1)
        return min(steps, MOST_ROWS)  # nodes make their own alone, and refuse what cannot be

    @property
    def _select_by(self) -> str:
        """The metric by which the best round is chosen."""
        return self.plan.run.evaluation.select_by or load_objective(self.plan.run.objective).select_by

    def _is_validated(self, round_: int, every: int) -> bool:
        return round_ == self.plan.run.train.rounds or round_ % every == 0

    def _check_least(self) -> None:
        """Refuse a deployment in which no round could ever count.

        Raises:
            UserError: fewer clients can train than a round needs.
        """
        able = sum(bool(member.sizes["train"]) for member in self.roll.members.values())
        least = max(self.plan.least, SECURE) if self.plan.secure else self.plan.least
        if able < least:
            raise UserError(
                f"{format_count(able, 'client has', 'clients have')} training examples, and a round needs "
                f"{least}: make a deployment with a lower "
                "--at-least, or without these clients"
            )

    def _look(self) -> None:
        """See who is there."""
        for text in self.roll.update(self.transport, self.plan.timeout):
            self.show.note(text)

    def _gather(self, wanted: Collection[int], when: str, least: int | None = None, enough: int | None = None) -> None:
        """Wait until these clients' nodes are there, or `least` of them, at most as long as an order may take.

        After that `enough` of them do.
        """
        began = told = time.monotonic()
        least = len(wanted) if least is None else least
        while True:
            self._look()
            missing = [number for number in wanted if number not in self.roll.nodes]
            if len(wanted) - len(missing) >= least:
                return
            now = time.monotonic()
            names = list_names([self._name(number) for number in missing])
            if now - began > self.plan.timeout:
                if enough is not None and len(wanted) - len(missing) >= enough:
                    self.show.note(
                        f"{names} did not come within {format_count(self.plan.timeout, 'second')} {when}: without them"
                    )
                    return
                raise UserError(
                    f"{names} did not come within {format_count(self.plan.timeout, 'second')} {when}: "
                    "start their nodes, and then "
                    "this again, which goes on where it was"
                )
            if now - told >= TELL or told == began:
                self.show.note(f"waiting for {names} {when}")
                told = now + 1e-6
            time.sleep(POLL)

    def _name(self, number: int) -> str:
        member = self.roll.members.get(number)
        return f"client {number}" if member is None else member.name

    def _tell(self, faults: Mapping[int, str], sentence: str) -> None:
        """Note each client's fault in a sentence with places for its name and the fault."""
        for number, fault in faults.items():
            self.show.note(sentence.format(self._name(number), fault))

    def _draw(self, round_: int) -> tuple[np.ndarray, dict[int, float]]:
        """Draw the cohort of a round as the simulator does; return it with everyone's share of the weight."""
        run, members = self.plan.run, self.roll.members
        trainable = np.asarray([number for number in sorted(members) if members[number].sizes["train"]], np.int64)
        if not len(trainable):
            raise UserError("no node has a training example: there is nothing to train on")
        sizes = np.asarray([members[number].sizes["train"] for number in trainable.tolist()])
        by_size = run.participation.sampling == "size" and self.plan.cohort < len(sizes)
        shares = find_shares(sizes, "examples" if by_size else run.train.weighting)
        drawn = draw_cohort(run.seed, round_, len(trainable), self.plan.cohort, sizes if by_size else None)
        return trainable[drawn], dict(zip(trainable.tolist(), shares.tolist(), strict=True))

    def _weigh(self, numbers: Sequence[int]) -> np.ndarray:
        """Return p_k of these clients, Σ = 1."""
        sizes = np.asarray([self.roll.members[number].sizes["train"] for number in numbers])
        return find_shares(sizes, self.plan.run.train.weighting).astype(np.float32)

    def _run_round(self, round_: int) -> dict[str, Any]:
        cohort, shares = self._draw(round_)
        numbers = cohort.tolist()
        self._gather(numbers, f"for round {round_}", min(self.plan.least, len(numbers)))
        weights = dict(zip(numbers, self._weigh(numbers).tolist(), strict=True))
        rates = find_rates(self.plan.run.train, round_)
        there = [number for number in numbers if number in self.roll.nodes]
        orders = {
            number: self._order(
                "train", number, self.server, round=round_, rates=rates, steps=self._steps, weight=weights[number],
                share=shares[number],
            )
            for number in there
        }  # fmt: skip
        replies = self._ask(orders, round_, "train")
        shapes = self.program.message(self.program.method.phase(round_))
        trained, faults = read_trained(replies, shapes, round_, summed=self.plan.secure)
        self._tell(faults, f"round {round_}: {{}} is left out: {{}}")
        if len(trained.headers) < self.plan.least:
            self.show.note(
                f"round {round_}: {len(trained.headers)} of {format_count(len(numbers), 'client')} "
                "counted, and a round needs "
                f"{self.plan.least}: it changes nothing"
            )
            counted, health = list[int](), dict[str, float]()
        else:
            counted, health = self._aggregate(trained, numbers, round_)
        for member in self.roll.members.values():
            member.older = sorted({member.kept, member.best} - {0})
        for number in counted:
            self.roll.members[number].kept = round_
        means = mean_by_name([trained.headers[number]["metrics"] for number in counted])
        line: dict[str, Any] = {
            "round": round_,
            "method": self.plan.run.method,
            "clients": len(numbers),
            "dropped": len(numbers) - len(counted) - len(trained.unfit),
        }
        line = {
            **line,
            **{name: value for name, value in means.items() if name not in line},
            **health,
            "bytes_up_per_client": count_bytes(shapes),
            "bytes_down_per_client": count_bytes(self.program.received),
        }
        if trained.unfit:
            line[UNFIT] = [self._name(number) for number in trained.unfit]
            self.show.note(describe_unfit(round_, line[UNFIT], ()))
        return line

    def _order(self, kind: str, number: int, server: PyTree, **header: Any) -> Packet:
        member = self.roll.members[number]
        payload = pack(self.program.broadcast(server, number, self.last.get(number)))
        about = {"kind": kind, "plan": self.plan.digest, "kept": member.kept, "keep": member.keep}
        return Packet({**about, **header}, payload)

    def _ask(self, orders: Mapping[int, Packet], round_: int, verb: str) -> dict[int, Packet]:
        """Send orders to clients; return their replies, and tell of everyone who has none."""
        nodes = {self.roll.nodes[number]: number for number in orders}
        with working(self.show, f"waiting for {format_count(len(nodes), 'node')} to {verb}"):
            answers = self.transport.ask({node: orders[number] for node, number in nodes.items()}, self.plan.timeout)
        found = dict[int, Packet]()
        for node, number in nodes.items():
            reply = answers.get(node)
            if isinstance(reply, Packet):
                if reply.header.get("number") == number:
                    found[number] = reply
                    continue
                reason = "its reply is that of another client"
            else:
                reason = "no answer in time" if reply is None else clean(cut(reply.reason, 300))
            self.show.note(f"round {round_}: {self._name(number)} is left out: {reason}")
            if reply is not None:
                self.roll.drop(number)
        return found

    def _aggregate(self, trained: Trained, numbers: Sequence[int], round_: int) -> tuple[list[int], dict[str, float]]:
        """Aggregate what came; return who counted, and the aggregation's metrics."""
        counted = sorted(trained.headers)
        if self.plan.secure:
            counted, messages = self._sum_secretly(trained, round_)
            if not counted:
                return [], {}
            weights, who = np.ones(1, np.float32), np.zeros(1, np.int32)
        else:
            blank = jax.tree.map(
                lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.program.message(self.program.method.phase(round_))
            )
            held = [trained.messages.get(number, blank) for number in numbers]
            held += [blank] * (self.plan.cohort - len(numbers))
            messages = jax.tree.map(lambda *leaves: np.stack(leaves), *held)
            weights = np.zeros(self.plan.cohort, np.float32)
            weights[[numbers.index(number) for number in counted]] = self._weigh(counted)
            who = np.full(self.plan.cohort, numbers[-1], np.int32)
            who[: len(numbers)] = numbers
        new, health, finite = self.program.aggregate(self.server, messages, weights, who, round_)
        if not finite:
            raise UserError(
                f"round {round_}: what the clients' updates add up to is not finite; lower --train.learning-rate-a and "
                "--train.learning-rate-b in a new deployment. The last checkpoint is that of the round before"
            )
        self.server = new
        if self.program.method.mixes:
            self.last |= {number: trained.messages[number] for number in counted}
        return counted, health

    def _sum_secretly(self, trained: Trained, round_: int) -> tuple[list[int], PyTree]:
        """Have the nodes' messages summed so that nobody sees a single one; return who counted, and the mean [1, …]."""
        assert isinstance(self.transport, SecureTransport), "a plan with --secure needs a transport that sums"
        numbers = sorted(trained.headers)
        weights = dict(zip(numbers, self._weigh(numbers).tolist(), strict=True))
        largest = max(trained.headers[number]["largest"] * weights[number] for number in numbers)
        about = {"kind": "message", "plan": self.plan.digest, "round": round_}
        orders = {self.roll.nodes[number]: Packet({**about, "weight": weights[number]}) for number in numbers}
        shapes = self.program.message(self.program.method.phase(round_))
        try:
            total = self.transport.ask_sum(orders, HEADROOM * max(largest, 1e-12), self.plan.timeout)
            counted = [number for number in numbers if self.roll.nodes[number] in total.nodes]
            if len(counted) < self.plan.least:
                raise UserError(f"the secure sum came of {format_count(len(counted), 'client')}")
            share = sum(weights[number] for number in counted)
            mean = unpack(np.asarray(total.vector / share, np.float32).tobytes(), shapes)
        except UserError as error:  # of what one node sent, for example, which nobody can look at
            self.show.note(f"round {round_}: {clean(cut(str(error), 300))}: the round changes nothing")
            return [], {}
        return counted, jax.tree.map(lambda leaf: leaf[None], mean)

    def _validate(self, round_: int) -> dict[str, Any]:
        """Have every node that is there score its model on its own validation data; keep the best round."""
        self._look()
        there = [n for n in sorted(self.roll.nodes) if self.roll.members[n].sizes["validation"]]
        orders = {number: self._order("evaluate", number, self.server, round=round_) for number in there}
        replies, faults = check_replies(self._ask(orders, round_, "validate"), SCORED)
        for number, said in list(replies.items()):
            if said["round"] != round_:
                faults[number] = f"its scores are of round {replies.pop(number)['round']!s:.20}"
            elif not all(math.isfinite(score) for score in said["scores"].values() if score is not None):
                faults[number] = "it has scores that are not finite"
        self._tell(faults, f"round {round_}: {{}} is not scored: {{}}")
        found: dict[str, Any] = mean_by_name([header["scores"] for header in replies.values()])
        found["metric"] = self._select_by
        read = {number: read_score(header["scores"], self._select_by) for number, header in replies.items()}
        scored = {number: score for number, score in read.items() if score is not None}
        if self._is_best(round_, scored, found):
            self.best = (self.server, round_, mean_scores([*scored.values()]))
            for number, member in self.roll.members.items():
                member.best, member.score = member.kept, list(scored.get(number, ()))
        return found

    def _is_best(self, round_: int, scored: Mapping[int, Score], found: Mapping[str, Any]) -> bool:
        """Tell whether a round did better than the best so far, on the clients that are scored in both.

        Who is there differs from round to round, and so would means over all, however good the models are.
        """
        _, before, score = self.best
        if not math.isfinite(score[0]):
            # Without validation data, or anybody who has scored, the newest is the best there is.
            return bool(scored) or self._select_by not in found
        held = {n: (member.score[0], member.score[1]) for n, member in self.roll.members.items() if member.score}
        both = sorted(scored.keys() & held.keys())
        if scored and not both:
            self.show.note(f"round {round_} cannot be compared with round {before}: no client is scored in both")
        elif scored and scored.keys() != held.keys():
            names = list_names([self._name(number) for number in both])
            self.show.note(f"round {round_} is compared with round {before} by the scores of {names}: others lack one")
        return bool(both) and mean_scores([scored[n] for n in both]) > mean_scores([held[n] for n in both])

    def _finish(self) -> None:
        """Have every node score the models of the best round on all its data and keep its own; write the results."""
        if not self.best[1]:
            raise UserError("no round's models have a finite loss on the nodes' validation data: lower the rates")
        found = self._ask_results(sorted(self.roll.members), self.plan.least)
        if not found["personal"]:
            raise UserError("no node sent results: start the nodes, and then this again")
        about = {"selected_round": self.best[1], "selected_by": self._select_by}
        shared = self.program.method.download(server=self.best[0])
        self.folder.write_results(self.plan.run.method, self.best[1], shared, {**about, **found})

    def complete(self) -> None:
        """Give clients that were away when the deployment ended their final models, if their nodes come now."""
        results = self.folder.read_results()
        if results.get(AWAY) and self._restore():
            away = [number for number, member in sorted(self.roll.members.items()) if member.name in results[AWAY]]
            found = self._ask_results(away, 0)
            self.folder.replace_results(add_results({**results, AWAY: []}, found))

    def _ask_results(self, numbers: Sequence[int], enough: int) -> dict[str, Any]:
        """Have these clients keep and score their models of the best round; return the results, with who is away."""
        server, round_, _ = self.best
        self._gather(numbers, "for the last evaluation", enough=enough)
        for member in self.roll.members.values():
            member.kept = member.best
        there = [number for number in numbers if number in self.roll.nodes]
        orders = {number: self._order("finish", number, server, round=round_) for number in there}
        replies, faults = check_replies(self._ask(orders, round_, "evaluate"), FINISHED)
        self._tell(faults, "{} has no results: {}")
        found = join_results({self._name(number): header for number, header in replies.items()})
        if away := [self._name(number) for number in numbers if number not in replies]:
            found[AWAY] = away
            self.show.note(
                f"{list_names(away)} did not get the final model: when the node is there, give `flwr run` again, and "
                "leave the run's folder as it is"
            )
        return found

    def _state(self) -> PyTree:
        """Return all that changes, for a checkpoint; what clients sent last only where a method mixes it."""
        sent: PyTree = {}
        if self.program.method.mixes:
            shapes = self.program.message(self.program.method.phase(1))
            blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            held = [self.last.get(number, blank) for number in range(self.plan.clients)]
            known = np.asarray([number in self.last for number in range(self.plan.clients)])
            sent = {"known": known, "last": jax.tree.map(lambda *leaves: np.stack(leaves), *held)}
        return {"server": self.server, "best": self.best[0], "sent": sent}

    def _save(self, round_: int) -> None:
        _, best, score = self.best
        self.folder.save(round_, self._state(), self.roll.members, (best, list(score)))

    def _restore(self) -> int:
        """Go back to the newest checkpoint; return its round, 0 where there is none."""
        found = self.folder.load(self._state())
        if found is None:
            return 0
        round_, state, members, (best, score) = found
        self.server, self.roll.members = state["server"], members
        self.best = (state["best"], best, (score[0], score[1]))
        if state["sent"]:
            known = np.flatnonzero(state["sent"]["known"]).tolist()
            self.last = {n: jax.tree.map(lambda leaf, n=n: leaf[n], state["sent"]["last"]) for n in known}
        return round_


def coordinate(plan: Plan, model: str | None, transport: Transport, folder: Path, show: Progress) -> Path:
    """Run a deployment to its end, or go on with it; return its folder.

    Args:
        plan: what everybody agreed on.
        model: where the base's configuration is on this machine; None: what the plan says.
        transport: to the nodes.
        folder: of the run, new or that of a coordinator that ended.
        show: receives progress.

    Raises:
        UserError: the model is not the plan's, too few nodes come, or the folder is another run's.
    """
    name = model or plan.run.model
    here = describe_model(resolve_folder(name))
    if here["model_files"].get("config.json") != plan.model["model_files"].get("config.json"):
        raise UserError(f"the configuration of {name} is not that of the plan's model")
    with Claim(folder):
        program = open_server_program(plan, name)
        files = ServerFolder(folder, plan)
        try:
            roll = Roll(plan, digest_schema(program.received))
            best = (program.start, 0, NO_SCORE)
            coordinator = Coordinator(plan, name, transport, files, show, program, roll, program.start, best)
            if files.is_finished:
                coordinator.complete()
                show.note(f"{folder} is finished")
                return folder
            ended = coordinator.run()
            show.note(f"run     {folder}")
            show.note(f"next    fedvlm report {shlex.quote(str(folder))}")
            return ended
        finally:
            files.checkpoints.close()
