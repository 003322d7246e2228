"""The nodes that a coordinator knows: who is which client, how many rows each has, and after which round it counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvlm_jax.deployment.packets import Failure, Packet, Transport
from fedvlm_jax.deployment.plan import Plan, digest_token
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.validated_files import Form, check_form
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
"""Seconds that a node has to say who it is; one whose worker is busy is asked again."""


@dataclass
class Member:
    """A client of the deployment, as the coordinator knows it.

    Attributes:
        name: its name in its own data, or "client-N" where another client has that.
        sizes: split -> number of rows.
        kept: the round in which it last counted, whose personal state it goes on from; 0: it begins.
        best: the same as it was in the best round so far.
    """

    name: str
    sizes: dict[str, int]
    kept: int = 0
    best: int = 0


@dataclass
class Roll:
    """All members by number, and the nodes of those that are there.

    Attributes:
        plan: whose secrets say which node is which client.
        schema: digest of what a node expects to receive.
        members: by number, everyone that was ever there.
        nodes: by number, the node of everyone that is there now.
        refused: nodes that are nobody's, and why.
    """

    plan: Plan
    schema: str
    members: dict[int, Member] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def update(self, transport: Transport, timeout: float) -> list[str]:
        """See which nodes are there, and ask those that are new who they are; return what is worth telling.

        Raises:
            UserError: two nodes say that they are the same client.
        """
        there, told, timeout = transport.list_nodes(), list[str](), min(timeout, PATIENCE)
        self.nodes = {number: node for number, node in self.nodes.items() if node in there}
        known = {*self.nodes.values(), *self.refused}
        order = Packet({"kind": "hello", "plan": self.plan.digest})
        replies = transport.ask({node: order for node in there if node not in known}, timeout)
        for node, reply in sorted(replies.items()):
            fault = self._admit(node, reply, told, lambda old: transport.ask({old: order}, timeout).get(old))
            if fault:
                if not isinstance(reply, Failure):  # a worker that is not started yet may be asked again
                    self.refused[node] = fault
                told.append(f"a node is left out: {fault}")
        return told

    def _admit(
        self, node: int, reply: Packet | Failure, told: list[str], ask: Callable[[int], Packet | Failure | None]
    ) -> str:
        """Take a node for the client whose secret it knows; return what speaks against it.

        The network may list a node that was killed for a while, beside the one that took its place: `ask` finds out
        whether the old one still answers, and whether both are one process.
        """
        if isinstance(reply, Failure):
            return clean(cut(reply.reason, 300))
        header = reply.header
        try:
            check_form(Path("a node's answer"), header, HELLO)
        except UserError as error:
            return clean(cut(str(error), 300))
        number = header["number"]
        if not 0 <= number < self.plan.clients or digest_token(header["token"]) != self.plan.tokens[number]:
            return f"it says that it is client {number}, and does not know that client's secret"
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
        sizes = {split: max(0, count) for split, count in header["sizes"].items()}
        member = self.members.get(number)
        if member is None:
            taken = {other.name for other in self.members.values()}
            name = cut(clean(header["name"]).strip(), LONGEST_NAME)
            name = f"client-{number}" if not name or name in taken else name
            self.members[number] = Member(name, sizes)
            told.append(f"{name} is there (client {number}), {sizes['train']} training examples")
            return
        told.append(f"{member.name} is there again")
        if member.sizes != sizes:
            told.append(f"{member.name} has other rows than before: its weight changes with them")
            member.sizes = sizes
        if member.kept and member.kept not in header["states"]:
            told.append(f"{member.name} has lost its personal state of round {member.kept}: it begins anew")
            member.kept = member.best = 0
        if member.best and member.best not in header["states"]:
            member.best = member.kept
