"""Options that change the mathematics of a round, and whether a method has a place for them; judged before any load.

A method declares what does not go with it (`Method.refuses`), so nothing here knows any by name. The numbers of a
method need no such check: those of another method cannot be written.
"""

import dataclasses
import re
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fedvlm_jax.config.audit_options import AuditOptions
from fedvlm_jax.config.compression_checks import check_fewer_bytes
from fedvlm_jax.config.run_options import LoraOptions, PromptOptions, Run, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods.config import SHARE, LocalOptions, MethodOptions, ServerOptions, find_method_options
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.privacy.config import PrivacyOptions

if TYPE_CHECKING:
    from fedvlm_jax.methods import Method
    from fedvlm_jax.models import Vlm

KEEPING = "audit.keep"
"""The option that means nothing to a method that sends nothing."""

OF_FACTORS = ("lora.rank", "lora.alpha", "lora.rslora", "lora.init", "lora.dropout", "lora.private_a")
"""The options of low-rank factors, wherever these are."""

MATHEMATICS = (
    *("server", "local", "train.weighting", "lora.ranks", "start", "privacy"),
    *("messages", "participation.attack", "soft_prompt", "lora.targets", *OF_FACTORS),
)
"""The options, and groups of options, that change how a round computes, for the methods that have a place for them."""


def check_method(run: Run, label: str) -> None:
    """Refuse what changes a round's mathematics in a way that the run's method has no place for.

    Args:
        label: the method as the command line names it, `--method plora`.

    Raises:
        UserError: the first such option, with the method's reason.
    """
    method = declare(run.method, run)
    if type(run.method_options) is not find_method_options(run.method):
        raise UserError(f"{run.method_options} are the numbers of another method than {label}")
    for path in list_changed(run, *MATHEMATICS, KEEPING):
        # A method refuses a single option or the whole group: an aggregation by SVD has no place for any optimiser.
        why = method.refuses.get(path) or method.refuses.get(path.partition(".")[0])
        if why:
            raise UserError(
                f"{write_flag(path)} does not go with {label}, because {why}. Leave it out, or leave the method out"
            )
    if load_objective(run.objective, run.preference).samples and (why := method.refuses.get("samples")):
        raise UserError(f"--objective {run.objective} does not go with {label}, because {why}: use another of the two")
    if run.privacy.on:
        _check_privacy(run, method, label)
    if run.messages.pool != "mean" and (why := _find_why_every_message(run, method)):
        raise UserError(
            f"--messages.pool {run.messages.pool} does not go with {label}, because {why}. Leave it out, or leave the "
            "method out"
        )
    _check_prompt(run, method, label)
    if run.method == SHARE and not find_rule(run.method_options):
        raise UserError(f"{label} needs its rule: add --share REGEX, for example --share 'decoder/.*/b$'")
    check_fewer_bytes(run, method, label)


def _check_prompt(run: Run, method: "Method", label: str) -> None:
    """Refuse a soft prompt where the method trains none, and what does not go with one."""
    if run.soft_prompt.vectors is not None and method.prompt == "refused":
        raise UserError(
            f"--prompt.vectors does not go with {label}, because it trains low-rank factors alone. Leave it out, or "
            "take a method that trains a soft prompt, promptfl say"
        )
    if run.soft_prompt.vectors is not None or method.prompt == "needed":
        for path, why in (("lora.ranks", "has no rank"), ("start", "is not in a folder of PEFT's")):
            if list_changed(run, path):
                raise UserError(f"{write_flag(path)} does not go with a soft prompt, which {why}: leave it out")
    for path in list_changed(run, *list_idle(run, method)):
        raise UserError(
            f"{write_flag(path)} means nothing to {label}, whose adapters have no low-rank factors: leave it out"
        )


def list_idle(run: Run, method: "Method") -> tuple[str, ...]:
    """List the options of low-rank factors that mean nothing to a run whose adapters have none.

    Adapters beside whole layers have a rank, and are drawn.
    """
    if method.parallel:
        return tuple(path for path in OF_FACTORS if path not in ("lora.rank", "lora.private_a"))
    prompted = method.prompt == "needed" or (method.prompt == "taken" and run.soft_prompt.vectors is not None)
    return OF_FACTORS if prompted and not run.lora.targets else ()


def _check_privacy(run: Run, method: "Method", label: str) -> None:
    if not method.linear:
        raise UserError(
            f"--privacy.* does not go with {label}, because its server needs every client's message, and only their "
            "sum is private. Leave it out, or take a method that averages"
        )
    # Rounds of different phases share different factors, so later noise cannot take earlier noise back.
    rounds = range(2, run.train.rounds + 1)
    if run.privacy.mechanism == "banded" and any(method.phase(number) != method.phase(1) for number in rounds):
        raise UserError(
            f"--privacy.mechanism banded does not go with {label}, because its rounds do not all send the same "
            "factors: take gaussian"
        )


def _find_why_every_message(run: Run, method: "Method") -> str:
    """Say why one message in place of a round's is not enough for a method with these options; "" where it is."""
    if run.local.scaffold:
        return "with --local.scaffold a message holds a control variate too, which the server sums over clients"
    if run.lora.ranks:
        return "with --lora.ranks clients send other parts of an update each, of which every one has its own average"
    return "" if method.linear else "its server needs every client's message, and a rule makes one of them"


def list_changed(run: Run, *groups: str) -> list[str]:
    """List those options that are not at their default, of whole groups or single ones.

    >>> list_changed(Run(server=ServerOptions(beta1=0.5)), "server", "lora.ranks")
    ['server.beta1']
    """
    default, paths = Run(), list[str]()
    for group in groups:
        value = attrgetter(group)(default)
        names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        paths += [f"{group}.{name}" for name in names] or [group]
    return [path for path in paths if attrgetter(path)(run) != attrgetter(path)(default)]


def write_flag(path: str) -> str:
    """Write an option's path as its flag.

    >>> write_flag("soft_prompt.vectors")
    '--prompt.vectors'
    """
    return "--" + path.removeprefix("soft_").replace("_", "-")


def for_method(base: Run, name: str, options: MethodOptions | None = None) -> Run:
    """Give a method the options that others have too, without those that would merely do nothing in it.

    Args:
        options: the numbers of this method; its defaults if None.
    """
    # A comparison has one set of options for all methods, so one that a method has no use for is no mistake.
    run = dataclasses.replace(base, method=name, method_options=options or MethodOptions())
    declared = declare(name, run)
    moot = declared.moot
    local = {field.name: field.default for field in dataclasses.fields(LocalOptions) if f"local.{field.name}" in moot}
    participation = run.participation
    if "participation.attack" in moot:  # the clients that would attack are left out of the scores all the same
        participation = dataclasses.replace(participation, attack="none")
    weighting = TrainOptions().weighting if "train.weighting" in moot else run.train.weighting
    if "lora.targets" in declared.refuses:
        run = dataclasses.replace(run, lora=dataclasses.replace(run.lora, targets=LoraOptions().targets))
    names = (path.removeprefix("lora.") for path in list_idle(run, declared))
    idle = {name: getattr(LoraOptions(), name) for name in names}
    return dataclasses.replace(
        run,
        lora=dataclasses.replace(run.lora, **idle),
        audit=AuditOptions() if KEEPING in moot else run.audit,
        server=ServerOptions() if "server" in moot else run.server,
        local=dataclasses.replace(run.local, **local),
        participation=participation,
        messages=MessageOptions() if "messages" in moot else run.messages,
        soft_prompt=PromptOptions() if declared.prompt == "refused" else run.soft_prompt,
        train=dataclasses.replace(run.train, weighting=weighting),
        privacy=PrivacyOptions() if "privacy" in moot else run.privacy,
    )


def declare(name: str, run: Run) -> "Method":
    """Make a method with a run's options but without a model: for what it declares of itself.

    Raises:
        UserError: its file is not that of a method, or it cannot work with these options.
    """
    from fedvlm_jax.config.method_setup import make_setup
    from fedvlm_jax.methods import load_method  # late: it imports jax

    def refuse_call(*_: Any) -> Any:
        raise AssertionError("a method is made without a model: its functions may ask for one, `make` may not")

    options = run.method_options if run.method == name else MethodOptions()
    return load_method(name, dataclasses.replace(make_setup(run, None, refuse_call), options=options))


def list_left_out(run: Run) -> list[str]:
    """List what a run leaves out of its method, a sentence each, to be told before it trains.

    >>> list_left_out(Run(method="pfit"))
    ['pfit was published for --objective reward; with sft what is left of it is who shares what']
    """
    method = declare(run.method, run)
    told = [method.unreached] if method.unreached else []
    if method.objective not in ("", run.objective):
        told.append(
            f"{method.name} was published for --objective {method.objective}; with {run.objective} what is left of it "
            "is who shares what"
        )
    return told


def find_rule(options: MethodOptions) -> str | None:
    """Return the rule of the method that `--share` makes; None for the options of any other method."""
    # By its name: the class stands in a file that imports jax, which options without a rule need not wait for.
    return getattr(options, "rule", None) if type(options).__module__.endswith(".rule_based") else None


def check_rule(run: Run, vlm: "Vlm") -> None:
    """Refuse a `--share` that names no factor of the adapter that the run would have.

    Raises:
        UserError: with the paths that there are.
    """
    rule = find_rule(run.method_options)
    if rule is None:
        return
    import jax

    from fedvlm_jax import lora
    from fedvlm_jax.config.method_setup import make_spec
    from fedvlm_jax.lora.sites import listing
    from fedvlm_jax.methods.base import is_factor
    from fedvlm_jax.utils import tree

    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), vlm.sites, make_spec(run, vlm)))
    factors = tree.partition(adapter, is_factor)[0]
    paths = {path: lora.virtual_paths(factors, path, vlm.sites) for path in tree.flatten(factors)}
    if not any(re.search(rule, name) for path, layers in paths.items() for name in (path, *layers)):
        raise UserError(f"--share {rule!r} is found in no factor's path; there are:\n{listing(paths, 1000)}")
