"""The secure sum of `deployment/flower/secure_sum.py` in one process: its error by settings, its bytes, its seconds.

    python benchmarks/secure_sum.py > benchmarks/results/secure_sum.md

Needs flwr and no jax: `pip install 'flwr>=1.42,<1.43'` and `PYTHONPATH=src`. All four stages run over Flower's own code
and records, with a grid in this process in the network's place; between two messages of a node its context is all that
is kept of it, as with a SuperNode. The error is ‖mean − exact‖ over ‖exact‖, the exact mean in float64. Entries are
heavy-tailed (Student's t with 4 degrees of freedom), of rms 2e-3 before they are weighted.
"""

import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np

from fedvlm_jax.deployment.flower import secure_sum
from fedvlm_jax.deployment.flower.secure_sum import STAGES, Fetch, SecretSum, answer_stage, ask_sum, is_stage

ENTRIES = 45_056  # of a message of Florence2-nano at rank 8
RMS = 2e-3
FLOWER = 2**22
"""Levels of `SecAggPlusWorkflow` unless it is told otherwise, with a range of 8 and a largest weight of 1000."""


class LocalGrid:
    """Flower's Grid with nodes that answer at once.

    Attributes:
        contexts: what each node keeps between messages.
        stages: (node, stage) of every message that was answered, in order.
        alter: (node, stage, reply) -> what comes back instead.
        seconds: of the processor that the nodes have taken, all together.
    """

    def __init__(self, fetches: Mapping[int, Fetch], gone: Iterable[tuple[int, str]] = ()) -> None:
        """Make a grid of nodes that keep what `fetches` says; `gone` are those that do not answer a stage or later."""
        from flwr.app import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # a ServerApp's process has them
        self.contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in fetches}
        self.stages: list[tuple[int, str]] = []
        self.seconds = 0.0
        self.alter: Callable[[int, str, Any], Any] = lambda node, stage, reply: reply
        self._fetches, self._gone, self._left = fetches, set(gone), set[int]()
        self._replies: dict[str, Any] = {}
        self._names = (str(number) for number in itertools.count(1))

    def get_node_ids(self) -> list[int]:
        return list(self._fetches)

    def push_messages(self, messages: Sequence[Any]) -> list[str]:
        return [self._answer(copy.deepcopy(message)) for message in messages]

    def pull_messages(self, names: Iterable[str]) -> list[Any]:
        return [self._replies.pop(name) for name in list(names) if name in self._replies]

    def _answer(self, message: Any) -> str:
        name, node = next(self._names), message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = name
        assert is_stage(message)
        stage = message.content[secure_sum.STAGE_RECORD]["stage"]
        if (node, stage) in self._gone:
            self._left.add(node)
        if node not in self._left:
            self.stages.append((node, stage))
            start = time.process_time()
            reply = answer_stage(message, self.contexts[node], self._fetches[node])
            self.seconds += time.process_time() - start
            self._replies[name] = self.alter(node, stage, reply)
        return name


def make_messages(nodes: int, weights: tuple[int, int], entries: int = ENTRIES, seed: int = 0) -> tuple[Any, Any]:
    """Make messages [nodes, entries], float32, and weights [nodes], whole numbers, both bounds among them."""
    rng = np.random.default_rng(seed)
    messages = (RMS / np.sqrt(2) * rng.standard_t(4, (nodes, entries))).astype(np.float32)
    numbers = rng.integers(*weights, nodes, endpoint=True)
    numbers[[0, -1]] = weights
    return messages, numbers


def make_grid(vectors: Any, gone: Iterable[tuple[int, str]] = ()) -> LocalGrid:
    """Make a grid of nodes 1, 2, … that keep these."""
    return LocalGrid({node: lambda header, node=node: vectors[node - 1] for node in range(1, len(vectors) + 1)}, gone)


def run_sum(
    messages: Any, weights: Any, gone: Iterable[tuple[int, str]] = (), scale: float = 0, clip: float = 0
) -> tuple[SecretSum, float]:
    """Ask nodes 1, 2, … for the sum of their messages times weight and scale.

    By default the scale is one over the sum of the weights, and the clip 1.25 times the largest entry, as a
    deployment has it. Returned is also the relative error of the mean against float64 over the nodes that counted.
    """
    scale = scale or 1 / weights.sum()
    vectors = messages * (weights * scale).astype(np.float32)[:, None]
    grid = make_grid(vectors, gone)
    headers = {node: {"round": 1} for node in grid.get_node_ids()}
    found = ask_sum(grid, headers, clip=clip or 1.25 * float(np.abs(vectors).max()), timeout=0.2)
    counted = [node - 1 for node in found.nodes]
    mean = found.vector.astype(np.float64) / (weights[counted] * scale).sum()
    exact = np.average(messages[counted].astype(np.float64), axis=0, weights=weights[counted])
    return found, float(np.linalg.norm(mean - exact) / np.linalg.norm(exact))


@contextlib.contextmanager
def rounding(levels: int) -> Any:
    """Round to so many levels."""
    with patch.object(secure_sum, "LEVELS", levels):
        yield


def print_table(*rows: Sequence[Any]) -> None:
    """Print a Markdown table, its header first; numbers are to the right."""
    head, *rest = rows
    print("| " + " | ".join(head) + " |\n|" + " ---: |" * len(head))
    for row in rest:
        print(
            "| " + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in row) + " |",
            flush=True,
        )
    print()


def list_errors() -> Iterable[Sequence[Any]]:
    """Settings one after the other; flwr divides by the largest weight that it is told to expect, which is 1000."""
    yield ("nodes", "examples of a node", "flwr's defaults", "weights known", "and the range", "and 2³⁰ levels: used")
    for nodes, weights in itertools.product((3, 16), ((11, 13), (1, 1000))):
        messages, numbers = make_messages(nodes, weights)
        with rounding(FLOWER):
            settings = ({"clip": 8, "scale": 1 / 1000}, {"clip": 8, "scale": 1 / weights[1]}, {})
            errors = [run_sum(messages, numbers, **setting)[1] for setting in settings]
        yield (nodes, f"{weights[0]} to {weights[1]}", *errors, run_sum(messages, numbers)[1])


def list_losses() -> Iterable[Sequence[Any]]:
    """A node leaves: the lightest, the heaviest, and one beside which the others weigh nothing."""
    yield ("examples", "those of the node that leaves", "before it answers", "nodes that count", "error")
    cases = [(np.array([1, 30, 400, 1000]), stage, node) for stage in STAGES for node in (1, 4)]
    for weights, stage, node in (*cases, (np.array([1] * 15 + [1000]), STAGES[2], 16)):
        messages, _ = make_messages(len(weights), (1, 1))
        found, error = run_sum(messages, weights, [(node, stage)])
        told = ", ".join(map(str, weights)) if len(weights) < 5 else "15 times 1, and 1000"
        yield (told, weights[node - 1], stage.replace("_", " "), len(found.nodes), error)


def list_costs() -> Iterable[Sequence[Any]]:
    yield ("nodes", "entries", "bytes up a node", "times float32", "CPU ms of a node", "CPU seconds of the server")
    for nodes, entries in ((3, ENTRIES), (8, ENTRIES), (16, ENTRIES), (32, ENTRIES), (3, 2**20)):
        grid = make_grid(make_messages(nodes, (1, 1), entries)[0])
        start = time.process_time()
        found = ask_sum(grid, {node: {} for node in grid.get_node_ids()}, clip=1, timeout=1)
        server = time.process_time() - start - grid.seconds
        times, own = f"{found.bytes_up / 4 / entries:.3f}", f"{1000 * grid.seconds / nodes:.0f}"
        yield (nodes, f"{entries:,}", f"{found.bytes_up:,}", times, own, f"{server:.2f}")


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    for rows in (list_errors, list_losses, list_costs):
        print_table(*rows())
