"""Options of what a run keeps for `fedvlm audit`. None of it is given by the FedVLM paper.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le


@dataclass(frozen=True)
class AuditOptions:
    """What `fedvlm audit` needs of a run"""

    keep: bool = False
    """Keep what leaves every client in every round, and the server's state before it, in the run's folder, for
    `fedvlm audit`; what it takes of the disk is said first. Whoever reads that folder can attack the clients as the
    server could."""
    most_gib: Annotated[float, Gt(0), Le(2**20)] = 8.0
    """GiB of the disk: a run of which more would be kept is refused."""
