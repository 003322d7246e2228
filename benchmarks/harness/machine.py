"""What the machine is, and the matmul rate that it reaches: the measure that a round's arithmetic is held against."""

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.memory import GIB, read_device_bytes
from fedvlm_jax.run_dir.artifacts import describe_environment

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}
"""Flags of processors that multiply bfloat16 themselves: x86, and the last ARM's."""


def describe_machine() -> dict[str, Any]:
    """Versions, commit, processor or accelerator, cores this process may use, and memory."""
    about = describe_environment()
    device, memory = jax.devices()[0], read_device_bytes(make_mesh(1))
    about["machine"] |= {
        "processor": _read_processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [f"{len(jax.devices())} x {device.device_kind}", device.platform],
        "device_memory_gib": memory and round(memory / GIB, 1),
    }
    return about


def has_bfloat16_units() -> bool:
    """Does this accelerator or processor multiply bfloat16 itself? False too where the system does not tell."""
    return jax.default_backend() != "cpu" or not BFLOAT16.isdisjoint(_read_cpuinfo("flags", "Features").split())


class MatmulPeak:
    """Matmuls of square matrices; the rate of the best size counts.

    Sizes are tried once; after that every call measures the best of them again, so that it can be run between the
    rounds that are compared with it. It takes the best of a while, because neighbours on a shared host slow a single
    product down by half.

    Args:
        sizes: rows of the matrices that are tried; by default what suits the device.
        seconds: how long a call measures; once at least.
        dtype: of the matrices; float32 is computed as such wherever it is.
    """

    def __init__(self, sizes: tuple[int, ...] = (), seconds: float = 1.0, dtype: str = "float32") -> None:
        sizes = sizes or ((1024, 1536, 2048) if jax.default_backend() == "cpu" else (4096, 8192))
        self._seconds = seconds
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
        self._multiply = multiply
        self._matrices = {size: jax.random.normal(jax.random.key(size), (size, size), dtype) for size in sizes}
        for matrix in self._matrices.values():
            jax.block_until_ready(multiply(matrix, matrix))
        self.size = max(sizes, key=lambda size: max(self._measure(size) for _ in range(3)))

    def __call__(self) -> float:
        """Operations per second, the best of its while."""
        ends, best = time.perf_counter() + self._seconds, self._measure(self.size)
        while time.perf_counter() < ends:
            best = max(best, self._measure(self.size))
        return best

    def _measure(self, size: int) -> float:
        matrix = self._matrices[size]
        began = time.perf_counter()
        jax.block_until_ready(self._multiply(matrix, matrix))
        return 2 * size**3 / (time.perf_counter() - began)


def _read_processor() -> str:
    return _read_cpuinfo("model name") or platform.processor() or platform.machine()


def _read_cpuinfo(*names: str) -> str:
    """What Linux says of the first core under the first of these names that is there; otherwise nothing."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""
