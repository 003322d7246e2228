"""What comes out of planning a round, and the time that can be foreseen of it."""

from dataclasses import dataclass

from jax.sharding import Mesh

from fedvlm_jax.analysis.accelerators import Topology
from fedvlm_jax.analysis.collectives import Collective
from fedvlm_jax.analysis.costs import Traffic
from fedvlm_jax.analysis.plan_options import Request
from fedvlm_jax.federation.cohort import Layout
from fedvlm_jax.federation.memory import Footprint, Memory

__all__ = ["Attempt", "Costs", "Plan", "Seconds", "estimate"]


@dataclass(frozen=True)
class Attempt:
    """A compilation.

    Attributes:
        wave: clients side by side, over all devices.
        clients: of them, on a device, or on the devices that share a base.
        cohort: clients of the round.
        bytes: that a device must have; None where the compiler refused without saying.
        peak: the most at a time as the compiler has it, with what lies beside the program; None where it refused.
        fits: on a device, with a tenth of it left free.
        seconds: that it took.
    """

    wave: int
    clients: int
    cohort: int
    bytes: int | None
    peak: int | None
    fits: bool
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Of a device, in a round.

    Attributes:
        flops: of matrix products and convolutions, as traced: the round's over the number of devices.
        traffic: what its instructions move, and the cycles that the compiler foresees for them.
        compiler: the compiler's own sums, in which every loop's body counts once.
        unknown_loops: whose turns could not be read, and which count once here too.
    """

    flops: int
    traffic: Traffic
    compiler: dict[str, float]
    unknown_loops: int


@dataclass(frozen=True)
class Plan:
    """What came out.

    Attributes:
        request, topology, mesh: what was planned.
        layout: of the round that fits.
        parameters: of the base.
        image_tokens: of a picture.
        prompt: tokens, the picture's among them.
        cached: are image features computed once, and kept?
        memory: of the program on a device.
        unread: bytes of the base that lie on a device beside it, because the round does not read them.
        footprint: of memory, base and clients.
        room: bytes of a device; None where nobody says.
        costs, collectives: of the round.
        attempts: all compilations, in their order.
        most: clients that fit a device side by side, and the fewest known not to; None where nothing is known of room.
    """

    request: Request
    topology: Topology
    mesh: Mesh
    layout: Layout
    parameters: int
    image_tokens: int
    prompt: int
    cached: bool
    memory: Memory
    unread: int
    footprint: Footprint
    room: int | None
    costs: Costs
    collectives: tuple[Collective, ...]
    attempts: tuple[Attempt, ...]
    most: tuple[int, int | None] | None

    @property
    def refused(self) -> Attempt | None:
        """The wave that the request began with, where it did not fit."""
        return None if self.attempts[0].fits else self.attempts[0]


@dataclass(frozen=True)
class Seconds:
    """Time of a round, as far as it can be foreseen.

    Attributes:
        arithmetic: at the chip's peak in bfloat16.
        memory: at its memory's bandwidth.
        network: what it sends, over all its links.
        compiler: the cycles that the compiler foresees; None where it says nothing.
    """

    arithmetic: float
    memory: float
    network: float
    compiler: float | None

    @property
    def roofline(self) -> float:
        """What no program could be faster than: the longest of the three."""
        return max(self.arithmetic, self.memory, self.network)

    @property
    def round(self) -> float:
        """The best guess at a round; it is likely to take longer."""
        return max(self.roofline, self.compiler or 0.0)

    @property
    def share(self) -> float:
        """Of the chip's peak arithmetic, in that time."""
        return self.arithmetic / self.round


def estimate(plan: Plan) -> Seconds | None:
    """How long a round takes; None for devices of which nothing is known."""
    chip = plan.topology.chip
    if chip is None:
        return None
    cycles = plan.costs.traffic.cycles
    return Seconds(
        plan.costs.flops / (chip.flops * 1e12),
        plan.costs.traffic.bytes / (chip.bandwidth * 1e9),
        sum(one.sent for one in plan.collectives) / (chip.ici * 1e9),
        None if cycles is None else cycles / (chip.clock * 1e9),
    )
