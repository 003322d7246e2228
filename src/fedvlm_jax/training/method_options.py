"""Which options go with which method, told before anything is loaded.

What a method takes it says itself (`Method.takes`, `Method.refuses`), so nothing here knows any by name. Options of two
kinds are looked at: those that change the mathematics of a round (the server's optimiser, proximal terms, control
variates, ranks) must make sense with every method that is run; those that belong to single methods (`--hyper.*`,
`--share`) must mean something to one of them.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.config import HyperOptions, LocalOptions, ServerOptions
from fedvlm_jax.training.config import SHARE, Run, TrainOptions, methods_available

if TYPE_CHECKING:
    from fedvlm_jax.methods import Method
    from fedvlm_jax.models import Vlm

__all__ = ["RANGES", "check_choices", "check_comparison", "check_rule", "declare", "for_method"]

Range = tuple[Callable[[float], bool], str]

_WEIGHTING = "train.weighting"
"""What every method takes that does not refuse it."""

_ABOVE_ZERO: Range = (lambda x: 0 < x < math.inf, "above 0")
_FROM_ZERO: Range = (lambda x: 0 <= x < math.inf, "a number of 0 or more")
_SHARE: Range = (lambda x: 0 <= x <= 1, "from 0 to 1")
_DECAY: Range = (lambda x: 0 <= x < 1, "0 or more and below 1")
_COUNT: Range = (lambda x: x >= 1, "1 or more")

RANGES: dict[str, Range] = {
    "local.proximal": _FROM_ZERO,
    "server.learning_rate": _ABOVE_ZERO,
    "server.beta1": _DECAY,
    "server.beta2": _DECAY,
    "server.epsilon": _ABOVE_ZERO,
    "hyper.ditto_lambda": _FROM_ZERO,
    "hyper.apfl_alpha": _SHARE,
    "hyper.pfedme_lambda": _ABOVE_ZERO,  # at 0 the global model would never move
    "hyper.pfedme_inner": _COUNT,
    "hyper.pfedme_rate": _ABOVE_ZERO,
    "hyper.pfedme_beta": _ABOVE_ZERO,
    "hyper.dpa_alpha": _SHARE,
    "hyper.dpa_local": _SHARE,
    "hyper.fair_lambda": _ABOVE_ZERO,  # at 0 the system that gives the correction may be singular
    "hyper.svd_every": _COUNT,
    "hyper.rpca_beta": _FROM_ZERO,
    "hyper.rpca_steps": _COUNT,
    "hyper.mix_temperature": _ABOVE_ZERO,
    "hyper.mosaic_weight": _SHARE,
}
"""Every number beside a method: option -> what it may be."""


def check_choices(run: Run) -> None:
    """Refuse options that the run's method cannot work with, or that would do nothing.

    Raises:
        UserError: the first of them, with the reason.
    """
    _check_numbers(run)
    method = declare(run.method, run)
    _check_method(run, method, f"--method {run.method}")
    if run.share and "share" not in method.takes:
        raise UserError(
            f"--share makes a method of its own, named {SHARE}: leave out --method {run.method}, or leave out --share"
        )
    for path in _own_options(run):
        if path not in method.takes and path != "share":
            raise UserError(
                f"{_flag(path)} means nothing to --method {run.method}: leave it out, or use {_name_readers(path)}"
            )


def check_comparison(base: Run, names: Sequence[str]) -> None:
    """Refuse options with which one of several methods cannot work, or that do nothing in any of them.

    Raises:
        UserError: the first of them, with the method and the reason.
    """
    _check_numbers(base)
    methods = {name: declare(name, base) for name in dict.fromkeys(names)}
    for name, method in methods.items():
        _check_method(_leave_out(base, method), method, f"--methods {name}")
    for path in _orthogonal_options(base):
        if all(path not in _orthogonal_options(_leave_out(base, method)) for method in methods.values()):
            raise UserError(f"{_flag(path)} means nothing to any of --methods {' '.join(methods)}: leave it out")
    for path in _own_options(base):
        if not any(path in method.takes for method in methods.values()):
            raise UserError(
                f"{_flag(path)} means nothing to any of --methods {' '.join(methods)}: leave it out, or compare "
                f"{_name_readers(path)} too"
            )


def for_method(base: Run, name: str) -> Run:
    """A comparison's options as this method has them: what belongs to other methods alone is at its default."""
    method = declare(name, base)
    base, takes, default = _leave_out(base, method), method.takes, HyperOptions()
    hyper = {
        field.name: getattr(base.hyper if f"hyper.{field.name}" in takes else default, field.name)
        for field in dataclasses.fields(default)
    }
    return dataclasses.replace(
        base, method=name, share=base.share if "share" in takes else "", hyper=HyperOptions(**hyper)
    )


def _leave_out(run: Run, method: "Method") -> Run:
    """The options without those that would merely do nothing in this method."""
    local = {
        path.removeprefix("local."): getattr(LocalOptions(), path[6:]) for path in method.moot if path[:6] == "local."
    }
    server = ServerOptions() if "server" in method.moot else run.server
    weighting = TrainOptions().weighting if _WEIGHTING in method.moot else run.train.weighting
    return dataclasses.replace(
        run,
        server=server,
        local=dataclasses.replace(run.local, **local),
        train=dataclasses.replace(run.train, weighting=weighting),
    )


def declare(name: str, run: Run) -> "Method":
    """Make a method with a run's options but without a model: for what it says of itself."""
    from fedvlm_jax.methods import load_method
    from fedvlm_jax.training.method_setup import make_setup

    def nothing(*_: Any) -> Any:
        raise AssertionError("a method is made without a model: its functions may ask for one, `make` may not")

    return load_method(name, make_setup(run, None, nothing))


def check_rule(run: Run, vlm: "Vlm") -> None:
    """Refuse a `--share` that names no factor of the adapter that the run would have.

    Raises:
        UserError: with the paths that there are.
    """
    if not run.share:
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
    named = [name for path, several in paths.items() for name in (path, *several) if re.search(run.share, name)]
    if not named:
        raise UserError(f"--share {run.share!r} is found in no factor's path; there are:\n{listing(paths, 1000)}")


def _check_numbers(run: Run) -> None:
    for path, (holds, expected) in RANGES.items():
        value = _value(run, path)
        if not holds(value):
            raise UserError(f"{_flag(path)} is {value}: it must be {expected}")
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
    try:
        re.compile(run.share)
    except re.error as error:
        raise UserError(f"--share {run.share!r} is not a regular expression: {error}") from None


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
    for path in _orthogonal_options(run):
        part = path.partition(".")[0]
        if {path, part} & method.takes or (path == _WEIGHTING and path not in method.refuses):
            continue
        why = (
            method.refuses.get(path)
            or method.refuses.get(part)
            or "the method was not written for it (Method.takes does not name it)"
        )
        raise UserError(f"{_flag(path)} does not go with {label}, because {why}. Leave it out, or leave the method out")
    if "share" in method.takes and not run.share:
        raise UserError(f"{label} needs its rule: add --share REGEX, for example --share 'decoder/.*/b$'")


def _orthogonal_options(run: Run) -> list[str]:
    server = [f"server.{name}" for name in _changed(run.server, ServerOptions())]
    local = [f"local.{name}" for name in _changed(run.local, LocalOptions())]
    weighting = [_WEIGHTING] if run.train.weighting != TrainOptions().weighting else []
    return [*server, *local, *weighting, *(["lora.ranks"] if run.lora.ranks else [])]


def _own_options(run: Run) -> list[str]:
    """What was chosen of the options that belong to single methods."""
    hyper = [f"hyper.{name}" for name in _changed(run.hyper, HyperOptions())]
    return [*hyper, *(["share"] if run.share else [])]


def _name_readers(path: str) -> str:
    if path == "share":
        return SHARE
    readers = [name for name in methods_available() if path in declare(name, Run()).takes]
    return " or ".join(readers) or "a method that reads it"


def _changed(options: Any, default: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(default, f.name)]


def _value(run: Run, path: str) -> Any:
    group, _, name = path.partition(".")
    return getattr(getattr(run, group), name)


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")
