"""The nodes that a coordinator knows: who is which client, how many rows each has, and after which round it counted."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvlm_jax.deployment.packets import Failure, Packet, Transport
from fedvlm_jax.deployment.plan import Plan, digest_token
from fedvlm_jax.deployment.replies import read_header
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.run_dir.validated_files import Form
from fedvlm_jax.training.round_setup import MOST_ROWS
from fedvlm_jax.utils.untrusted_text import clean, cut

HELLO: Form = {
    "number": int,
    "token": str,
    "session": str,
    "name": str,
    "sizes": {"train": int, "validation": int, "test": int},
    "states": list[int],
    "schema": str,
}
LONGEST_NAME = 100
PATIENCE = 60.0
"""Seconds that a node has to say who it is, and that it is not asked again after it did not; then twice as many, ..."""


@dataclass
class Member:
    """A client of the deployment, as the coordinator knows it.

    Attributes:
        name: its name in its own data, or "client-N" where another client has that.
        sizes: split -> number of rows.
        kept: the round in which it last counted, whose personal state it goes on from; 0: it begins.
        best: the same as it was in the best round so far.
        score: its model's score on validation data in the best round (`replies.Score`); empty where it has none.
        older: kept and best, as in the checkpoint before the newest: that is gone back to where the newest is damaged.
    """

    name: str
    sizes: dict[str, int]
    kept: int = 0
    best: int = 0
    score: list[float] = field(default_factory=list[float])
    older: list[int] = field(default_factory=list)

    @property
    def keep(self) -> list[int]:
        """The rounds whose states a checkpoint may go back to."""
        return sorted({self.kept, self.best, *self.older} - {0})


@dataclass
class Roll:
    """All members by number, and the nodes of those that are there.

    Attributes:
        plan: whose secrets say which node is which client.
        schema: digest of what a node expects to receive.
        members: by number, everyone that was ever there.
        nodes: by number, the node of everyone that is there now.
        refused: nodes that are nobody's, and why.
        silent: nodes that did not say in time who they are -> when they are asked again, and the pause until then.
    """

    plan: Plan
    schema: str
    members: dict[int, Member] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    silent: dict[int, tuple[float, float]] = field(default_factory=dict)
    _told: dict[int, str] = field(default_factory=dict, repr=False)  # node -> the fault that was told of it last

    def update(self, transport: Transport, timeout: float) -> list[str]:
        """See which nodes are there, and ask those that are new who they are; return what is worth telling.

        Raises:
            UserError: two nodes say that they are the same client.
        """
        there, told, timeout = transport.list_nodes(), list[str](), min(timeout, PATIENCE)
        self.nodes = {number: node for number, node in self.nodes.items() if node in there}
        known = {*self.nodes.values(), *self.refused}
        known |= {node for node, (until, _) in self.silent.items() if time.monotonic() < until}
        order = Packet({"kind": "hello", "plan": self.plan.digest})
        asked = [node for node in there if node not in known]
        replies = transport.ask(dict.fromkeys(asked, order), timeout) if asked else {}
        for node in asked:
            _, pause = self.silent.pop(node, (0.0, PATIENCE))
            if node not in replies:
                self.silent[node] = (time.monotonic() + pause, 2 * pause)
        for node, reply in sorted(replies.items()):
            fault = self._admit(node, reply, told, lambda old: transport.ask({old: order}, timeout).get(old))
            if fault:
                if not isinstance(reply, Failure):  # a worker that is not started yet may be asked again
                    self.refused[node] = fault
                if self._told.get(node) != fault:
                    told.append(f"a node is left out: {fault}")
            self._told[node] = fault
        return told

    def drop(self, number: int) -> None:
        """Ask a client's node anew who it is: its worker may have been started again, with other states and rows."""
        self.nodes.pop(number, None)

    def _admit(
        self, node: int, reply: Packet | Failure, told: list[str], ask: Callable[[int], Packet | Failure | None]
    ) -> str:
        """Take a node for the client whose secret it knows; return what speaks against it.

        The network may list a node that was killed for a while, beside the one that took its place: `ask` finds out
        whether the old one still answers, and whether both are one process.
        """
        if isinstance(reply, Failure):
            return clean(cut(reply.reason, 300))
        try:
            header = read_header(Path("a node's answer"), reply.header, HELLO)
        except UserError as error:
            return clean(cut(str(error), 300))
        number = header["number"]
        if not 0 <= number < self.plan.clients or digest_token(header["token"]) != self.plan.tokens[number]:
            return f"it says that it is client {number!s:.20}, and does not know that client's secret"
        if not all(0 <= size <= MOST_ROWS for size in header["sizes"].values()):
            return f"client {number} says that it has so many rows as nobody has"
        if header["schema"] != self.schema:
            return f"client {number} expects arrays of other shapes: its model, method or version is another"
        if number in self.nodes:
            before = ask(self.nodes[number])
            if isinstance(before, Packet) and before.header.get("session") != header["session"]:
                raise UserError(
                    f"two nodes say that they are client {number}: a node file is for one machine; stop one of the two"
                )
            self.refused[self.nodes[number]] = f"another has taken its place as client {number}"
        self.nodes[number] = node
        self._enter(number, header, told)
        return ""

    def _enter(self, number: int, header: Mapping[str, Any], told: list[str]) -> None:
        sizes, spare = header["sizes"], f"client-{number}"
        member = self.members.get(number)
        if member is None:
            taken = {other.name for other in self.members.values()}
            name = cut(clean(header["name"]).strip(), LONGEST_NAME)
            # "client-3" is what client 3 is called where its own name cannot be, and nobody else.
            name = spare if not name or name in taken or re.fullmatch(r"client-\d+", name) else name
            self.members[number] = Member(name, sizes)
            told.append(f"{name} is there (client {number}), {format_count(sizes['train'], 'training example')}")
            return
        told.append(f"{member.name} is there again")
        if member.sizes != sizes:
            told.append(f"{member.name} has other rows than before: its weight changes with them")
            member.sizes = sizes
        if member.kept and member.kept not in header["states"]:
            told.append(f"{member.name} has lost its personal state of round {member.kept}: it begins anew")
            member.kept = member.best = 0
            member.older = []
        if member.best and member.best not in header["states"]:
            member.best = member.kept
