"""Importing the package, every module of it, changes nothing of the process and starts no device."""

import subprocess
import sys

LOOK = """
import gc, importlib, os, pkgutil, signal, socket, sys, threading, warnings
# Libraries set what they set when they are imported; what is compared is what this package adds to that.
import datasets, flax.linen, grain, jax, matplotlib, numpy, optax, orbax.checkpoint, PIL.Image, PIL.ImageCms, rich
import scipy.stats, transformers, tyro
from jax._src import xla_bridge

socket.socket.connect = lambda *given: sys.exit(f"a connection to {given[1:]}")

def look():
    return {
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "jax": dict(jax.config.values),
        "collector": gc.get_threshold(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "folder": os.getcwd(),
        "threads": threading.active_count(),
    }

before = look()
import fedvlm_jax

names = [module.name for module in pkgutil.walk_packages(fedvlm_jax.__path__, "fedvlm_jax.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
after = look()
assert len(names) > 150, names
print([key for key in before if before[key] != after[key]], xla_bridge.backends_are_initialized())
"""


def test_importing_changes_nothing_of_the_process():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[] False"


def test_rounds_and_plans_load_no_pyarrow():
    look = "import fedvlm_jax.federation.simulator, fedvlm_jax.analysis.plan, sys; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True)
