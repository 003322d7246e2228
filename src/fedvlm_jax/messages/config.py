"""Options of what happens to messages on their way to the server. None of it is given by the FedVLM paper.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from fedvlm_jax.utils.option_ranges import Amount, Positive

WITHSTANDS = "pool_withstands"
"""Name of a round's number: how many hostile clients its pool could withstand."""

Attack = Literal["none", "sign-flip", "scale", "noise", "label-flip", "backdoor"]
PoolName = Literal["mean", "median", "trimmed", "krum", "multi-krum", "geometric", "bound"]


@dataclass(frozen=True)
class MessageOptions:
    """The messages that clients send: how the server pools them, and how they are made smaller"""

    pool: PoolName = "mean"
    """How the server makes one update of the clients': their weighted mean, or a rule that a few hostile clients cannot
    move far (coordinate-wise median or trimmed mean, arXiv 1803.01498; Krum and Multi-Krum, 1703.02757; geometric
    median, 1912.13445; the mean of updates whose norm is bounded, 1911.07963)."""
    hostile: Amount = 1
    """Clients of a round that a rule is to withstand: what `trimmed` cuts off at either end, and f of Krum."""
    bound: Positive = 1.0
    """Norm that `bound` cuts a client's update down to."""
    compress: Literal["none", "int8", "top-k"] = "none"
    """Send 8-bit integers with a scale per tensor, rounded at random so that the mean is kept; or only the largest
    entries, the others added to the client's next update (error feedback, arXiv 1809.07599)."""
    keep: Annotated[float, Gt(0), Le(1)] = 0.1
    """Share of its entries that a client sends with `top-k`."""
    secure: bool = False
    """Add up integers, as a secure sum does, to see what the rounding costs; in one process nothing is hidden."""
    secure_bits: Annotated[int, Gt(1), Le(31)] = 24
    """Bits of an entry in a secure sum, after clipping to +-`--messages.secure-range`."""
    secure_range: Positive = 0.5
    """Largest entry of an update that a secure sum holds."""

    @property
    def needed(self) -> int:
        """Count the clients that a round needs for the pool to withstand as many hostile ones as `hostile` says.

        >>> MessageOptions(pool="krum", hostile=2).needed, MessageOptions(pool="trimmed", hostile=2).needed
        (7, 5)
        """
        more = {"trimmed": 1, "krum": 3, "multi-krum": 3}
        return 2 * self.hostile + more[self.pool] if self.pool in more else 1
