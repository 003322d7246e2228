"""Runs by itself with four forced host devices: a run whole, and again stopped and resumed, and evaluated once more.
Arguments: a file with the run's options, the round to stop after. Prints as JSON what cannot be read from the folders,
`<out>` and `<out>-halved`.

A device count is fixed when jax starts, so this cannot happen inside the process of the tests.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from tiny_run import StopAfter, StopError

from fedvlm_jax.config.run_options import SystemOptions, from_json
from fedvlm_jax.errors import UserError
from fedvlm_jax.training import evaluate, federated_run
from fedvlm_jax.training.experiment import make_simulator, open_experiment
from fedvlm_jax.training.loaded_model import load_model


def main():
    run = from_json(json.loads(Path(sys.argv[1]).read_text()))
    loaded = load_model(run)
    federated_run.train(run, model=loaded)
    halved = dataclasses.replace(run, out=run.out.with_name(run.out.name + "-halved"))
    try:
        federated_run.train(halved, StopAfter(int(sys.argv[2])), loaded)
    except StopError:
        federated_run.resume(halved.out)  # on the mesh that its folder tells
    try:
        refused = str(load_model(dataclasses.replace(run, system=SystemOptions(mesh="clients=4,model=2"))))
    except UserError as error:
        refused = str(error)
    federation = make_simulator(open_experiment(run, loaded))
    leaves = jax.tree.leaves(federation.base)  # with what the method adds to it
    held = {
        str(device): sum(
            shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device
        )
        for device in jax.devices()
    }
    found = {
        "evaluated": evaluate.evaluate(run.out),
        "base_bytes": sum(leaf.nbytes for leaf in leaves),
        "held_bytes": held,
        "refused": refused,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
