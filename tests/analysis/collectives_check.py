"""Runs by itself with eight forced host devices, for `test_collectives.py`: prints a small program's collectives."""

import json
import os
import sys
from dataclasses import asdict

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fedvlm_jax.analysis.collectives import find_collectives
from fedvlm_jax.distributed.mesh import make_mesh

mesh = make_mesh(4, 2)


def work(x):  # [24, 40] on every device
    def turn(x, _):
        return jnp.tanh(jax.lax.psum(x, "clients")), None

    x, _ = jax.lax.scan(turn, x, None, length=3)
    return jax.lax.psum(x.sum(axis=0), ("clients", "model"))


spread = PartitionSpec("clients", "model")
mapped = jax.shard_map(work, mesh=mesh, in_specs=spread, out_specs=PartitionSpec(), check_vma=False)
compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((4 * 24, 2 * 40), jnp.float32)).compile()
found, unknown = find_collectives(compiled.as_text(), mesh)
sys.stdout.write(json.dumps({"collectives": [asdict(one) for one in found], "unknown": unknown}) + "\n")
