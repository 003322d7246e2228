"""Many decompositions in one program end: batched ones on a CPU of two cores waited for each other for ever."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from fedvlm_jax import lora
from fedvlm_jax.federation.diagnostics import examine

draw = lambda number, *shape: jax.random.normal(jax.random.key(number), shape)
wide = {f"s{n}": {"a": draw(n, 2, 64, 32), "b": draw(n, 2, 32, 64), "scale": jnp.ones(2)} for n in range(16)}
cut = jax.jit(lambda adapter: lora.truncate(adapter, 4))
clients = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), wide)
health = jax.jit(examine)
for _ in range(10):
    jax.block_until_ready(cut(wide))
    jax.block_until_ready(health(clients, jnp.ones(3) / 3))
print("ended")
"""


@pytest.mark.broad
def test_decompositions_do_not_wait_for_each_other() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["ended"], done.stderr
