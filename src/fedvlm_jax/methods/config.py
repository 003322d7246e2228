"""What may be chosen beside a method: local training's extra terms, the server's optimiser, single methods' numbers.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["HyperOptions", "LocalOptions", "ServerOptions", "options_known"]


@dataclass(frozen=True)
class LocalOptions:
    """Terms that are added to local training, for every method that averages"""

    proximal: float = 0.0
    """FedProx (arXiv 1812.06127): mu of mu/2 times the squared distance of the shared factors from the server's."""
    scaffold: bool = False
    """SCAFFOLD (arXiv 1910.06378): control variates on the shared factors, option II; asks for sgd."""


@dataclass(frozen=True)
class ServerOptions:
    """What the server does with the average update (arXiv 2003.00295)"""

    optimizer: Literal["avg", "momentum", "adam", "yogi", "adagrad"] = "avg"
    """FedAvg(M), FedAdam, FedYogi, FedAdagrad: on the clients' average update as a pseudo-gradient."""
    learning_rate: float = 1.0
    """The server's step; adam and its like want far less than 1, for example 0.01."""
    beta1: float = 0.9
    """Momentum."""
    beta2: float = 0.99
    """Decay of the second moment (adam, yogi)."""
    epsilon: float = 1e-3
    """Added to the root of the second moment (the paper's tau)."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that mean something to the optimiser."""
        own = {"avg": (), "momentum": ("beta1",), "adagrad": ("beta1", "epsilon")}
        return ("optimizer", "learning_rate", *own.get(self.optimizer, ("beta1", "beta2", "epsilon")))


@dataclass(frozen=True)
class HyperOptions:
    """Numbers that belong to single methods; any other method refuses them"""

    ditto_lambda: float = 0.1
    """ditto: pull of the personal model towards the global one."""
    apfl_alpha: float = 0.5
    """apfl: share of the private model in the mixture, at the start."""
    apfl_adaptive: bool = False
    """apfl: learn that share with the private model, at the rate of B."""
    pfedme_lambda: float = 1.0
    """pfedme: strength of the Moreau envelope."""
    pfedme_inner: int = 4
    """pfedme: steps that approximate its minimum; local steps are cut into groups of so many."""
    pfedme_rate: float = 0.1
    """pfedme: learning rate of the local copy of the global model."""
    pfedme_beta: float = 1.0
    """pfedme: share of the average in the new global model."""
    pfedme_restart: bool = False
    """pfedme: begin every round with the personal model at the global one, as the authors' code does; the paper leaves
    the start open, and here it goes on from where it was."""
    dpa_alpha: float = 0.5
    """feddpa: weight of the local adapter; the global one has the rest."""
    dpa_local: float = 0.25
    """feddpa-f: share of the rounds, the last ones, in which the local adapter alone is trained."""
    dpa_whole: bool = False
    """feddpa-t: the schedule of the authors' code: the local adapter starts in round 2, and both adapters take all
    local steps, twice the work; else each takes half of them from round 1 on."""
    flex_even: bool = False
    """flexlora: share the singular values evenly between A and B; in the paper all of them go to B."""
    fair_lambda: float = 0.01
    """lora-fair: ridge of the correction of B."""
    svd_every: int = 2
    """fedsvd: rounds between two re-orthogonalisations."""
    rpca_beta: float = 2.0
    """fedrpca: how much the average of the clients' sparse parts counts."""
    rpca_steps: int = 100
    """fedrpca: iterations of the decomposition."""
    mix_temperature: float = 0.5
    """ce-lora, fedmosaic: temperature of the softmax over the clients' similarities."""
    mosaic_weight: float = 0.5
    """fedmosaic: weight of the adapter that is mixed from the others' (the paper learns it)."""


def options_known() -> frozenset[str]:
    """What a method may say that it takes or refuses; `server` stands for all of the server's options."""
    groups = {"server": ServerOptions, "local": LocalOptions, "hyper": HyperOptions}
    single = {f"{group}.{field.name}" for group, options in groups.items() for field in fields(options)}
    return frozenset({"server", "lora.ranks", "share", "train.weighting"} | single)
