"""Runs by itself with four forced host devices: a round's collectives and results with noise in it, as JSON.

Arguments are METHOD:POOL; each is compiled on one device and on four, for the toy model.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy import RATES, make_cohort, make_method, start_states

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import place_waves, replicate
from fedvlm_jax.federation.round import make_round, to_waves
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.privacy.banded import make_banded_pool
from fedvlm_jax.privacy.gaussian import make_gaussian_pool
from fedvlm_jax.utils import tree

CLIENTS = 8
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
POOLS = {
    "gaussian": lambda: make_gaussian_pool(1.0, 0.1, CLIENTS),
    "adaptive": lambda: make_gaussian_pool(0.5, 0.1, CLIENTS, 0.5),
    "banded": lambda: make_banded_pool(1.0, 0.1, CLIENTS, 3, 6),
}


def run(case, devices, waves):
    """-> all that a round's server has, and the program's text."""
    name, pool = case.split(":")
    _, params, trainer, method, adapter = make_method(name, cohort=CLIENTS, places=CLIENTS)
    method = method if pool == "none" else with_pool(method, POOLS[pool]())
    mesh = make_mesh(devices)
    server = method.init(adapter=adapter)
    states = start_states(method, server, CLIENTS)
    arguments = (
        replicate(mesh, params),
        replicate(mesh, server),
        place_waves(mesh, to_waves(states, waves)),
        place_waves(mesh, to_waves(make_cohort(CLIENTS), waves)),
        jnp.full(CLIENTS, 1 / CLIENTS),
        RATES,
        jnp.int32(1),
        jax.random.key(2),
    )
    compiled = make_round(method, trainer, mesh).lower(*arguments).compile()
    out = compiled(*arguments)
    found = tree.flatten({"server": out.server, "health": out.health})
    return {path: np.asarray(leaf, np.float64) for path, leaf in found.items()}, compiled.as_text()


def main():
    found = {}
    for case in sys.argv[1:]:
        (alone, _), (spread, text) = run(case, 1, 1), run(case, 4, 2)
        counted = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
        apart = max(float(np.max(np.abs(spread[path] - leaf), initial=0)) for path, leaf in alone.items())
        found[case] = {"collectives": counted, "apart": apart}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
