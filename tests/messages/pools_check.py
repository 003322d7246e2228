"""Runs by itself with four forced devices; prints as JSON what each pool's compiled round sends between them, and how
far its result is from one device's; `test_pool_collectives.py` reads that. Arguments: pools, `mean` for none.
"""

import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from toy import RATES, make_cohort, make_method, start_states

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import place_waves, replicate
from fedvlm_jax.federation.round import make_round, to_waves
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.messages.robust import make_pool

CLIENTS = 16
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def play(name, devices):
    _, params, trainer, method, adapter = make_method("plora", population=CLIENTS, cohort=CLIENTS, places=CLIENTS)
    pool = make_pool(MessageOptions(pool=name, hostile=3, bound=0.05))
    method = method if pool is None else with_pool(method, pool)
    mesh, server = make_mesh(devices), method.init(adapter=adapter)
    arguments = (
        replicate(mesh, params),
        replicate(mesh, server),
        place_waves(mesh, to_waves(start_states(method, server, CLIENTS), 2)),
        place_waves(mesh, to_waves(make_cohort(CLIENTS), 2)),
        jnp.full(CLIENTS, 1 / CLIENTS),
        RATES,
        jnp.int32(1),
        jax.random.key(0),
    )
    compiled = make_round(method, trainer, mesh).lower(*arguments).compile()
    text = compiled.as_text()
    return jax.device_get(compiled(*arguments).server["shared"]), {
        kind: count for kind in COLLECTIVES if (count := len(re.findall(rf" {kind}(?:-start)?\(", text)))
    }


def main():
    found = {}
    for name in sys.argv[1:]:
        (alone, _), (shared, collectives) = play(name, 1), play(name, 4)
        error = max(float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (alone, shared)), strict=True))
        found[name] = {"collectives": collectives, "error": error}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
