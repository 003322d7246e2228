"""Options that cannot work, refused before anything is loaded: one message each, which says what to change."""

import difflib
import re
from pathlib import Path

from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.method_checks import MATHEMATICS, check_method, find_rule, for_method, list_changed, write_flag
from fedvlm_jax.config.run_options import METHOD, SHARE, Run, methods_available, objectives_available
from fedvlm_jax.data.sources.registry import check_source
from fedvlm_jax.distributed.mesh_option import parse_mesh
from fedvlm_jax.errors import UserError
from fedvlm_jax.evaluation.metrics.metric_labels import SELECTING
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils.option_ranges import LARGEST_SEED, check_ranges

FINETUNED, REMEMBERING = "+ft", "+knn"
"""Endings of a method's name in a comparison: local fine-tuning follows it, or neighbours are mixed in."""


def validate(run: Run) -> None:
    """Refuse what cannot be run.

    What needs the data, the model or the devices to be judged (a cohort larger than the population, a rank above a
    layer's width) is refused where those are read.

    Raises:
        UserError: the first option, or pair of options, that cannot work.
    """
    _require_choice("--method", run.method, (*methods_available(), SHARE))
    _check_common(run)
    check_method(run, f"--method {run.method}")


def plain(method: str) -> str:
    """Drop the "+ft" or "+knn" of a method's name in a comparison; it has one of them at most.

    >>> plain("plora+ft"), plain("plora+knn+ft")
    ('plora', 'plora+knn')
    """
    return method.removesuffix(FINETUNED if method.endswith(FINETUNED) else REMEMBERING)


def validate_comparison(comparison: Compare) -> None:
    """Refuse a comparison that cannot be run, or an option of it that does nothing in any of its methods.

    Raises:
        UserError: as `validate`, for every run it is made of.
    """
    base, names = comparison.base, list(dict.fromkeys(map(plain, comparison.methods)))
    check_ranges(comparison)
    if not names:
        raise UserError("--methods names no method: say which to compare, for example --methods local plora")
    for name in names:
        _require_choice("--methods", name, (*methods_available(), SHARE))
    twice = sorted({name for name in comparison.methods if comparison.methods.count(name) > 1})
    if twice:
        raise UserError(f"--methods names {twice[0]} twice: leave one out")
    if base.seed + comparison.seeds - 1 > LARGEST_SEED:
        raise UserError(f"--seed {base.seed} and --seeds {comparison.seeds} go beyond {LARGEST_SEED}")
    # Options of `train` that are others here would silently do nothing.
    if base.method != METHOD:
        raise UserError(f"--method {base.method} chooses for `fedvlm train`; here say --methods {base.method} ...")
    if strangers := sorted(comparison.method_options.keys() - set(names)):
        raise UserError(f"there are numbers of {strangers[0]}, which is not compared: add it to --methods")
    if base.resume is not None:
        raise UserError(f"--resume goes on with one run; to go on with a comparison repeat it with --out {base.resume}")
    if base.train.finetune_steps:
        raise UserError(
            '--train.finetune-steps is for `fedvlm train`; here add "+ft" to a method, and --finetune-steps'
        )
    if base.evaluation.neighbours:
        raise UserError('--evaluation.neighbours is for `fedvlm train`; here add "+knn" to a method, and --neighbours')
    _check_common(base)
    runs = [for_method(base, name, comparison.method_options.get(name)) for name in names]
    for run in runs:
        check_method(run, f"--methods {run.method}")
    for path in list_changed(base, *MATHEMATICS):
        if all(path not in list_changed(run, path) for run in runs):
            raise UserError(f"{write_flag(path)} means nothing to any of --methods {' '.join(names)}: leave it out")


def _check_common(run: Run) -> None:
    """Refuse what cannot work with any method."""
    check_ranges(run)
    _require_choice("--objective", run.objective, objectives_available())
    objective = load_objective(run.objective, run.preference)
    for path in list_changed(run, "preference"):
        name = path.removeprefix("preference.")
        if name not in objective.reads:
            readers = [o for o in objectives_available() if name in load_objective(o, run.preference).reads]
            raise UserError(
                f"{write_flag(path)} means nothing to --objective {run.objective}: leave it out, or "
                f"use --objective {' or '.join(readers)}"
            )
    from fedvlm_jax.evaluation.metrics.text_metrics import METRICS  # late: it imports numpy

    evaluation = run.evaluation
    for name in evaluation.metrics:
        _require_choice("--evaluation.metrics", name, tuple(METRICS))
    if evaluation.select_by:
        _require_choice("--evaluation.select-by", evaluation.select_by, SELECTING)
    judged_by = evaluation.select_by or objective.select_by
    if judged_by == "reward" and not objective.samples:
        raise UserError(f"--evaluation.select-by reward: --objective {run.objective} has none, only reward does")
    if judged_by in METRICS and judged_by not in evaluation.metrics:
        raise UserError(f"--evaluation.metrics leaves out {judged_by}, by which the best round is chosen: add it")
    if not run.model:
        raise UserError("--model is empty: give a shipped model's name, a folder or a Hugging Face hub id")
    # A hub id is `name` or `owner/name`; anything else that has a slash can only be meant as a path.
    is_path = run.model.startswith(("/", ".", "~")) or run.model.count("/") > 1 or run.model.endswith("/")
    if is_path and not Path(run.model).expanduser().is_dir():
        raise UserError(f"--model {run.model}: there is no such folder")
    check_source(run.data)
    if run.preference.reward_file is not None:
        from fedvlm_jax.records.reward_file import read_rewards

        read_rewards(run.preference.reward_file)  # for its errors
    for flag, pattern in (("--lora.targets", run.lora.targets), ("--share", find_rule(run.method_options) or "")):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{flag} {pattern!r} is not a regular expression: {error}") from None
    _check_pairs(run)
    _check_mathematics(run)
    _check_privacy(run)
    _check_pool(run)
    _check_attack(run)


def _check_pairs(run: Run) -> None:
    train, participation = run.train, run.participation
    if participation.sampling != "uniform" and run.cohort is None:
        raise UserError(
            f"--participation.sampling {participation.sampling} says how clients are drawn, and without --cohort "
            "everybody takes part: say how many with --cohort, or leave it out"
        )
    if train.local_epochs is None and train.local_steps == 1 and participation.stragglers:
        raise UserError(
            "--participation.stragglers take fewer steps than --train.local-steps 1, and there are none: take more "
            "local steps, or leave it out"
        )
    if train.local_epochs is not None and train.local_steps != Run().train.local_steps:
        raise UserError(
            f"--train.local-epochs {train.local_epochs} and --train.local-steps {train.local_steps} exclude each "
            "other: epochs decide how many steps every client takes; leave one out"
        )
    if train.warmup_rounds > train.rounds:
        raise UserError(
            f"--train.warmup-rounds is {train.warmup_rounds}, and there are --train.rounds {train.rounds}: warm up in "
            "fewer, or train longer"
        )
    if train.learning_rate_a == 0 and train.learning_rate_b == 0:  # one of them may be: that factor is frozen
        raise UserError("--train.learning-rate-a and --train.learning-rate-b are both 0: nothing would be trained")
    if train.optimizer == "sgd" and train.weight_decay:
        raise UserError("--train.weight-decay belongs to AdamW: leave it at 0, or use --train.optimizer adamw")
    system = run.system
    if system.wave and run.cohort and system.wave > run.cohort:
        raise UserError(f"--wave {system.wave} is wider than --cohort {run.cohort}: make the wave smaller")
    mesh = parse_mesh(system.mesh)
    if system.wave and mesh and system.wave % mesh.clients:  # each group trains as many clients at a time
        raise UserError(f"--wave {system.wave} does not divide over --mesh {mesh}: use a multiple of {mesh.clients}")
    if system.cache_dir is not None and system.cache not in ("auto", "disk"):
        raise UserError(f"--system.cache-dir is for --system.cache disk, not {system.cache}")
    if run.data.novel_classes and load_objective(run.objective, run.preference).pairs:
        raise UserError(
            f"--data.novel-classes does not go with --objective {run.objective}, whose rejected answers would name "
            "classes that nobody is to have heard of: take sft or classify"
        )
    if run.start is not None and (run.lora.ranks or run.lora.private_a != "common"):
        other = "--lora.ranks" if run.lora.ranks else f"--lora.private-a {run.lora.private_a}"
        raise UserError(f"--start and {other} exclude each other: all clients begin with the one adapter that is given")
    if run.image_size is not None and run.image_pixels is not None:
        raise UserError(
            f"--image-size {run.image_size} and --image-pixels {run.image_pixels} exclude each other: pictures have "
            "one size, or each a grid of its own; leave one out"
        )
    if run.out is not None and run.resume is not None:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")


def _check_mathematics(run: Run) -> None:
    """Refuse terms of local training and of the server that exclude each other, whatever the method."""
    for path in list_changed(run, "server"):
        if path.removeprefix("server.") not in run.server.reads:
            raise UserError(
                f"{write_flag(path)} means nothing to --server.optimizer {run.server.optimizer}: "
                "leave it out, or choose another optimizer"
            )
    # SCAFFOLD's control variate is (θ_server − θ_k) / Σ η, which must be the client's mean gradient. Clipping leaves it
    # one (the mean of what was clipped), and so do rates that change from round to round.
    scaffold, ranks, largest = run.local.scaffold, run.lora.ranks, run.lora.rank
    if scaffold and run.train.optimizer != "sgd":
        raise UserError(
            "--local.scaffold takes a client's gradient from how far it went, which holds for plain steps alone: add "
            "--train.optimizer sgd (it needs far larger learning rates than adamw)"
        )
    if scaffold and run.local.proximal:
        raise UserError(
            "--local.scaffold and --local.proximal exclude each other: what scaffold takes for a client's gradient "
            "would hold the proximal term, and its correction would undo it"
        )
    if scaffold and ranks:
        raise UserError(
            "--local.scaffold and --lora.ranks exclude each other: a client of lower rank has no gradient of the "
            "factors that it lacks, so its control variate is none either"
        )
    if scaffold and run.participation.sampling == "size" and run.train.weighting != "uniform":
        raise UserError(
            "--local.scaffold with --participation.sampling size needs --train.weighting uniform: weighed by examples "
            "too, sizes count twice in the average, and once in the control variates"
        )
    if ranks and (min(ranks) < 1 or max(ranks) != largest):
        raise UserError(
            f"--lora.ranks {' '.join(map(str, ranks))}: they must be 1 or more, and the largest of them --lora.rank, "
            f"which is {largest}"
        )


def _check_privacy(run: Run) -> None:
    """Refuse what no accountant has a number for, and options of privacy that do nothing."""
    privacy, changed = run.privacy, list_changed(run, "privacy")
    if not privacy.on:
        for path in changed:
            raise UserError(
                f"{write_flag(path)} means nothing without noise: say --privacy.epsilon or --privacy.noise, or leave "
                "it out"
            )
        return
    if privacy.mechanism != "banded" and "privacy.bands" in changed:
        raise UserError(f"--privacy.bands means nothing to --privacy.mechanism {privacy.mechanism}: leave it out")
    if privacy.mechanism == "banded" and not 2 <= privacy.bands <= run.train.rounds:
        raise UserError(
            f"--privacy.bands {privacy.bands}: noise is correlated over 2 rounds or more, and at most over all "
            f"--train.rounds {run.train.rounds}"
        )
    if privacy.mechanism == "banded" and privacy.quantile is not None:
        raise UserError(
            "--privacy.quantile and --privacy.mechanism banded exclude each other: rounds take back noise of rounds "
            "before, which was drawn for another clipping norm"
        )
    if privacy.sampling == "all" and run.cohort is not None:
        raise UserError(
            f"--privacy.sampling all and --cohort {run.cohort} exclude each other: leave one out; with --cohort the "
            "sampling is poisson by default"
        )
    if privacy.sampling != "all" and run.cohort is None:
        number = "how many on average" if privacy.sampling == "poisson" else "how many"
        raise UserError(
            f"--privacy.sampling {privacy.sampling} draws clients: say {number} with --cohort, or let everybody take "
            "part with --privacy.sampling all"
        )
    reasons = {
        "--participation.sampling": (
            run.participation.sampling != "uniform",
            "epsilon is known of clients that are drawn with equal chances alone",
        ),
        "--local.scaffold": (run.local.scaffold, "control variates leave the clients too, without noise"),
        "--lora.ranks": (bool(run.lora.ranks), "a message of lower rank tells whose it is"),
        "--preference.rewards cider": (
            "cider" in run.preference.rewards,
            "its document frequencies are counted over all clients without noise",
        ),
        "--messages.pool": (run.messages.pool != "mean", "what noise hides is known of a sum alone"),
    }
    for flag, (asked, reason) in reasons.items():
        if asked:
            raise UserError(f"{flag} does not go with --privacy.*, because {reason}: leave one out")


def _check_pool(run: Run) -> None:
    """Refuse options of a pool that it does not read, and what does not go with a robust one."""
    options = run.messages
    readers = {"hostile": ("trimmed", "krum", "multi-krum"), "bound": ("bound",)}
    for path in list_changed(run, *(f"messages.{name}" for name in readers)):
        if options.pool not in (reading := readers[path.partition(".")[2]]):
            raise UserError(
                f"{write_flag(path)} means nothing to --messages.pool {options.pool}: leave it out, or use "
                f"--messages.pool {' or '.join(reading)}"
            )
    if options.pool != "mean" and options.secure:
        raise UserError(
            f"--messages.pool {options.pool} and --messages.secure exclude each other: a secure sum shows no single "
            "message, and the rule looks at each"
        )
    if run.cohort is not None:
        check_pool_size(options, run.cohort)


def check_pool_size(options: MessageOptions, clients: int) -> None:
    """Refuse a pool that is to withstand more hostile clients than it can in a round of so many.

    Raises:
        UserError: that is so; with what to change.
    """
    if options.needed > clients:
        raise UserError(
            f"--messages.hostile {options.hostile}: --messages.pool {options.pool} needs {options.needed} clients in a "
            f"round to withstand so many, and there are {clients}: lower it, or make rounds larger"
        )


def _check_attack(run: Run) -> None:
    """Refuse an attack by nobody, and one on answers where training compares them."""
    attack, objective = run.participation.attack, load_objective(run.objective, run.preference)
    if attack != "none" and not run.participation.attackers:
        raise UserError(f"--participation.attack {attack}: say how many attack with --participation.attackers")
    if attack in ("label-flip", "backdoor") and objective.pairs:
        raise UserError(
            f"--participation.attack {attack} does not go with --objective {run.objective}: what is compared with the "
            "frozen model are the answers as the data have them; use --objective sft, or another attack"
        )


def _require_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{flag} {value}: {hint}there are {', '.join(choices) or 'none'}")
