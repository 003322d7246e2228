"""What `fedvlm plan` may be told beside the options of `fedvlm train`. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from fedvlm_jax.analysis.accelerators import CHIPS, CPU, parse_topology
from fedvlm_jax.errors import UserError
from fedvlm_jax.training.config import Run, SystemOptions

__all__ = ["Request", "SizeOptions", "check_request"]


def _optional(metavar: str, otherwise: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})")


@dataclass(frozen=True)
class SizeOptions:
    """What the clients' data would be like: it is not looked at"""

    image_size: Annotated[int | None, _optional("PIXELS", "as the model's processor has it")] = None
    """Side of the pictures."""
    prompt_tokens: int = 24
    """Tokens of the longest prompt; the picture's come on top."""
    answer_tokens: int = 16
    """Tokens of the longest answer."""
    examples: Annotated[int | None, _optional("INT", "as many as it reads in a round")] = None
    """Training examples of a client."""


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        run: the options of the training.
        topology: as `--topology` has it.
        clients: how many there are; all of them train.
        sizes: of what they read.
        price: of a chip for an hour, in whatever currency.
        tries: compilations spent on finding how many clients fit a chip.
    """

    run: Run
    topology: str = CPU
    clients: int = 16
    sizes: SizeOptions = field(default_factory=SizeOptions)
    price: float | None = None
    tries: int = 2


def check_request(request: Request) -> None:
    """Refuse what cannot be planned, before anything is loaded.

    Raises:
        UserError: the first option, or pair of options, that cannot work.
    """
    run, sizes = request.run, request.sizes
    topology = parse_topology(request.topology)
    for flag, value, least in (
        ("--clients", request.clients, 1),
        ("--tries", request.tries, 0),
        ("--sizes.image-size", sizes.image_size, 1),
        ("--sizes.prompt-tokens", sizes.prompt_tokens, 1),
        ("--sizes.answer-tokens", sizes.answer_tokens, 1),
        ("--sizes.examples", sizes.examples, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} is {value}: it must be {least} or more")
    if run.cohort is not None and run.cohort > request.clients:
        raise UserError(f"--cohort {run.cohort}: there are only {request.clients} clients; say --clients {run.cohort}")
    if run.train.local_epochs is not None and sizes.examples is None:
        raise UserError("--train.local-epochs decide how many steps a client takes: say --sizes.examples too")
    default = SystemOptions()
    for name in ("cache_gib", "cache_dir"):
        if getattr(run.system, name) != getattr(default, name):
            raise UserError(f"--system.{name.replace('_', '-')} means nothing to a plan: leave it out")
    if request.price is None:
        return
    if not 0 < request.price < float("inf"):
        raise UserError(f"--price-per-chip-hour is {request.price}: it must be above 0")
    if topology.chip is None:
        raise UserError(
            f"--price-per-chip-hour needs a time per round, and nothing is known of the speed of {request.topology}: "
            f"plan for one of {', '.join(CHIPS)}, or leave it out"
        )
