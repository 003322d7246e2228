"""Options that change the mathematics of a round, and whether a method has a place for them; judged before any load.

A method says itself what does not go with it (`Method.refuses`), so nothing here knows any by name. Its own numbers
need no such check: those of another method cannot be written.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedvlm_jax.config.run_options import Run, TrainOptions
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.config import SHARE, LocalOptions, MethodOptions, ServerOptions, find_method_options

if TYPE_CHECKING:
    from fedvlm_jax.methods import Method
    from fedvlm_jax.models import Vlm


def check_choices(run: Run) -> None:
    """Refuse options that the run's method cannot work with.

    Raises:
        UserError: the first of them, with the reason.
    """
    _check_pairs(run)
    _check_method(run, declare(run.method, run), f"--method {run.method}")


def check_comparison(base: Run, names: Sequence[str], options: Mapping[str, MethodOptions]) -> None:
    """Refuse options with which one of several methods cannot work, or that do nothing in any of them.

    Raises:
        UserError: the first of them, with the method and the reason.
    """
    _check_pairs(base)
    runs = {name: for_method(base, name, options.get(name)) for name in dict.fromkeys(names)}
    for name, run in runs.items():
        _check_method(run, declare(name, run), f"--methods {name}")
    for path in _list_changed(base):
        if all(path not in _list_changed(run) for run in runs.values()):
            raise UserError(f"{_flag(path)} means nothing to any of --methods {' '.join(runs)}: leave it out")


def for_method(base: Run, name: str, options: MethodOptions | None = None) -> Run:
    """Give a method the options that others have too, without those that would merely do nothing in it.

    Args:
        base: the options.
        name: the method.
        options: its own numbers; its defaults if None.
    """
    run = dataclasses.replace(base, method=name, method_options=options or MethodOptions())
    moot = declare(name, run).moot
    local = {field.name: field.default for field in dataclasses.fields(LocalOptions) if f"local.{field.name}" in moot}
    weighting = TrainOptions().weighting if "train.weighting" in moot else run.train.weighting
    return dataclasses.replace(
        run,
        server=ServerOptions() if "server" in moot else run.server,
        local=dataclasses.replace(run.local, **local),
        train=dataclasses.replace(run.train, weighting=weighting),
    )


def declare(name: str, run: Run) -> "Method":
    """Make a method with a run's options but without a model: for what it says of itself."""
    from fedvlm_jax.config.method_setup import make_setup
    from fedvlm_jax.methods import load_method  # late: it imports jax

    def nothing(*_: Any) -> Any:
        raise AssertionError("a method is made without a model: its functions may ask for one, `make` may not")

    options = run.method_options if run.method == name else MethodOptions()
    return load_method(name, dataclasses.replace(make_setup(run, None, nothing), options=options))


def find_rule(options: MethodOptions) -> str | None:
    """Return the rule of the method that `--share` makes; None for the options of any other method."""
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
    from fedvlm_jax.lora.sites import listing
    from fedvlm_jax.methods.base import is_factor
    from fedvlm_jax.utils import tree

    sites, spec = vlm.sites, lora.LoRA(run.lora.rank, run.lora.alpha, run.lora.targets or vlm.targets)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), sites, spec))
    factors = tree.partition(adapter, is_factor)[0]
    paths = {path: lora.virtual_paths(factors, path, sites) for path in tree.flatten(factors)}
    named = [name for path, several in paths.items() for name in (path, *several) if re.search(rule, name)]
    if not named:
        raise UserError(f"--share {rule!r} is found in no factor's path; there are:\n{listing(paths, 1000)}")


def _check_pairs(run: Run) -> None:
    for name in _changed(run.server, ServerOptions()):
        if name not in run.server.reads:
            raise UserError(
                f"--server.{name.replace('_', '-')} means nothing to --server.optimizer {run.server.optimizer}: "
                "leave it out, or choose another optimizer"
            )
    if run.local.scaffold:
        _check_scaffold(run)
    ranks, largest = run.lora.ranks, run.lora.rank
    if ranks and (min(ranks) < 1 or max(ranks) != largest):
        raise UserError(
            f"--lora.ranks {' '.join(map(str, ranks))}: they must be 1 or more, and the largest of them --lora.rank, "
            f"which is {largest}"
        )


def _check_scaffold(run: Run) -> None:
    """SCAFFOLD's control variate is (θ_server − θ_k) / Σ η, which must be the client's mean gradient."""
    # Clipping leaves it one (the mean of what was clipped), and so do rates that change from round to round.
    if run.train.optimizer != "sgd":
        raise UserError(
            "--local.scaffold takes a client's gradient from how far it went, which holds for plain steps alone: add "
            "--train.optimizer sgd (it needs far larger learning rates than adamw)"
        )
    if run.local.proximal:
        raise UserError(
            "--local.scaffold and --local.proximal exclude each other: what scaffold takes for a client's gradient "
            "would hold the proximal term, and its correction would undo it"
        )
    if run.lora.ranks:
        raise UserError(
            "--local.scaffold and --lora.ranks exclude each other: a client of lower rank has no gradient of the "
            "factors that it lacks, so its control variate is none either"
        )
    if run.participation.sampling == "size" and run.train.weighting != "uniform":
        raise UserError(
            "--local.scaffold with --participation.sampling size needs --train.weighting uniform: weighed by examples "
            "too, sizes count twice in the average, and once in the control variates"
        )


def _check_method(run: Run, method: "Method", label: str) -> None:
    """Refuse what changes a round's mathematics in a way that the method has no place for."""
    if type(run.method_options) is not find_method_options(run.method):
        raise UserError(f"{run.method_options} are the numbers of another method than {label}")
    for path in _list_changed(run):
        why = method.refuses.get(path) or method.refuses.get(path.partition(".")[0])
        if why:
            raise UserError(
                f"{_flag(path)} does not go with {label}, because {why}. Leave it out, or leave the method out"
            )
    if run.method == SHARE and not find_rule(run.method_options):
        raise UserError(f"{label} needs its rule: add --share REGEX, for example --share 'decoder/.*/b$'")


def _list_changed(run: Run) -> list[str]:
    """List those of the options of a round's mathematics that are not at their default."""
    server = [f"server.{name}" for name in _changed(run.server, ServerOptions())]
    local = [f"local.{name}" for name in _changed(run.local, LocalOptions())]
    weighting = ["train.weighting"] if run.train.weighting != TrainOptions().weighting else []
    return [*server, *local, *weighting, *(["lora.ranks"] if run.lora.ranks else [])]


def _changed(options: Any, default: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(default, f.name)]


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")
