"""A round of FedAvg over LoRA adapters in Flower's simulation: `pytorch_peft.py`'s client in a ClientApp, run by Ray.

    python flower_peft.py MODEL WORLD         # an interpreter that has torch, transformers, peft and flwr[simulation]

Arguments, orders and answers are those of `pytorch_peft.py`, so that rounds can be run in turn with others: the
ServerApp waits for an order, runs a round of Flower's FedAvg from the world's start over all its clients, and answers.
Of an order `save` and `reload` are read: rounds are in float32, with features given, and a client has one thread. An
answer has `seconds`, from the order to the mean, and `clients_cpu`, the processor seconds inside of the clients'
functions. Nothing of fedvlm_jax is in it.

Each of Ray's processes, of which there are as many as processors, loads the model once and keeps it; with `reload` a
client loads it for every message, as Flower's examples do (examples/flowertune-llm, `model = get_model(cfg.model)`).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before flwr is imported. Ray would have its workers give way to whatever else a machine does (nice 15).
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from pytorch_peft import Peer, from_arrays, to_arrays

if TYPE_CHECKING:
    from typing import TextIO

client_app = ClientApp()


@functools.cache
def open_peer(model: str, world: str) -> Peer:
    """The model and all clients' batches, once in a process."""
    torch.set_num_threads(1)
    return Peer(Path(model), Path(world))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's round: the factors that came, its own steps, the factors that go back."""
    began, config = time.process_time(), message.content["config"]
    peer = open_peer(config["model"], config["world"])
    if config["reload"]:
        peer.models.clear()
    model, _ = peer.load("float32")
    steps = peer.read("cached", torch.float32, model.config)[context.node_config["partition-id"]]
    state = peer.train(model, message.content["arrays"].to_torch_state_dict(), steps)
    metrics = {"num-examples": sum(len(batch["labels"]) for batch in steps), "cpu": time.process_time() - began}
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)}), reply_to=message)


def serve(grid: Grid, answers: TextIO, model: str, world: str, clients: int) -> None:
    """Run a round of FedAvg for every order on stdin."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    peer = Peer(Path(model), Path(world))
    start = from_arrays(peer.places, peer.start)
    for number, line in enumerate(sys.stdin, 1):
        order, began = json.loads(line), time.perf_counter()
        config = ConfigRecord({"model": model, "world": world, "reload": order.get("reload", False)})
        messages = strategy.configure_train(number, ArrayRecord(start), config, grid)
        replies = list(grid.send_and_receive(messages))
        mean, _ = strategy.aggregate_train(number, replies)
        if failed := [reply.error.reason for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} of {clients} clients failed: {failed[0]}")
        seconds = time.perf_counter() - began
        if order.get("save"):
            np.savez(order["save"], **to_arrays(peer.places, mean.to_torch_state_dict()))
        clients_cpu = sum(reply.content["metrics"]["cpu"] for reply in replies)
        print(json.dumps({"seconds": seconds, "clients_cpu": clients_cpu}), file=answers, flush=True)


def main() -> None:
    """Start the simulation, which ends with stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    model, world = sys.argv[1:]
    with np.load(world) as file:
        clients = len(file["indices"])
    server_app = ServerApp()

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        del context
        serve(grid, answers, model, world, clients)

    resources: dict[str, Any] = {"client_resources": {"num_cpus": 1}}
    run_simulation(server_app, client_app, clients, backend_config=resources)


if __name__ == "__main__":
    # As a module of its own name, because what __main__ defines Ray sends along by value: the model would be loaded
    # anew for every message.
    import flower_peft

    flower_peft.main()
