"""A run's options as the form of its adapters and as its method with what is around it; without data or weights."""

from collections.abc import Callable

from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.messages.attacks import with_attack
from fedvlm_jax.messages.compression import with_compression
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.messages.robust import make_pool
from fedvlm_jax.messages.secure_sum import make_secure_sum
from fedvlm_jax.methods import Method, Setup, load_method
from fedvlm_jax.models import Vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.privacy.mechanism import make_mechanism
from fedvlm_jax.privacy.sampling import plan_sampling

VECTORS = 4
"""Vectors of a soft prompt where a run names no number: the tokens of "a photo of a"."""


def make_spec(run: Run, vlm: Vlm) -> lora.LoRA:
    """Make the form of a run's adapters, on the sites that the model has by default where the options name none.

    With a soft prompt there are low-rank factors only where the options name sites.

    Raises:
        UserError: the targets name sites of the text model, and reach the vision tower or the connector unnamed; or the
            method is for models that choose among classes, and this one does not.
    """
    options, vectors, method = run.lora, count_vectors(run), declare(run.method, run)
    if vlm.bind is None and (vectors or method.classes):
        raise UserError(
            f"--method {run.method} {'trains a soft prompt' if vectors else 'is'} for models that choose among classes,"
            f" and {run.model} writes its answers: say --model clip-nano, which ships, or a folder of CLIP's, or take"
            " another method"
        )
    if vlm.bind is None and load_objective(run.objective, run.preference).classes:
        raise UserError(f"--objective {run.objective}: {run.model} writes its answers, it has no classes; take sft")
    targets = options.targets or ("" if vectors or method.parallel else vlm.targets)
    _check_reach(targets, vlm)
    return lora.LoRA(
        options.rank, options.alpha, targets or (), rslora=options.rslora, init=options.init, prompt=vectors,
        prompt_at=vlm.prompt_at, parallel=options.rank if method.parallel else 0, parallel_at=vlm.layers,
    )  # fmt: skip


def count_vectors(run: Run) -> int:
    """Count the vectors of a run's soft prompt; 0 where it has none."""
    if run.soft_prompt.vectors is not None:
        return run.soft_prompt.vectors
    return VECTORS if declare(run.method, run).prompt == "needed" else 0


def make_setup(run: Run, vlm: Vlm | None, start_optimizer: Callable[..., PyTree]) -> Setup:
    """Make what a method is made for, as far as a run's options decide it; clients and their ranks are not in them."""
    return Setup(
        sites={} if vlm is None else vlm.sites,
        spec=lora.LoRA() if vlm is None else make_spec(run, vlm),
        components={} if vlm is None else vlm.components,
        width=0 if vlm is None else vlm.image_width,
        texts=None if vlm is None else vlm.texts,
        start_optimizer=start_optimizer,
        keep_optimizer=run.train.optimizer_state == "kept",
        common_start=run.lora.private_a == "common",
        rounds=run.train.rounds,
        local_steps=run.train.local_steps if run.train.local_epochs is None else 0,  # epochs differ between clients
        local=run.local,
        server=run.server,
        options=run.method_options,
    )


def make_method(run: Run, setup: Setup) -> Method:
    """Make a run's method, with what happens to its messages on their way to the server.

    Raises:
        UserError: options that the method cannot work with.
    """
    method = with_attack(load_method(run.method, setup), run.participation.attack)
    method = with_compression(method, run.messages)
    if run.privacy.on:
        sampling = plan_sampling(run.privacy, setup.trainable or setup.population, run.cohort)
        return with_pool(method, make_mechanism(run.privacy, sampling, run.train.rounds))
    pool = make_secure_sum(run.messages, setup.cohort) if run.messages.secure else make_pool(run.messages)
    return method if pool is None else with_pool(method, pool)


def _check_reach(targets: str, vlm: Vlm) -> None:
    # Projections have the same names in tower and text model, so `q_proj` means both, which hardly anybody wants: the
    # tower's features could no longer be computed once.
    if not targets:
        return
    try:
        chosen = {site.path for site in lora.select(vlm.sites, targets)}
    except lora.LoraError:  # nothing matches: who makes the adapter says what there is
        return
    seeing = sorted(path for path in chosen if vlm.component(path) in ("vision", "connector"))
    unnamed = [path for path in seeing if path.partition("/")[0] not in targets]
    if unnamed and len(seeing) < len(chosen):
        top, text = (min(paths).partition("/")[0] for paths in (unnamed, chosen.difference(seeing)))
        raise UserError(
            f"--lora.targets {targets!r} is found in the text model, and in "
            f"{format_count(len(unnamed), 'site')} of its vision too, "
            f"such as {unnamed[0]}. For the text model alone say {text}/.*({targets}); for both name them: "
            f"({top}|{text})/.*({targets})"
        )
