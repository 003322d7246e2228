"""A client on a machine of its own: it holds its rows and its personal state, and answers the coordinator's orders.

Base, features and compiled programs stay in memory from order to order. What a node replies with is its message, which
the method says how to make, and numbers about its training; no leaf of the personal state is in it.
"""

import secrets
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from fedvlm_jax.config.learning_rates import find_rates
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.data.batches import bucket, count_steps, round_rows
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.deployment.agreed_classes import check_agreed
from fedvlm_jax.deployment.node_states import NodeStates, check_owner
from fedvlm_jax.deployment.packets import Packet
from fedvlm_jax.deployment.plan import NodeFile, list_agreed
from fedvlm_jax.deployment.replies import MODELS, read_header
from fedvlm_jax.deployment.shapes import shape_message, shape_personal, shape_received
from fedvlm_jax.deployment.vectors import count_bytes, digest_schema, pack, unpack
from fedvlm_jax.distributed.sharding import place_like
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.evaluator import Adapters
from fedvlm_jax.federation.client_round import Frame
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.methods import Client
from fedvlm_jax.run_dir import artifacts, fingerprints
from fedvlm_jax.run_dir.config_seal import seal
from fedvlm_jax.run_dir.validated_files import Form
from fedvlm_jax.training import final_evaluation
from fedvlm_jax.training.best_round import score_validation
from fedvlm_jax.training.experiment import Experiment, open_experiment
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.training.round_setup import MOST_ROWS, choose_program_options, deal_ranks
from fedvlm_jax.training.start_description import describe_start
from fedvlm_jax.utils.files import write_json
from fedvlm_jax.utils.progress import COMPILING, Progress, working

TRAIN: Form = {
    "round": int,
    "kept": int,
    "keep": list[int],
    "rates": {"a": float, "b": float},
    "steps": int,
    "weight": float,
    "share": float,
}
EVALUATE: Form = {"round": int, "kept": int}
MESSAGE: Form = {"round": int, "weight": float}
SHARES = ("weight", "share")
STATES = "states"
ORDERS = Path("the coordinator's order")


@dataclass
class Node:
    """One client of a deployment.

    Attributes:
        file: its number and secret, and the plan.
        experiment: the plan's run on the rows of this client alone.
        folder: where its states are, and in the end its adapter, as the folder `run` of a run of one client.
    """

    file: NodeFile
    experiment: Experiment
    folder: Path
    _compiled: set[int] = field(default_factory=set, init=False, repr=False)  # phases whose program has run
    _message: tuple[int, PyTree] | None = field(default=None, init=False, repr=False)
    _session: str = field(default_factory=lambda: secrets.token_hex(8), init=False, repr=False)  # of this process

    @property
    def name(self) -> str:
        """Return the client's name in its own data."""
        return self.experiment.examples.clients[0].name

    @property
    def _run(self) -> Run:
        return self.file.plan.run

    @cached_property
    def _key(self) -> jax.Array:
        return jax.random.key(self._run.seed)

    @cached_property
    def _start(self) -> PyTree:
        """The server's state at the start, which the seed tells."""
        return self._programs(self._steps).method.init(adapter=self.experiment.adapter)

    @cached_property
    def _states(self) -> NodeStates:
        shapes = shape_personal(self._programs(self._steps).method, self._start)
        return NodeStates(self.folder / STATES, shapes, _name_owner(self.file))

    @cached_property
    def _received(self) -> PyTree:
        """The shapes of what the server sends."""
        return shape_received(self._programs(self._steps).method, self._start)

    @property
    def _steps(self) -> int:
        """This client's local steps in a round."""
        train = self._run.train
        if train.local_epochs is None:
            return train.local_steps
        return max(1, count_steps(len(self.experiment.examples.clients[0].train), train.local_epochs, train.batch_size))

    def _programs(self, steps: int) -> Programs:
        plan = self.file.plan
        return self.experiment.model.programs(
            choose_program_options(self._run), plan.clients, plan.cohort, plan.cohort, steps
        )

    def describe_traffic(self) -> dict[str, int]:
        """Count what leaves and reaches this machine in a round, in bytes beside headers: `up` and `down`."""
        method = self._programs(self._steps).method
        params = self.experiment.model.vlm.shapes()
        message = shape_message(method, params, self._start, self._run.train, method.phase(1))
        return {"up": count_bytes(message), "down": count_bytes(self._received)}

    def answer(self, order: Packet) -> Packet:
        """Carry out an order.

        Raises:
            UserError: it is no order, is of another plan, or cannot be carried out.
        """
        kinds: Mapping[str, Callable[[Packet], Packet]] = {
            "hello": self._introduce,
            "train": self._train,
            "message": self._send,
            "evaluate": self._evaluate,
            "finish": self._finish,
        }
        kind = order.header.get("kind")
        if order.header.get("plan") != self.file.plan.digest:
            raise UserError("the coordinator has another plan: both sides need files of one `fedvlm deploy init`")
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"an order of the kind {str(kind)[:40]!r} is unknown; is the coordinator of this version?")
        reply = kinds[kind](order)
        return replace(reply, header={"kind": kind, "number": self.file.number, **reply.header})

    def _introduce(self, order: Packet) -> Packet:
        client = self.experiment.examples.clients[0]
        return Packet(
            {
                "token": self.file.token,
                "session": self._session,
                "name": self.name,
                "sizes": {"train": len(client.train), "validation": len(client.validation), "test": len(client.test)},
                "states": self._states.rounds(),
                "schema": digest_schema(self._received),
            }
        )

    def _train(self, order: Packet) -> Packet:
        header = self._check(order, TRAIN)
        round_, rates = header["round"], header["rates"]
        programs, server = self._programs(header["steps"]), self._view(order.payload)
        personal, known = self._load(header["kept"])
        phase = programs.method.phase(round_)
        frame = Frame(
            self._base(server), server, {k: jnp.float32(v) for k, v in rates.items()}, jnp.int32(round_), self._key
        )
        client = self._read(round_, header["steps"], header["weight"], header["share"], new=not known)
        with working(self.experiment.show, COMPILING) if phase not in self._compiled else nullcontext():
            done = programs.client_round(frame, personal, client, phase=phase)
        self._compiled.add(phase)
        finite = bool(done.finite)
        if finite:
            self._states.save(round_, done.personal, [header["kept"], *header["keep"]])
        message = jax.device_get(done.message)
        self._message = (round_, message)
        largest = max((float(np.abs(leaf).max(initial=0)) for leaf in jax.tree.leaves(message)), default=0.0)
        reply = {
            "round": round_,
            "finite": finite,
            "metrics": {name: float(value) for name, value in jax.device_get(done.metrics).items()},
            "schema": digest_schema(message),
            "largest": largest,
        }
        return Packet(reply, pack(message) if finite and not self.file.plan.secure else b"")

    def _send(self, order: Packet) -> Packet:
        """Hand over the message of a round, weighted, for a sum in which nobody sees it alone."""
        header = self._check(order, MESSAGE)
        if self._message is None or self._message[0] != header["round"]:
            raise UserError(f"there is no message of round {header['round']} here")
        leaves = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(self._message[1])]
        self._message = None  # two sums with other clients would tell it by their difference
        vector = np.concatenate([*leaves, np.zeros(0, np.float32)])
        return Packet({"round": header["round"]}, (vector * np.float32(header["weight"])).tobytes())

    def _evaluate(self, order: Packet) -> Packet:
        header, server = self._check(order, EVALUATE), self._view(order.payload)
        final_evaluation.ask_base(self.experiment)  # rewards are relative to what it answers
        with working(self.experiment.show, "validating this client's model"):
            scores = score_validation(self.experiment, self._base(server), self._personal(server, header["kept"]), [0])
        found = _select(scores, self.name)
        return Packet({"round": header["round"], "scores": found})

    def _finish(self, order: Packet) -> Packet:
        """Score the models that the deployment ends with, and keep them in the folder of a run of one client."""
        header = self._check(order, EVALUATE)
        experiment, server = self.experiment, self._view(order.payload)
        base, zero_shot = self._base(server), final_evaluation.ask_base(experiment)
        method = self._programs(self._steps).method
        shared = jax.device_get(method.download(server=server)) if not method.mixes else {}
        personal = self._personal(server, header["kept"])
        general = self._personal(server, 0) if jax.tree.leaves(shared) else None
        with working(experiment.show, "evaluating this client's model"):
            _, scores = final_evaluation.score_models(experiment, base, personal, general, zero_shot)
        folder, about = experiment.folder, {"method": self._run.method, "round": header["round"]}
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.save_base(folder / "adapters" / artifacts.BASE, experiment.model.params, base)
        listed = [
            [(self.name, jax.tree.map(lambda leaf: leaf[0], models(np.zeros(1, np.int64))))]
            for models in (personal, general)
            if models is not None
        ]
        artifacts.save_adapters(folder / "adapters", listed[0], shared, about, *listed[1:])
        write_json(folder / "config.json", seal({**describe_start(experiment, method), "node": self.file.number}))
        results = {"selected_round": header["round"], "selected_by": experiment.select_by, **scores}
        write_json(folder / "results.json", results)
        own = {
            name: {split: _select(by_metric, self.name) for split, by_metric in scores[name].items()}
            for name in MODELS
            if name in scores
        }
        gains = _select(scores.get("gain_intervals", {}), self.name)
        return Packet({"results": own, "gains": gains, "generation": scores["generation"]})

    def _check(self, order: Packet, form: Form) -> dict[str, Any]:
        """Read an order's header; what is outside the plan is refused, whoever asks for it."""
        header, train = read_header(ORDERS, order.header, form), self._run.train
        round_, kept = header["round"], header.get("kept", 0)
        if not 1 <= round_ <= train.rounds or not 0 <= kept <= round_ - (form is TRAIN):
            raise UserError(f"{ORDERS} is outside the plan: no round {round_!s:.20} goes on from {kept!s:.20}")
        if form is TRAIN and header["rates"] != find_rates(train, round_):
            raise UserError(f"{ORDERS} is outside the plan: its learning rates are others")
        most = train.local_steps if train.local_epochs is None else MOST_ROWS
        if not 1 <= header.get("steps", 1) <= most or not all(0 <= header.get(name, 0) <= 1 for name in SHARES):
            raise UserError(f"{ORDERS} is outside the plan: it has steps, or a weight, that cannot be")
        return header

    def _view(self, payload: bytes) -> PyTree:
        method = self._programs(self._steps).method
        return method.view(start=self._start, received=jax.tree.map(jnp.asarray, unpack(payload, self._received)))

    def _base(self, server: PyTree) -> PyTree:
        params, base = self.experiment.model.params, self._programs(self._steps).base
        return params if base is None else place_like(base(params=params, server=server), params)

    def _load(self, kept: int) -> tuple[PyTree, bool]:
        """Return the state after the round in which this client last counted, 0 for none, and whether there is one."""
        return (self._states.load(kept), True) if kept else (self._states.blank(), False)

    def _personal(self, server: PyTree, kept: int) -> Adapters:
        """Give this client's adapter; with `kept` 0 the one that it would begin with, its shared part the server's."""
        state, known = self._load(kept)
        stacked = jax.tree.map(lambda leaf: leaf[None], state)
        adapter = self._programs(self._steps).personalise(
            server, stacked, np.asarray([known]), np.asarray([self.file.number], np.int32), self._key
        )
        return lambda numbers: jax.tree.map(lambda leaf: jnp.repeat(leaf, len(numbers), axis=0), adapter)

    def _read(self, round_: int, steps: int, weight: float, share: float, *, new: bool) -> Client:
        """Read the rows of a round: those that the simulator would read for this client's number.

        Steps beyond this client's own, which a larger client takes, are not made.
        """
        train, rows = self._run.train, self.experiment.examples.clients[0].train
        steps = min(steps, self._steps)
        size = bucket(max(min(len(rows), steps * train.batch_size), 1))
        drawn = round_rows(self._run.seed, round_, [self.file.number], [rows], steps, train.batch_size, size, [steps])
        return Client(
            examples={name: jnp.asarray(array) for name, array in self.experiment.inputs(drawn.rows[0]).items()},
            indices=drawn.indices[0],
            mask=drawn.mask[0],
            weight=np.float32(weight),
            number=np.int32(self.file.number),
            new=np.bool_(new),
            share=np.float32(share),
        )


def _select(scores: Mapping[str, Mapping[str, Any]], client: str) -> dict[str, Any]:
    """Select one client's values by metric.

    >>> _select({"loss": {"ann": 0.5}, "cider": {}}, "ann")
    {'loss': 0.5}
    """
    return {metric: values[client] for metric, values in scores.items() if client in values}


def _name_owner(file: NodeFile) -> str:
    return f"client {file.number} of the plan {file.plan.digest}"


def open_node(
    file: NodeFile,
    data: DataOptions,
    model: str | None,
    folder: Path,
    show: Progress,
    loaded: LoadedModel | None = None,
) -> Node:
    """Load the model and this client's rows, compute the features that stay, and make ready for orders.

    Args:
        file: what the node was given.
        data: its rows, which must be those of one client; lengths and classes are the plan's.
        model: where the base is on this machine; None: what the plan says.
        folder: of this node, kept over restarts.
        show: receives progress.
        loaded: the base, where this process has it already.

    Raises:
        UserError: the base is not the plan's, the rows are not those of one client, one has an answer that is no class
            of the plan, or none of them can be trained on; or the folder is another node's.
    """
    check_owner(folder / STATES, _name_owner(file))
    plan = file.plan
    # Ranks are dealt by numbers of the whole population, of which there is one here.
    run = replace(
        plan.run, model=model or plan.run.model, data=data.replace(**list_agreed(plan.run)), cohort=None,
        out=folder / "run", system=replace(plan.run.system, mesh="clients=1"),
    )  # fmt: skip

    if plan.run.data.agreed_classes and data.novel_classes:
        raise UserError("--data.novel-classes: the plan says which classes are novel, so leave it out")

    def check(sources: Mapping[str, Any]) -> None:
        here = {"data": sources["data"], **{name: sources[name] for name in ("weights", "model_files")}}
        if other := fingerprints.list_other_sources(run, {"data": sources["data"], **plan.model}, here):
            raise UserError(
                "\n  ".join(["the base here is not the one that the deployment was made with:", *other])
                + "\nEvery node needs that one's files: --model DIR says where they are."
            )

    if loaded is None:
        loaded = load_model(run, show.note, check)
    else:
        check(loaded.sources(run.data))
    check_agreed(run, loaded.vlm)
    experiment = open_experiment(run, loaded, show)
    clients = experiment.examples.clients
    if len(clients) != 1:
        names = ", ".join(client.name for client in clients[:4]) + (", …" if len(clients) > 4 else "")
        raise UserError(
            f"{data.source} has {len(clients)} clients ({names}), and a node is one: give it a file, or a folder, of "
            "that client's rows alone"
        )
    node = Node(file, experiment, folder)
    ranks = deal_ranks(plan.run.lora.ranks, plan.clients)
    show.note(
        f"client {file.number} of {plan.clients}, {node.name}" + (f", rank {ranks[file.number]}" if ranks else "")
    )
    return node
