"""Chips that a plan can be made for, and the option `--topology`: which of them, and how they are laid out.

Numbers are the vendor's, per chip. Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (system architecture; GB of
HBM there are GiB); v4's links from arXiv 2304.01433 (six of 50 GB/s). `ici` is what a chip can send: half of what the
vendor calls bidirectional. Imports nothing heavy.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from fedvlm_jax.errors import UserError

__all__ = ["CHIPS", "CPU", "Chip", "Topology", "parse_topology"]

CPU = "cpu"
CUBE = 4
"""Three-dimensional pods are made of cubes of 4x4x4; what is smaller is part of one."""


@dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
        hbm: memory, GiB.
        flops: peak bf16 arithmetic, TFLOP/s.
        bandwidth: of the memory, GB/s.
        ici: what it can send to other chips, GB/s.
        clock: GHz: peak arithmetic over what the four units of 128x128 of a core do in a cycle (v4 and v5p have two
            cores). v6e's is not published and taken to be v5p's.
        slices: topologies that there are; three-dimensional ones larger than the last are made of cubes.
        most: chips in the largest.
    """

    hbm: float
    flops: float
    bandwidth: float
    ici: float
    clock: float
    slices: tuple[str, ...]
    most: int

    @property
    def axes(self) -> int:
        """2 or 3."""
        return self.slices[0].count("x") + 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

CHIPS = {
    "v4": Chip(32, 275, 1200, 300, 1.05, _DEEP, 4096),
    "v5e": Chip(16, 197, 819, 200, 1.50, _FLAT, 256),
    "v5p": Chip(95, 459, 2765, 600, 1.75, _DEEP, 6144),
    "v6e": Chip(32, 918, 1638, 400, 1.75, _FLAT, 256),
}


class Topology(NamedTuple):
    """What `--topology` names.

    Attributes:
        kind: a chip of the table, or "cpu".
        shape: how the chips are laid out; of CPU devices their number, or nothing where the machine decides.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip | None:
        """None for a CPU, of which nothing is known."""
        return CHIPS.get(self.kind)

    @property
    def devices(self) -> int | None:
        """How many there are; None where the machine decides."""
        return math.prod(self.shape) if self.shape else None

    def __str__(self) -> str:
        return ":".join((self.kind, "x".join(map(str, self.shape)))) if self.shape else self.kind


def parse_topology(text: str) -> Topology:
    """Read `v5e:4x4`, `cpu` or `cpu:8`.

    Raises:
        UserError: it has another form, its chip is not in the table, or there is no such slice of it.
    """
    kind, _, rest = text.partition(":")
    if kind == CPU:
        if text != CPU and not re.fullmatch(r"[1-9]\d*", rest):
            raise UserError(f"--topology {text}: expected cpu, or cpu:N with the number of devices, for example cpu:8")
        return Topology(CPU, (int(rest),) if rest else ())
    if re.fullmatch(r"v\d+(e|p|litepod)?-\d+", kind):
        raise UserError(
            f"--topology {text}: that says how many there are; say which chip and how they are laid out, as in v5e:4x4 "
            f"or v5p:2x2x1; there are {', '.join(CHIPS)}"
        )
    if kind not in CHIPS:
        raise UserError(
            f"--topology {text}: nothing is known of {kind or 'a chip without a name'}; there are "
            f"{', '.join(CHIPS)} (as in v5e:4x4, v5p:2x2x1) and cpu (cpu:8)"
        )
    chip = CHIPS[kind]
    known = f"{kind} has {', '.join(chip.slices)}"
    if chip.axes == 3:
        known += f" and multiples of {CUBE} in ascending order, at most {chip.most} chips"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        raise UserError(f"--topology {text}: expected {kind}:{'x'.join('ABC'[: chip.axes])}; {known}")
    shape = tuple(map(int, rest.split("x")))
    cubes = chip.axes == len(shape) == 3 and not any(n % CUBE for n in shape) and list(shape) == sorted(shape)
    if rest not in chip.slices and not (cubes and math.prod(shape) <= chip.most):
        raise UserError(f"--topology {text}: there is no such slice; {known}")
    return Topology(kind, shape)
