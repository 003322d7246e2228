"""`fedvlm plan`: what a round would take of devices that need not be there."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.analysis.accelerators import CPU
from fedvlm_jax.analysis.plan_options import Request, SizeOptions, check_request
from fedvlm_jax.errors import UserError
from fedvlm_jax.training.config import (
    HyperOptions,
    LocalOptions,
    LoraOptions,
    PreferenceOptions,
    Run,
    ServerOptions,
    SystemOptions,
    TrainOptions,
)
from fedvlm_jax.training.run_dir.folder_lock import open_folder
from fedvlm_jax.training.validation import validate

__all__ = ["plan"]


def plan(
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:AxB|cpu[:N]")] = CPU,
    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR|HUB_ID")] = "florence2-nano",
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: plora)")] = "",
    share: Annotated[str, tyro.conf.arg(metavar="REGEX", help_behavior_hint="(default: none)")] = "",
    objective: str = "sft",
    clients: int = 16,
    cohort: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all of them)")] = None,
    price_per_chip_hour: Annotated[
        float | None, tyro.conf.arg(metavar="PRICE", help_behavior_hint="(default: none)")
    ] = None,
    tries: int = 2,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/<time>-plan)")] = None,
    sizes: SizeOptions = SizeOptions(),  # noqa: B008  # frozen
    train: TrainOptions = TrainOptions(),  # noqa: B008
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    preference: PreferenceOptions = PreferenceOptions(),  # noqa: B008
    local: LocalOptions = LocalOptions(),  # noqa: B008
    server: ServerOptions = ServerOptions(),  # noqa: B008
    hyper: HyperOptions = HyperOptions(),  # noqa: B008
    system: SystemOptions = SystemOptions(),  # noqa: B008
) -> None:
    """Compile a round for a TPU pod, or for CPU devices, that need not be there, and say what it would take.

    Args:
        topology: v4, v5e, v5p or v6e and how the chips are laid out, as in v5e:4x4; cpu, or cpu:8 for eight devices.
            TPUs need the extra `plan` (libtpu), and no TPU.
        model: the frozen base, of which only the configuration is read: florence2-base and -large need no weights.
        method: as for `fedvlm train`.
        share: plan for the method that this rule makes, as for `fedvlm train`.
        objective: as for `fedvlm train`.
        clients: how many there are.
        cohort: clients drawn each round.
        price_per_chip_hour: what a chip costs for an hour, to say what a round does.
        tries: compilations to spend on finding how many clients fit a chip, beside that of the round itself.
        out: folder for plan.json and plan.md.
        sizes: what the clients' data would be like.
        train: the same options as those of `fedvlm train`, and so the next.
        lora: the adapter.
        preference: of the objectives that learn from pairs.
        local: terms of local training.
        server: the server's optimiser.
        hyper: numbers of single methods.
        system: devices, memory and speed; with --system.cache off the vision tower runs in every step.
    """
    run = Run(
        model=model, method=method, share=share, objective=objective, cohort=cohort, preference=preference, train=train,
        lora=lora, local=local, server=server, hyper=hyper, system=system,
    )  # fmt: skip
    request = Request(run, topology, clients, sizes, price_per_chip_hour, tries)
    check_request(request)
    validate(dataclasses.replace(run, cohort=cohort or clients))

    from fedvlm_jax.analysis import plan as plans
    from fedvlm_jax.reporting import plan_report, tables
    from fedvlm_jax.training import progress
    from fedvlm_jax.utils.console import open_console

    show = progress.open_progress()
    with open_folder(out, "plan") as folder:
        try:
            planned = plans.plan(request, show.note)
        finally:
            show.finish()
        plan_report.write_plan(folder, planned)
    console = open_console()
    for table in plan_report.tabulate_plan(planned):
        tables.show(console, table)
        if table.note:
            console.say(table.note, style="dim")
    console.say(f"plan     {folder / 'plan.md'}\nnumbers  {folder / 'plan.json'}")
    refusal = plan_report.word_refusal(planned)
    if refusal and system.wave is not None:
        raise UserError(f"--wave {system.wave} {refusal}")
    if refusal:
        console.say(refusal, style="yellow")
