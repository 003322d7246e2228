"""From a run's options to its method's programs and the shapes of its rounds: what training and planning share.

Nothing here looks at data or weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedvlm_jax import lora
from fedvlm_jax.config.method_checks import check_rule
from fedvlm_jax.config.method_setup import make_method, make_setup, make_spec
from fedvlm_jax.config.run_options import Run, SystemOptions, TrainOptions
from fedvlm_jax.data.batches import count_steps
from fedvlm_jax.distributed.mesh import CLIENTS
from fedvlm_jax.errors import UserError, format_count
from fedvlm_jax.federation.cohort import Layout, choose_layout
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.federation.inputs.feature_cache import is_vision_frozen
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round_shapes import shape_key
from fedvlm_jax.methods import load_method
from fedvlm_jax.models import Stacking, Vlm
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.privacy.sampling import plan_sampling

MOST_ROWS = 2**28
"""Rows that a round may take; their numbers alone are a GiB then."""


def choose_arithmetic(options: SystemOptions) -> dict[str, Any]:
    """Choose the arguments of `load_vlm` and `read_vlm` that say how the model computes.

    >>> choose_arithmetic(SystemOptions(remat=True))["stacking"]
    Stacking(remat=True, unroll=3)
    """
    compute = jnp.bfloat16 if options.compute == "bfloat16" else jnp.float32
    return {"compute_dtype": compute, "stacking": Stacking(options.remat, options.unroll)}


def deal_ranks(dealt: Sequence[int], clients: int) -> tuple[int, ...]:
    """Deal ranks to the clients in turn; empty where all have the adapter's.

    >>> deal_ranks((2, 8), 5)
    (2, 8, 2, 8, 2)
    """
    return tuple(dealt[number % len(dealt)] for number in range(clients)) if dealt else ()


def lay_out_sizes(run: Run, sizes: Sequence[int], mesh: Mesh, cohort: int | None, wave: int | None) -> Layout:
    """Choose the shapes of a run's rounds.

    Args:
        run: the options.
        sizes: training examples of every client that trains.
        mesh: the devices.
        cohort, wave: clients a round (None: all), and side by side (None: as many as is usual). Under differential
            privacy a round has places for more, see `plan_sampling`.

    >>> from fedvlm_jax.distributed.mesh import make_mesh
    >>> lay_out_sizes(Run(), [9, 30], make_mesh(1), cohort=None, wave=None).wave
    2

    Raises:
        UserError: a round would take more rows than a computer can list, or so many clients cannot be drawn.
    """
    if run.privacy.on:
        cohort = plan_sampling(run.privacy, len(sizes), cohort).places
    train, steps = run.train, run.train.local_steps
    # All clients run the steps of the largest, so that they share one program; what is beyond theirs does not count.
    if train.local_epochs is not None:
        steps = max((count_steps(size, train.local_epochs, train.batch_size) for size in sizes), default=1)
    # Their numbers are made for all clients at once, and are refused here rather than by the memory.
    rows = (cohort or len(sizes)) * steps * train.batch_size
    if rows > MOST_ROWS:
        raise UserError(
            f"a round would take {rows:,} rows ({format_count(cohort or len(sizes), 'client')}, "
            f"{format_count(steps, 'step')}, "
            f"batches of {train.batch_size}): {MOST_ROWS:,} is the most; lower the local steps or --train.batch-size"
        )
    return choose_layout(
        sizes,
        cohort=cohort,
        wave=wave,
        devices=mesh.shape[CLIENTS],
        steps=max(steps, 1),
        batch=train.batch_size,
    )


def choose_program_options(run: Run) -> Run:
    """Put every option at its default that a method's programs do not depend on: runs that differ in these share them.

    >>> fast, slow = (Run(seed=seed, train=TrainOptions(learning_rate_a=rate)) for seed, rate in ((0, 1e-2), (1, 1e-4)))
    >>> choose_program_options(fast) == choose_program_options(slow)
    True
    """
    train = run.train
    return Run(
        method=run.method,
        method_options=run.method_options,
        objective=run.objective,
        preference=run.preference,
        lora=run.lora,
        soft_prompt=run.soft_prompt,
        local=run.local,
        server=run.server,
        messages=run.messages,
        privacy=run.privacy,
        cohort=run.cohort if run.privacy.on else None,
        participation=ParticipationOptions(attack=run.participation.attack, attackers=run.participation.attackers),
        train=TrainOptions(
            rounds=train.rounds,
            optimizer=train.optimizer,
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
            optimizer_state=train.optimizer_state,
        ),
    )


def build_programs(
    vlm: Vlm, mesh: Mesh, run: Run, clients: int, cohort: int, places: int, steps: int, trainable: int | None = None
) -> Programs:
    """Make a method's programs on a mesh; nothing is compiled yet.

    Args:
        vlm, mesh: the model and the devices.
        run: the options; `choose_program_options` names those that are read.
        clients: in the population.
        cohort, places, steps: of a round, as `Layout` has them.
        trainable: clients of the population that can be drawn; None: all.

    Raises:
        UserError: options that the method cannot work with.
    """
    train = run.train
    trainer = make_local_trainer(
        vlm,
        load_objective(run.objective, run.preference),
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        dropout=run.lora.dropout,
    )
    setup = replace(
        make_setup(run, vlm, trainer.start),
        population=clients,
        trainable=trainable,
        cohort=cohort,
        places=places,
        local_steps=steps,
        ranks=deal_ranks(run.lora.ranks, clients),
    )
    return Programs(make_method(run, setup), trainer, mesh, vlm.component)


def check_fit(run: Run, vlm: Vlm) -> None:
    """Refuse a method that cannot work with the model or its sites, from shapes alone.

    Raises:
        UserError: as `make_spec` and `check_rule`, and what the method itself says.
    """
    check_rule(run, vlm)
    setup = make_setup(run, vlm, lambda *_: {})
    method = load_method(run.method, setup)
    jax.eval_shape(lambda key: method.init(adapter=setup.draw(key)), shape_key())


def check_room(run: Run, vlm: Vlm) -> None:
    """Refuse to ask for more answer tokens than the model has positions.

    Raises:
        UserError: there are fewer positions than answer tokens asked for.
    """
    asked, positions = run.evaluation.max_answer_tokens, vlm.positions
    if asked is not None and asked > positions:
        raise UserError(
            f"--evaluation.max-answer-tokens is {asked}: {run.model} has {positions} positions, ask for fewer"
        )


def check_frozen(run: Run, vlm: Vlm, flag: str) -> None:
    """Refuse adapters that change features, where `flag` gives pictures grids of their own: features alone are read.

    Raises:
        UserError: the adapter reaches into the vision tower or the connector.
    """
    spec = make_spec(run, vlm)
    if not is_vision_frozen(vlm, jax.eval_shape(lambda: lora.init(jax.random.key(0), vlm.sites, spec))):
        raise UserError(
            f"{flag} needs a frozen tower, and --lora.targets reach into it or into its projector: keep them in the "
            "text model, or leave the option out, so that all pictures have one size"
        )


def check_grids(run: Run, vlm: Vlm, pixels: int, flag: str) -> None:
    """Refuse grids of their own, of so many pixels at most, that `flag` asks for in vain; no processor is read.

    Raises:
        UserError: the model has no such grids, an image token has more pixels, or the tower is not frozen.
    """
    if vlm.grids is None:
        raise UserError(f"pictures of {run.model} have no grids of their own: leave {flag} out")
    if pixels < vlm.grids.pixels:
        raise UserError(f"{flag} {pixels}: an image token alone has {vlm.grids.pixels}")
    check_frozen(run, vlm, flag)
