"""Options of `fedvlm plan`: the round to plan and the devices. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.analysis.tpu_topologies import CHIPS, CPU, parse_topology
from fedvlm_jax.config import run_options
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods.config import MethodOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.utils.option_ranges import Count, Positive, check_ranges


@dataclass(frozen=True)
class SizeOptions:
    """Sizes of the clients' data, which are not read."""

    image_size: Annotated[Count | None, run_options.optional("PIXELS", "as the model's processor has it")] = None
    """Side of the pictures."""
    image_pixels: Annotated[Count | None, run_options.optional("PIXELS", "all have one size")] = None
    """Pixels that each has at most on a grid of its own, where the model has such grids (Qwen-VL)."""
    pictures: Count = 1
    """Pictures of a prompt, or tiles that its picture is cut into, the whole of it among them."""
    prompt_tokens: Count = 24
    """Tokens of the longest prompt; the pictures' come on top."""
    answer_tokens: Count = 16
    """Tokens of the longest answer."""
    examples: Annotated[Count | None, run_options.optional("INT", "as many as it reads in a round")] = None
    """Training examples of a client."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A round to plan: options of `fedvlm train` that shape it, and the devices."""

    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:AxB|cpu[:N]")] = CPU
    """v4, v5e, v5p or v6e and how the chips are laid out, as in v5e:4x4; cpu, or cpu:8 for eight devices. TPUs need the
    extra `plan` (libtpu), and no TPU."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR|HUB_ID")] = "florence2-nano"
    """The frozen base, of which only the configuration is read: florence2-base and -large need no weights."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = run_options.METHOD
    """As for `fedvlm train`, and so the next."""
    objective: str = "sft"
    clients: Count = 16
    """Number of clients."""
    cohort: Annotated[Count | None, run_options.optional("INT", "all of them")] = None
    """Clients drawn each round."""
    price_per_chip_hour: Annotated[Positive | None, run_options.optional("PRICE", "none")] = None
    """Price of a chip for an hour, to say what a round costs at least."""
    out: Annotated[Path | None, run_options.optional("DIR", "runs/<time>-plan")] = None
    """Folder for plan.json and plan.md."""
    sizes: SizeOptions = field(default_factory=SizeOptions)
    train: run_options.TrainOptions = field(default_factory=run_options.TrainOptions)
    lora: run_options.LoraOptions = field(default_factory=run_options.LoraOptions)
    preference: run_options.PreferenceOptions = field(default_factory=run_options.PreferenceOptions)
    local: run_options.LocalOptions = field(default_factory=run_options.LocalOptions)
    server: run_options.ServerOptions = field(default_factory=run_options.ServerOptions)
    messages: MessageOptions = field(default_factory=MessageOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    method_options: Annotated[MethodOptions, tyro.conf.arg(name="method")] = field(default_factory=MethodOptions)
    system: run_options.SystemOptions = field(default_factory=run_options.SystemOptions)

    @property
    def run(self) -> run_options.Run:
        """The options of the training, without a folder and with a cohort."""
        shared = {option.name for option in fields(run_options.Run)} & (vars(self).keys() - {"out", "cohort"})
        everybody = self.privacy.on and self.privacy.sampling == "all"  # which says so already
        cohort = self.cohort or (None if everybody else self.clients)
        return run_options.Run(cohort=cohort, **{name: getattr(self, name) for name in shared})


def check_request(request: Request) -> None:
    """Refuse what cannot be planned, before anything is loaded.

    Raises:
        UserError: the first option, or pair of options, that cannot work.
    """
    topology = parse_topology(request.topology)
    check_ranges(request)
    if (cohort := request.cohort or 0) > request.clients:
        raise UserError(
            f"--cohort {cohort}: there {'is' if request.clients == 1 else 'are'} only "
            f"{format_count(request.clients, 'client')}; say --clients {cohort}"
        )
    if request.train.local_epochs is not None and request.sizes.examples is None:
        raise UserError("--train.local-epochs decide how many steps a client takes: say --sizes.examples too")
    for name in ("cache_gib", "cache_dir"):
        if getattr(request.system, name) != getattr(run_options.SystemOptions(), name):
            raise UserError(f"--system.{name.replace('_', '-')} means nothing to a plan: leave it out")
    if request.sizes.image_size is not None and request.sizes.image_pixels is not None:
        raise UserError("--sizes.image-size and --sizes.image-pixels exclude each other: leave one out")
    if request.price_per_chip_hour is not None and topology.chip is None:
        raise UserError(
            f"--price-per-chip-hour needs a time per round, and nothing is known of the speed of {request.topology}: "
            f"plan for one of {', '.join(CHIPS)}, or leave it out"
        )
