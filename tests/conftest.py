"""Compiling quickly matters more to tests than running quickly: they run each program once, on little data."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
