"""Chips that `fedvlm plan` knows, and devices to compile for that need not be there.

Numbers of chips are the vendor's: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (system architecture; GB of HBM there
are GiB). Imports nothing heavy: jax comes with the devices.
"""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedvlm_jax.errors import UserError, format_count

CPU = "cpu"
CUBE = 4  # three-dimensional pods are made of cubes of 4x4x4; what is smaller is part of one


@dataclass(frozen=True)
class Chip:
    """A kind of accelerator."""

    hbm: float  # GiB of memory
    flops: float  # peak TFLOP/s in bf16
    slices: tuple[str, ...]
    most: int  # chips in the largest slice


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

CHIPS = {
    "v4": Chip(32, 275, _DEEP, 4096),
    "v5e": Chip(16, 197, _FLAT, 256),
    "v5p": Chip(95, 459, _DEEP, 6144),
    "v6e": Chip(32, 918, _FLAT, 256),
}


class Topology(NamedTuple):
    """A parsed `--topology`; a CPU has no chip, and no number of devices where the machine decides."""

    name: str
    chip: Chip | None
    devices: int | None


def parse_topology(name: str) -> Topology:
    """Read `v5e:4x4`, `cpu` or `cpu:8`.

    Raises:
        UserError: it has another form, its chip is not in the table, or there is no such slice of it.

    >>> parse_topology("v5e:4x4").devices
    16
    """
    kind, _, rest = name.partition(":")
    shape = list(map(int, rest.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest) else []
    if name == CPU or (kind == CPU and len(shape) == 1):
        return Topology(name, None, shape[0] if shape else None)
    chips = ", ".join(CHIPS)
    if kind == CPU:
        raise UserError(f"--topology {name}: expected cpu, or cpu:N with the number of devices, for example cpu:8")
    if re.fullmatch(r"v\d+(e|p|litepod)?-\d+", kind):
        laid_out = "say which chip and how they are laid out, as in v5e:4x4 or v5p:2x2x1"
        raise UserError(f"--topology {name}: that says how many there are; {laid_out}; there are {chips}")
    if kind not in CHIPS:
        known = f"there are {chips} (as in v5e:4x4, v5p:2x2x1) and cpu (cpu:8)"
        raise UserError(f"--topology {name}: nothing is known of {kind or 'a chip without a name'}; {known}")
    chip = CHIPS[kind]
    deep = chip.slices == _DEEP
    cubes = deep and len(shape) == 3 and not any(n % CUBE for n in shape) and shape == sorted(shape)
    if rest not in chip.slices and not (cubes and math.prod(shape) <= chip.most):
        more = f" and multiples of {CUBE} in ascending order, at most {chip.most} chips" if deep else ""
        raise UserError(f"--topology {name}: there is no such slice; {kind} has {', '.join(chip.slices)}{more}")
    return Topology(name, chip, math.prod(shape))


def open_devices(topology: Topology) -> list[Any]:
    """Return the devices of a topology; those of a TPU can be compiled for and nothing else.

    It must come before anything else touches a device: this process computes on the CPU then, with this many devices.

    Raises:
        UserError: libtpu is not installed or refuses the topology, or another number of CPU devices is settled already.
    """
    import jax

    count = topology.devices
    with contextlib.suppress(RuntimeError):  # settled already, perhaps with enough devices; a plan computes nothing
        jax.config.update("jax_platforms", "cpu")
        if topology.chip is None and count is not None:
            jax.config.update("jax_num_cpu_devices", count)
    if topology.chip is None:
        devices = jax.devices("cpu")
        if count is not None and len(devices) < count:
            raise UserError(
                f"--topology cpu:{count}: this process has settled for {len(devices)} CPU devices already; plan in a "
                "new process, or leave out what sets XLA_FLAGS=--xla_force_host_platform_device_count"
            )
        return devices[:count]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology.name} is compiled by libtpu, which is not installed: pip install '.[plan]' in a "
            "clone of fedvlm-jax (no TPU is needed), or plan for --topology cpu"
        )
    from jax.experimental import topologies

    # Keeps libtpu from looking for hosts: a compiler has no need of them.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask about this machine's TPU
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do: the topology is named
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened, so several processes may compile
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    if topology.name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # its two cores as one device, as jax has them on a v4
    flags = os.environ.get("XLA_FLAGS")
    try:
        if flags:  # jax has read what they say of the CPU, and libtpu aborts where it does not know a flag
            os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags.split() if not flag.startswith("--xla_cpu_"))
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
        raise UserError(f"--topology {topology.name}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    finally:
        if flags:  # the processes that this one starts compute on the CPU as it does
            os.environ["XLA_FLAGS"] = flags
    if len(devices) != count:
        raise UserError(
            f"--topology {topology.name}: libtpu makes {format_count(len(devices), 'device')} of its {count} chips"
        )
    return list(devices)
