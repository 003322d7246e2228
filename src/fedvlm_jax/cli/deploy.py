"""`fedvlm deploy init DIR`: a federation of real clients, as an app of Flower's and a file for each node."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Le

from fedvlm_jax.config.audit_options import AuditOptions
from fedvlm_jax.config.run_options import (
    EvaluationOptions,
    LocalOptions,
    LoraOptions,
    MethodOptions,
    PromptOptions,
    Run,
    ServerOptions,
    SystemOptions,
    TrainOptions,
    methods_available,
    objectives_available,
    optional,
)
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.utils.option_ranges import Count, Positive, Seed

SIMULATED = {"messages": MessageOptions, "privacy": PrivacyOptions, "audit": AuditOptions}
"""Groups of options that are there to be refused: who asks for them is told why."""
REFUSED = {
    *(
        f"--{group}.{no}{field.name.replace('_', '-')}"
        for group, options in SIMULATED.items()
        for field in fields(options)
        for no in ("", "no-")
    ),
    "--start", "--train.finetune-steps", "--evaluation.clients", "--evaluation.cross-clients",
    "--evaluation.no-cross-clients", "--evaluation.cold-start", "--participation.dropout", "--participation.stragglers",
    "--participation.attack", "--participation.attackers", "--preference.reward-file",
}  # fmt: skip
"""Options of `fedvlm train` that are refused with a reason (`deployment.plan`), and so not listed here."""


@dataclass(frozen=True)
class Texts:
    """Lengths of texts, and how a model is asked about a class, at every node"""

    max_prompt_tokens: Count = emoji.Options.max_prompt_tokens
    """Skip rows with longer prompts, image tokens included."""
    max_answer_tokens: Count = emoji.Options.max_answer_tokens
    """Cut longer answers here for training."""
    class_prompt: str = emoji.Options.class_prompt
    """What a model that chooses among --classes (CLIP) reads in place of each, {} being the class."""


def deploy(
    what: Annotated[tyro.conf.Positional[Literal["init"]], tyro.conf.arg(help="What to do: there is init.")],
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR", help="A folder to write to.")],
    clients: Count,
    at_least: Count = 1,
    timeout: Positive = 3600.0,
    secure: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(default: no)")] = False,
    classes: Annotated[Path | None, optional("FILE", "none")] = None,
    novel_classes: Annotated[Path | None, optional("FILE", "none")] = None,
    port: Annotated[int, Ge(1), Le(65535)] = 8000,
    out: Annotated[Path | None, optional("RUN", "DIR/run")] = None,
    method: Annotated[str, optional(f"{{{','.join(methods_available())}}}", "plora")] = Run().method,
    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR|HUB_ID")] = Run().model,
    image_size: Annotated[Count | None, optional("PIXELS", "its own")] = None,
    image_tiles: Annotated[Count | None, optional("INT", "none")] = None,
    image_pixels: Annotated[Count | None, optional("PIXELS", "all have one size")] = None,
    start: Annotated[Path | None, optional("PEFT_DIR", "a fresh adapter")] = None,
    seed: Seed = 0,
    cohort: Annotated[Count | None, optional("INT", "all of them")] = None,
    objective: Annotated[str, optional(f"{{{','.join(objectives_available())}}}", "sft")] = Run().objective,
    checkpoint_every: Count = 1,
    method_options: Annotated[MethodOptions, tyro.conf.arg(name="method")] = MethodOptions(),  # noqa: B008  # frozen
    train: TrainOptions = TrainOptions(),  # noqa: B008
    data: Texts = Texts(),
    lora: LoraOptions = LoraOptions(),  # noqa: B008
    soft_prompt: Annotated[PromptOptions, tyro.conf.arg(name="prompt")] = PromptOptions(),  # noqa: B008
    evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008
    participation: ParticipationOptions = ParticipationOptions(),  # noqa: B008
    local: LocalOptions = LocalOptions(),  # noqa: B008
    server: ServerOptions = ServerOptions(),  # noqa: B008
    preference: PreferenceOptions = PreferenceOptions(),  # noqa: B008
    system: SystemOptions = SystemOptions(),  # noqa: B008
    messages: MessageOptions = MessageOptions(),  # noqa: B008
    privacy: PrivacyOptions = PrivacyOptions(),  # noqa: B008
    audit: AuditOptions = AuditOptions(),  # noqa: B008
) -> None:
    """Write a federation of real clients for Flower: its app, a secret file for each node, and the commands.

    The options after --out are those of `fedvlm train`; rows are each node's own, and so `fedvlm node` has --data.

    Args:
        clients: so many nodes, each with a file of its own.
        at_least: a round counts if so many clients answered; else it changes nothing.
        timeout: seconds that a node has for an order, from the first round's compilation on.
        secure: the server learns the mean of the clients' messages and no single one (SecAgg+), where the method's
            server needs no more.
        classes: text file with a class per line, for a base that chooses among them (CLIP): the answers of the clients'
            rows, which no node knows of the others.
        novel_classes: text file with the classes of test rows that nobody trains on.
        port: of the SuperLink, which the commands name.
        out: the run's folder, on the machine of the SuperLink.
        method: what clients share and what stays theirs.
        model: the frozen base, which every node must have.
        image_size: side of the square that pictures are brought to.
        image_tiles: tiles along a picture's longer side.
        image_pixels: of a picture at most, each on a grid of its own.
        start: an adapter of PEFT's to begin with.
        seed: decides every random choice.
        cohort: clients drawn each round.
        objective: of local training.
        checkpoint_every: rounds between checkpoints.
        method_options: the method's own numbers.
        train: rounds and local training.
        data: the same at every node.
        lora: the adapter.
        soft_prompt: of a model that chooses among classes.
        evaluation: of every client's own model, at its node.
        participation: how clients are drawn.
        local: terms of local training.
        server: the server's optimiser.
        preference: of preference losses.
        system: devices and memory.
        messages: refused with the reason, and so the next two.
        privacy: differential privacy.
        audit: what `fedvlm audit` needs.
    """
    del what

    from fedvlm_jax.deployment.agreed_classes import read_agreed, try_agreed

    texts = emoji.Options().replace(**asdict(data), **read_agreed(classes, novel_classes))
    run = Run(
        method=method, model=model, image_size=image_size, image_tiles=image_tiles, image_pixels=image_pixels,
        start=start, seed=seed, cohort=cohort, objective=objective, checkpoint_every=checkpoint_every,
        method_options=method_options, train=train, lora=lora, soft_prompt=soft_prompt, evaluation=evaluation,
        participation=participation, local=local, server=server, preference=preference, system=system,
        messages=messages, privacy=privacy, audit=audit, data=texts,
    )  # fmt: skip

    from fedvlm_jax.deployment.flower.app_folder import write_deployment
    from fedvlm_jax.deployment.plan import make_plan
    from fedvlm_jax.deployment.server_program import open_method
    from fedvlm_jax.export.new_folder import write_beside

    place = folder.absolute()
    with write_beside(place, "DIR") as scratch:
        plan, tokens = make_plan(run, clients, least=at_least, timeout=timeout, secure=secure)
        vlm, _ = open_method(plan, run.model)  # what the server would refuse is refused before there are nodes
        try_agreed(run, vlm)
        write_deployment(scratch, plan, tokens, place=place, out=out or place / "run", port=port)
    print(f"nodes   {place}/nodes")
    print(f"        client-0.json to client-{clients - 1}.json: copy each to its machine by a safe way,")
    print("        and only there: whoever has such a file is that client")
    print(f"app     {place}/app")
    print("        for `flwr run`, on the server's machine")
    print(f"next    {place}/README.md")
    print("        has the commands")
