"""`fedvlm explain METHOD`: what a method trains, sends and keeps, on a given model."""

from typing import Annotated

import tyro

from fedvlm_jax.errors import UserError
from fedvlm_jax.training.config import HyperOptions, LocalOptions, LoraOptions, Run, ServerOptions, TrainOptions
from fedvlm_jax.training.validation import validate

__all__ = ["explain"]


def explain(
    method: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[METHOD]")] = "",
    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR|HUB_ID")] = "florence2-nano",
    share: Annotated[str, tyro.conf.arg(metavar="REGEX", help_behavior_hint="(default: none)")] = "",
    clients: int = 16,
    cohort: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all of them)")] = None,
    train: TrainOptions = TrainOptions(),  # noqa: B008  # frozen
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    local: LocalOptions = LocalOptions(),  # noqa: B008
    server: ServerOptions = ServerOptions(),  # noqa: B008
    hyper: HyperOptions = HyperOptions(),  # noqa: B008
) -> None:
    """Show what a method trains, sends and keeps, tensor by tensor, without data or weights; or list all methods.

    Args:
        method: whose; without one, and without --share, all methods are listed.
        model: the frozen base, as for `fedvlm train`; of a hub id only its configuration is downloaded.
        share: explain the method that this rule makes, as for `fedvlm train`.
        clients: how many there are.
        cohort: clients drawn each round.
        train: the same options as those of `fedvlm train`, and so the next.
        lora: the adapter.
        local: terms of local training.
        server: the server's optimiser.
        hyper: numbers of single methods.
    """
    run = Run(
        method=method, model=model, share=share, cohort=cohort, train=train, lora=lora, local=local, server=server,
        hyper=hyper,
    )  # fmt: skip
    if clients < 1:
        raise UserError(f"--clients is {clients}: it must be 1 or more")
    if cohort is not None and cohort > clients:
        raise UserError(f"--cohort {cohort}: there are only {clients} clients; say --clients {cohort}, for example")
    listing = not method and not share
    if not listing:
        validate(run)

    from fedvlm_jax.reporting import tables
    from fedvlm_jax.reporting.method_report import tabulate_explanation, tabulate_methods
    from fedvlm_jax.utils.console import open_console

    console = open_console()
    if listing:
        tables.show(console, tabulate_methods(Run()))
        return
    from fedvlm_jax.analysis.explain import explain as explain_run

    explained = explain_run(run, clients)
    console.say(f"{explained.name}  {explained.source}\n")
    for table in tabulate_explanation(explained):
        tables.show(console, table)
