"""The secure mean of `deployment/flower/secure_sum.py` in one process: its error by settings, its bytes, its seconds.

    python benchmarks/secure_sum.py   # needs flwr, not jax: pip install 'flwr>=1.42,<1.43'

All four stages run over Flower's own code and records, with a grid in this process in the network's place; between
two messages of a node its context is all that is kept of it, as with a SuperNode. The error is ‖mean − exact‖ over
‖exact‖, the exact mean in float64. Entries are those of a heavy-tailed message (Student's t with 4 degrees of freedom)
of rms 2e-3.
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
from fedvlm_jax.deployment.flower.secure_sum import Fetch, SecureMean, answer_stage, ask_mean, is_stage

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
        seconds: that the nodes have worked, all together.
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
            start = time.perf_counter()
            reply = answer_stage(message, self.contexts[node], self._fetches[node])
            self.seconds += time.perf_counter() - start
            self._replies[name] = self.alter(node, stage, reply)
        return name


def make_messages(nodes: int, weights: tuple[int, int], entries: int = ENTRIES, seed: int = 0) -> tuple[Any, Any]:
    """Make messages [nodes, entries], float32, and weights [nodes], whole numbers, both bounds among them."""
    rng = np.random.default_rng(seed)
    messages = (RMS / np.sqrt(2) * rng.standard_t(4, (nodes, entries))).astype(np.float32)
    numbers = rng.integers(*weights, nodes, endpoint=True)
    numbers[[0, -1]] = weights
    return messages, numbers


def make_grid(messages: Any, weights: Any, gone: Iterable[tuple[int, str]] = ()) -> LocalGrid:
    """Make a grid of nodes 1, 2, … that keep these."""
    kept = {node: (messages[node - 1], float(weights[node - 1])) for node in range(1, len(weights) + 1)}
    return LocalGrid({node: lambda header, node=node: kept[node] for node in kept}, gone)


def run_sum(
    messages: Any, weights: Any, gone: Iterable[tuple[int, str]] = (), clip: float = 0, largest: float = 0
) -> tuple[SecureMean, float]:
    """Ask nodes 1, 2, … for the mean: -> it, its relative error against float64 over the nodes that counted."""
    kept = {
        node: (vector, float(weight)) for node, (vector, weight) in enumerate(zip(messages, weights, strict=True), 1)
    }
    grid = LocalGrid({node: lambda header, node=node: kept[node] for node in kept}, gone)
    mean = ask_mean(
        grid, grid.get_node_ids(), {"round": 1}, clip=clip or 1.25 * float(np.abs(messages).max()),
        largest_weight=largest or float(max(weights)), threshold=2 / 3, timeout=0.2,
    )  # fmt: skip
    counted = [node - 1 for node in mean.nodes]
    exact = np.average(messages[counted].astype(np.float64), axis=0, weights=weights[counted])
    return mean, float(np.linalg.norm(mean.vector - exact) / np.linalg.norm(exact))


def run_premultiplied(messages: Any, weights: Any) -> float:
    """The error where each node sends its vector times wₖ over the largest, and all have the same weight."""
    scaled = messages * (weights / weights.max())[:, None]
    mean, _ = run_sum(scaled.astype(np.float64), np.ones(len(weights)))
    vector = mean.vector.astype(np.float64) * len(weights) * weights.max() / weights.sum()
    exact = np.average(messages.astype(np.float64), axis=0, weights=weights)
    return float(np.linalg.norm(vector - exact) / np.linalg.norm(exact))


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
    yield ("nodes", "weights", "flwr's defaults", "largest weight known", "and the range", "and the levels: `ask_mean`", "vectors multiplied by weights before")  # fmt: skip # noqa: E501
    for nodes, weights in itertools.product((3, 16), ((11, 13), (1, 1000))):
        messages, numbers = make_messages(nodes, weights)
        with rounding(FLOWER):
            settings = ({"clip": 8, "largest": 1000}, {"clip": 8}, {})
            errors = [run_sum(messages, numbers, **setting)[1] for setting in settings]
        errors += [run_sum(messages, numbers)[1], run_premultiplied(messages, numbers)]
        yield (nodes, f"{weights[0]} to {weights[1]}", *errors)


def list_losses() -> Iterable[Sequence[Any]]:
    yield ("of weights 1, 30, 400, 1000 this one leaves", "before it answers", "nodes that count", "error")
    messages, weights = make_messages(4, (1, 1000))[0], np.array([1, 30, 400, 1000])
    for stage, node in itertools.product(("setup", "share_keys", "collect_masked_vectors", "unmask"), (1, 4)):
        mean, error = run_sum(messages, weights, [(node, stage)])
        yield (weights[node - 1], stage, len(mean.nodes), error)
    messages, weights = make_messages(16, (1, 1))[0], np.array([1] * 15 + [1000])
    mean, error = run_sum(messages, weights, [(16, "collect_masked_vectors")])
    yield ("1000 of 16, the others 1 each", "collect_masked_vectors", len(mean.nodes), error)


def list_costs() -> Iterable[Sequence[Any]]:
    yield ("nodes", "entries", "bytes up a node", "times float32", "ms of a node", "seconds of the server")
    for nodes, entries in ((3, ENTRIES), (8, ENTRIES), (16, ENTRIES), (32, ENTRIES), (3, 2**20)):
        messages, weights = make_messages(nodes, (11, 13), entries)
        grid = make_grid(messages, weights)
        mean = ask_mean(
            grid, grid.get_node_ids(), {}, clip=1, largest_weight=13, threshold=2 / 3, timeout=1
        )  # fmt: skip
        times, own = f"{mean.bytes_up / 4 / entries:.3f}", f"{1000 * grid.seconds / nodes:.0f}"
        yield (nodes, f"{entries:,}", f"{mean.bytes_up:,}", times, own, f"{mean.seconds - grid.seconds:.2f}")


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    for rows in (list_errors, list_losses, list_costs):
        print_table(*rows())
