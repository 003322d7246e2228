"""Options of participation in a round. None of it is given by the FedVLM paper.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass
from typing import Literal

from fedvlm_jax.messages.config import Attack
from fedvlm_jax.utils.option_ranges import Amount, Chance, Share


@dataclass(frozen=True)
class ParticipationOptions:
    """Participation in a federated round, and how far clients come; fine-tuning after it is everybody's, and whole"""

    sampling: Literal["uniform", "size"] = "uniform"
    """How --cohort clients are drawn, without replacement: all alike, or one after another with chances proportional to
    their training examples (then --train.weighting uniform, or size counts twice; not given by the paper)."""
    dropout: Chance = 0.0
    """Chance that a drawn client drops out mid-round: it sends nothing, keeps the private state it had, and the others'
    weights add up to 1 without it (not given by the paper)."""
    stragglers: Share = 0.0
    """Chance that a drawn client comes only so far, a number of steps drawn from 1 to one less than its own; what it
    learned counts like any other's (not given by the paper)."""
    attack: Attack = "none"
    """What simulated hostile clients do: send their update with its sign turned or a hundred times as large, send
    noise of its norm, or train on wrong answers, always or on pictures with a mark (not given by the paper)."""
    attackers: Amount = 0
    """So many clients are hostile, drawn by the seed, the same for all methods and attacks; scores leave them out. With
    the attack `none` they behave, so that runs can be compared (not given by the paper)."""
