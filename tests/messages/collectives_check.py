"""Runs by itself with four forced host devices and prints the collectives of compiled rounds of the toy as JSON.

A device count is fixed when jax starts, so this cannot happen inside the process of the tests.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from toy import RATES, make_cohort, make_method, start_states

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import place_waves, replicate
from fedvlm_jax.federation.round import make_round, to_waves
from fedvlm_jax.messages.compression import with_compression
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.messages.secure_sum import make_secure_sum
from fedvlm_jax.utils import tree

CLIENTS = 8
WAYS = {
    "int8": MessageOptions(compress="int8"),
    "top-k": MessageOptions(compress="top-k"),
    "secure": MessageOptions(secure=True),
}
COLLECTIVE = re.compile(
    r"= (\w+)\[.* (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def run(options, devices):
    """-> the shared factors after a round, and (type, kind) of each collective of its program."""
    _, params, trainer, method, adapter = make_method("plora", cohort=CLIENTS, places=CLIENTS, population=CLIENTS)
    method = with_compression(method, options)
    if options.secure:
        method = with_pool(method, make_secure_sum(options, CLIENTS))
    mesh = make_mesh(devices)
    server = replicate(mesh, method.init(adapter=adapter))
    arguments = (
        replicate(mesh, params),
        server,
        place_waves(mesh, to_waves(start_states(method, server, CLIENTS), 2)),
        place_waves(mesh, to_waves(make_cohort(CLIENTS), 2)),
        jnp.full(CLIENTS, 1 / CLIENTS),
        RATES,
        jnp.int32(1),
        jax.random.key(2),
    )
    compiled = make_round(method, trainer, mesh).lower(*arguments).compile()
    found = [match.groups() for match in map(COLLECTIVE.search, compiled.as_text().splitlines()) if match]
    return tree.flatten(compiled(*arguments).server["shared"]), sorted(found)


def main():
    found = {}
    for name, options in WAYS.items():
        alone, none = run(options, 1)
        spread, collectives = run(options, 4)
        apart = max(float(np.abs(np.asarray(spread[path]) - np.asarray(alone[path])).max()) for path in alone)
        found[name] = {"collectives": collectives, "alone": none, "apart": apart}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
