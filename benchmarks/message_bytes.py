"""What compression does to real updates: its error and bytes, of one client and of the mean, on the model that ships.

    python benchmarks/message_bytes.py > benchmarks/results/message_bytes.md

Eight rounds of all sixteen emoji clients, four steps of batch 8, the rates that `experiments/methods_emoji.py` chose;
the updates are those of a run that sends them whole. *one client*: ‖sent − update‖ / ‖update‖, the mean over clients
and rounds. *mean*: the same of the uniform mean over clients, in one round. *sum*: of the mean, added up over the
rounds, where errors of rounds may cancel. int8 has a scale for a whole tensor, for each layer's matrix, as
`--messages.compress int8` has, or for each direction of the rank; *nearest* rounds to the nearest level, not at random.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness.command import name_command

from fedvlm_jax.config.run_options import Run, TrainOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.messages.compression import decode_int8, decode_top_k, encode_int8, encode_top_k
from fedvlm_jax.reporting.tables import Table, to_markdown
from fedvlm_jax.training.experiment import make_simulator, open_experiment
from fedvlm_jax.training.loaded_model import LoadedModel, load_model
from fedvlm_jax.utils import tree

ROUNDS = 8
RATES = {"plora": (5e-3, 2e-3), "ffa-lora": (1e-2, 5e-3), "fed-sb": (1e-2, 5e-3)}
KEEPS = (0.25, 0.1, 0.01)
Message = dict[str, Any]
Send = Callable[[Sequence[Message], int], tuple[list[Message], int]]
"""(a client's updates, round by round, its number) -> what the server has of them, and the bytes of one."""


def read_updates(method: str, model: LoadedModel | None = None, rounds: int = ROUNDS) -> tuple[LoadedModel, list[Any]]:
    """Run a method's rounds; return the messages [K, …] of each."""
    train = TrainOptions(
        rounds=rounds, local_steps=4, batch_size=8, learning_rate_a=RATES[method][0], learning_rate_b=RATES[method][1],
        weighting="uniform",
    )  # fmt: skip
    run = Run(method=method, data=emoji.Options(prompt="client-language"), train=train)
    model = model or load_model(run)
    experiment = open_experiment(run, model)
    simulator = make_simulator(experiment)
    rates = {"a": train.learning_rate_a, "b": train.learning_rate_b}
    found = []
    for number in range(1, rounds + 1):
        read = simulator.read_round(number)
        found.append(jax.device_get(simulator._run(read, rates).messages))  # pyright: ignore[reportPrivateUsage]
        simulator.run_round(read, rates)
    return model, found


def regroup(message: Message, grouping: str) -> Message:
    """Lay a message out so that each matrix of it is what one scale is for."""
    if grouping == "matrix":
        return message
    if grouping == "tensor":
        return jax.tree.map(lambda leaf: leaf.reshape(1, -1), message)
    return jax.tree.map(lambda leaf: leaf[..., None, :], message)


def round_to_int8(grouping: str, *, nearest: bool = False) -> Send:
    """Make the sending of integers; a key for each round."""

    @jax.jit
    def send(message: Message, key: Any) -> tuple[Message, Message]:
        grouped = regroup(message, grouping)
        encoded = encode_int8(grouped, key)
        if nearest:
            ones = jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf), axis=(-2, -1), keepdims=True) / 127, grouped)
            sent = jax.tree.map(lambda leaf, one: jnp.round(leaf / one) * one, grouped, ones)
        else:
            sent = decode_int8(encoded, grouped)
        return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), sent, message), encoded

    def run(updates: Sequence[Message], client: int) -> tuple[list[Message], int]:
        both = [send(update, jax.random.key(1000 * client + number)) for number, update in enumerate(updates)]
        return [sent for sent, _ in both], tree.count_bytes(both[0][1])

    return run


def send_largest(keep: float, *, feedback: bool) -> Send:
    """Make the sending of the largest entries, with what is left added to the next update or without."""

    @jax.jit
    def send(update: Message, owed: Message) -> tuple[Message, Message, Message]:
        whole = jax.tree.map(jnp.add, update, owed)
        encoded = encode_top_k(whole, keep)
        sent = decode_top_k(encoded, whole)
        return sent, jax.tree.map(jnp.subtract, whole, sent), encoded

    def run(updates: Sequence[Message], client: int) -> tuple[list[Message], int]:
        del client
        owed, all_sent, size = jax.tree.map(np.zeros_like, updates[0]), list[Message](), 0
        for update in updates:
            sent, left, encoded = send(update, owed)
            owed, size = left if feedback else owed, tree.count_bytes(encoded)
            all_sent.append(sent)
        return all_sent, size

    return run


def relative(error: Any, of: Any) -> float:
    """Compute the norm of one row of numbers over that of another."""
    return float(np.linalg.norm(error) / np.linalg.norm(of))


def measure(rounds: Sequence[Any], send: Send) -> tuple[float, float, float, int]:
    """Measure the error of a client's update, of the mean, and of the mean's sum over the rounds; and the bytes."""
    count = len(jax.tree.leaves(rounds[0])[0])
    exact, sent, size = [], [], 0
    for client in range(count):
        updates = [jax.tree.map(lambda leaf: leaf[client], one) for one in rounds]  # noqa: B023
        received, size = send(updates, client)
        exact.append([flatten(update) for update in updates])
        sent.append([flatten(update) for update in received])
    exact, sent = np.asarray(exact, np.float64), np.asarray(sent, np.float64)  # [K, rounds, entries]
    rows = [part.reshape(-1, part.shape[-1]) for part in (sent, exact)]
    alone = [relative(s - e, e) for s, e in zip(*rows, strict=True)]
    mean_exact, mean_sent = exact.mean(axis=0), sent.mean(axis=0)
    of_means = [relative(s - e, e) for s, e in zip(mean_sent, mean_exact, strict=True)]
    total = relative(mean_sent.sum(axis=0) - mean_exact.sum(axis=0), mean_exact.sum(axis=0))
    return float(np.mean(alone)), float(np.mean(of_means)), total, size


def flatten(message: Message) -> Any:
    """Lay a message out as one row."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(message)])


def list_ways() -> dict[str, Send]:
    """List what is measured."""
    ways = {f"int8, a scale per {grouping}": round_to_int8(grouping) for grouping in ("tensor", "matrix", "direction")}
    ways["int8 per matrix, nearest"] = round_to_int8("matrix", nearest=True)
    for keep in KEEPS:
        ways[f"top-k {keep:g}, no feedback"] = send_largest(keep, feedback=False)
        ways[f"top-k {keep:g}"] = send_largest(keep, feedback=True)
    return ways


def main() -> None:
    """Print the tables."""
    model, ways = None, list_ways()
    for method in RATES:
        model, rounds = read_updates(method, model)
        whole = sum(leaf[0].nbytes for leaf in jax.tree.leaves(rounds[0]))
        rows: list[tuple[str, ...]] = [("float32", "0", "0", "0", f"{whole:,}", "1")]
        for name, send in ways.items():
            alone, mean, total, size = measure(rounds, send)
            rows.append((name, *(f"{100 * x:.2f} %" for x in (alone, mean, total)), f"{size:,}", f"{size / whole:.3f}"))
        columns = ("sent as", "one client", "mean", "sum", "bytes", "of float32")
        print(to_markdown(Table(f"{method}, {len(rounds)} rounds of 16 clients", columns, tuple(rows))))
        print()
    print(f"Made by `{name_command()}`.")


if __name__ == "__main__":
    main()
