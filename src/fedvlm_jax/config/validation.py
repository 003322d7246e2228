"""Options that cannot work, told before anything is loaded: one message each, which says what to change."""

import dataclasses
import difflib
import re
from pathlib import Path

from fedvlm_jax.config.method_options import check_choices, check_comparison, find_rule
from fedvlm_jax.config.run_options import (
    METHOD,
    SHARE,
    Compare,
    PreferenceOptions,
    Run,
    TrainOptions,
    methods_available,
    objectives_available,
)
from fedvlm_jax.data.sources.registry import find_options
from fedvlm_jax.distributed.mesh_shape import parse_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics.metric_labels import SELECTING
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils.option_ranges import LARGEST_SEED, check_ranges

FINETUNED, REMEMBERING = "+ft", "+knn"
"""What a method's name ends with in a comparison when local fine-tuning follows it, or neighbours are mixed in."""


def validate(run: Run) -> None:
    """Refuse what cannot be run.

    What needs the data, the model or the devices to be judged (a cohort larger than the population, a rank above a
    layer's width) is refused where those are read.

    Raises:
        UserError: the first option, or pair of options, that cannot work.
    """
    _require_choice("--method", run.method, (*methods_available(), SHARE))
    _validate_common(run)
    check_choices(run)


def _validate_common(run: Run) -> None:
    """What does not depend on the method."""
    check_ranges(run)
    _require_choice("--objective", run.objective, objectives_available())
    _check_preference(run)
    _check_metrics(run)
    _check_model(run.model)
    if type(run.data) is not find_options(run.data.source):
        raise UserError(f"--data {run.data.source} has other options than {type(run.data).__qualname__}")
    _check_patterns(run)
    _check_participation(run)
    _check_pairs(run)


def plain(method: str) -> str:
    """A method's name in a comparison without its "+ft" or "+knn"."""
    return method.removesuffix(FINETUNED).removesuffix(REMEMBERING)


def validate_comparison(comparison: Compare) -> None:
    """Refuse a comparison that cannot be run.

    Raises:
        UserError: as `validate`, for every run it is made of.
    """
    base = comparison.base
    check_ranges(comparison)
    if not comparison.methods:
        raise UserError("--methods names no method: say which to compare, for example --methods local plora")
    for name in comparison.methods:
        _require_choice("--methods", plain(name), (*methods_available(), SHARE))
    twice = sorted({name for name in comparison.methods if comparison.methods.count(name) > 1})
    if twice:
        raise UserError(f"--methods names {twice[0]} twice: leave one out")
    if base.seed + comparison.seeds - 1 > LARGEST_SEED:
        raise UserError(f"--seed {base.seed} and --seeds {comparison.seeds} go beyond {LARGEST_SEED}")
    if base.method != METHOD:
        raise UserError(f"--method {base.method} chooses for `fedvlm train`; here say --methods {base.method} ...")
    if strangers := sorted(comparison.method_options.keys() - {*map(plain, comparison.methods)}):
        raise UserError(f"there are numbers of {strangers[0]}, which is not compared: add it to --methods")
    if base.resume is not None:
        raise UserError(f"--resume goes on with one run; to go on with a comparison repeat it with --out {base.resume}")
    if base.train.finetune_steps:
        raise UserError(
            '--train.finetune-steps is for `fedvlm train`; here add "+ft" to a method, and --finetune-steps'
        )
    if base.evaluation.neighbours:
        raise UserError('--evaluation.neighbours is for `fedvlm train`; here add "+knn" to a method, and --neighbours')
    _validate_common(base)
    check_comparison(base, [plain(name) for name in comparison.methods], comparison.method_options)


def _check_model(model: str) -> None:
    if not model:
        raise UserError("--model is empty: give a shipped model's name, a folder or a Hugging Face hub id")
    # A hub id is `name` or `owner/name`; anything else that has a slash can only be meant as a path.
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")
    if is_path and not Path(model).expanduser().is_dir():
        raise UserError(f"--model {model}: there is no such folder")


def _check_preference(run: Run) -> None:
    """An option that the objective does not read would silently do nothing."""
    stated, default = (dataclasses.asdict(options) for options in (run.preference, PreferenceOptions()))
    changed = [name for name in stated if stated[name] != default[name]]
    if not changed:
        return  # the objective's file imports jax, which a run with default options need not wait for here
    for name in changed:
        if name not in load_objective(run.objective, run.preference).reads:
            readers = [o for o in objectives_available() if name in load_objective(o, run.preference).reads]
            raise UserError(
                f"--preference.{name.replace('_', '-')} means nothing to --objective {run.objective}: leave it out, or "
                f"use --objective {' or '.join(readers)}"
            )


def _check_metrics(run: Run) -> None:
    from fedvlm_jax.evaluation.metrics.text_metrics import METRICS  # late: it imports numpy

    evaluation = run.evaluation
    for name in evaluation.metrics:
        _require_choice("--evaluation.metrics", name, tuple(METRICS))
    if evaluation.select_by:
        _require_choice("--evaluation.select-by", evaluation.select_by, SELECTING)
    judged_by = evaluation.select_by or load_objective(run.objective, run.preference).select_by
    if judged_by in METRICS and judged_by not in evaluation.metrics:
        raise UserError(f"--evaluation.metrics leaves out {judged_by}, by which the best round is chosen: add it")


def _check_participation(run: Run) -> None:
    train, options = run.train, run.participation
    if options.sampling != "uniform" and run.cohort is None:
        raise UserError(
            f"--participation.sampling {options.sampling} says how clients are drawn, and without --cohort everybody "
            "takes part: say how many with --cohort, or leave it out"
        )
    if train.local_epochs is None:
        if options.stragglers and train.local_steps == 1:
            raise UserError(
                "--participation.stragglers take fewer steps than --train.local-steps 1, and there are none: take more "
                "local steps, or leave it out"
            )
        return
    if train.local_steps != TrainOptions().local_steps:
        raise UserError(
            f"--train.local-epochs {train.local_epochs} and --train.local-steps {train.local_steps} exclude each "
            "other: epochs decide how many steps every client takes; leave one out"
        )


def _check_patterns(run: Run) -> None:
    for flag, pattern in (("--lora.targets", run.lora.targets), ("--share", find_rule(run.method_options) or "")):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{flag} {pattern!r} is not a regular expression: {error}") from None


def _check_pairs(run: Run) -> None:
    train, system = run.train, run.system
    if train.warmup_rounds > train.rounds:
        raise UserError(
            f"--train.warmup-rounds is {train.warmup_rounds}, and there are --train.rounds {train.rounds}: warm up in "
            "fewer, or train longer"
        )
    if train.learning_rate_a == 0 and train.learning_rate_b == 0:
        raise UserError("--train.learning-rate-a and --train.learning-rate-b are both 0: nothing would be trained")
    if train.optimizer == "sgd" and train.weight_decay:
        raise UserError("--train.weight-decay belongs to AdamW: leave it at 0, or use --train.optimizer adamw")
    if system.wave and run.cohort and system.wave > run.cohort:
        raise UserError(f"--wave {system.wave} is wider than --cohort {run.cohort}: make the wave smaller")
    mesh = parse_mesh(system.mesh)
    if system.wave and mesh and system.wave % mesh.clients:
        raise UserError(f"--wave {system.wave} does not divide over --mesh {mesh}: use a multiple of {mesh.clients}")
    if system.cache_dir is not None and system.cache not in ("auto", "disk"):
        raise UserError(f"--system.cache-dir is for --system.cache disk, not {system.cache}")
    if run.out is not None and run.resume is not None:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")


def _require_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{flag} {value}: {hint}there are {', '.join(choices) or 'none'}")
