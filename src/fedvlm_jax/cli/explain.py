"""`fedvlm explain METHOD`: what a method trains, sends and keeps, on a given model."""

from typing import Annotated

import tyro

from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import (
    LocalOptions,
    LoraOptions,
    MethodOptions,
    PromptOptions,
    Run,
    ServerOptions,
    TrainOptions,
)
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.utils.option_ranges import Count


def explain(
    method: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[METHOD]")] = "",
    model: Annotated[
        str | None, tyro.conf.arg(metavar="NAME|DIR|HUB_ID", help_behavior_hint="(default: florence2-nano)")
    ] = None,
    clients: Count = 16,
    cohort: Annotated[Count | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all of them)")] = None,
    train: TrainOptions = TrainOptions(),  # noqa: B008  # frozen
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    prompt: PromptOptions = PromptOptions(),  # noqa: B008
    local: LocalOptions = LocalOptions(),  # noqa: B008
    server: ServerOptions = ServerOptions(),  # noqa: B008
    messages: MessageOptions = MessageOptions(),  # noqa: B008
    privacy: PrivacyOptions = PrivacyOptions(),  # noqa: B008
    method_options: Annotated[MethodOptions, tyro.conf.arg(name="method")] = MethodOptions(),  # noqa: B008
) -> None:
    """Show what a method trains, sends and keeps, tensor by tensor, without data or weights.

    Of a model alone its parts and the sites of adapters are shown; without either, all methods are listed.

    Args:
        method: whose.
        model: the frozen base, as for `fedvlm train`; of a hub id only its configuration is downloaded.
        clients: how many there are.
        cohort: clients drawn each round.
        train: the same options as those of `fedvlm train`, and so the next.
        lora: the adapter.
        prompt: the soft prompt of a model that chooses among classes.
        local: terms of local training.
        server: the server's optimiser.
        messages: what happens to messages on their way.
        privacy: differential privacy; how large its noise is beside an update is shown too.
        method_options: the method's own numbers.
    """
    run = Run(
        method=method or Run().method, model=model or Run().model, cohort=cohort, train=train, lora=lora,
        soft_prompt=prompt, local=local, server=server, messages=messages, privacy=privacy,
        method_options=method_options,
    )  # fmt: skip
    if cohort is not None and cohort > clients:
        raise UserError(
            f"--cohort {cohort}: there {'is' if clients == 1 else 'are'} only "
            f"{format_count(clients, 'client')}; say --clients {cohort}, for example"
        )
    if method:
        validate(run)
    elif run.privacy.on:
        raise UserError("--privacy.* is explained for a method: name one, for example fedvlm explain plora")

    from fedvlm_jax.reporting import tables
    from fedvlm_jax.reporting.method_report import tabulate_explanation, tabulate_methods
    from fedvlm_jax.reporting.noise_report import tabulate_noise
    from fedvlm_jax.utils.console import Terminal

    if not method and model is not None:
        from fedvlm_jax.models import read_size, read_vlm
        from fedvlm_jax.reporting.model_report import tabulate_model

        tables.show_all(tabulate_model(read_vlm(model), model, read_size(model), lora.rank))
        return
    if not method:
        tables.show_all([tabulate_methods(Run())])
        return
    from fedvlm_jax.analysis.explain import explain as explain_run

    explained = explain_run(run, clients)
    Terminal().say(f"{explained.name}  {explained.source}\n")
    tables.show_all(tabulate_explanation(explained))
    if explained.unreached:
        Terminal().say(f"{explained.unreached}\n")
    if explained.noise is not None:
        tables.show_all([tabulate_noise(explained.name, explained.noise)])
