"""Devices to compile for: those of a TPU topology that is not there, or CPU devices, as many as are asked for."""

import contextlib
import importlib.util
import os
from typing import Any

import jax

from fedvlm_jax.analysis.accelerators import CPU, Topology
from fedvlm_jax.errors import UserError

__all__ = ["open_devices"]

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask about this machine's TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do: the topology is named
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened, so several processes may compile
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""What keeps libtpu from asking for, and complaining about, hosts that a compiler has no need of."""


def open_devices(topology: Topology) -> list[Any]:
    """The devices of a topology; those of a TPU can be compiled for and nothing else.

    This process computes on the CPU then, and its number of CPU devices is settled: so it comes before anything else
    touches a device.

    Raises:
        UserError: libtpu is not installed or refuses the topology, or another number of CPU devices is settled already.
    """
    _stay_on_cpu()
    if topology.kind == CPU:
        return _force_cpu_devices(topology.devices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology {topology} is compiled by libtpu, which is not installed: pip install "fedvlm-jax[plan]" '
            "(no TPU is needed), or plan for --topology cpu"
        )
    from jax.experimental import topologies

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _drop_cpu_flags()
    options: dict[str, Any] = {}
    if topology.devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # its two cores as one device, as jax has them on a v4
    shape = "x".join(map(str, topology.shape))
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.kind}:{shape}", **options)
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
        raise UserError(f"--topology {topology}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    devices = list(described.devices)
    if len(devices) != topology.devices:
        raise UserError(f"--topology {topology}: libtpu makes {len(devices)} devices of its {topology.devices} chips")
    return devices


def _drop_cpu_flags() -> None:
    """Leave out what XLA_FLAGS say of the CPU: jax has read them, and libtpu aborts where it does not know one."""
    if flags := os.environ.get("XLA_FLAGS"):
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags.split() if not flag.startswith("--xla_cpu_"))


def _stay_on_cpu() -> None:
    with contextlib.suppress(RuntimeError):  # settled already: nothing is computed in a plan, so it does no harm
        jax.config.update("jax_platforms", "cpu")


def _force_cpu_devices(count: int | None) -> list[Any]:
    if count is not None:
        with contextlib.suppress(RuntimeError):  # settled already, perhaps with enough of them
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if count is not None and len(devices) < count:
        raise UserError(
            f"--topology cpu:{count}: this process has settled for {len(devices)} CPU devices already; plan in a new "
            "process, or leave out what sets XLA_FLAGS=--xla_force_host_platform_device_count"
        )
    return devices[:count]
