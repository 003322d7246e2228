"""From a run's options to its method's programs and the shapes of its rounds: what training and planning share.

Nothing here looks at data or weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from fedvlm_jax.config.method_setup import make_setup
from fedvlm_jax.config.run_options import Run, SystemOptions
from fedvlm_jax.data.batches import count_steps
from fedvlm_jax.distributed.sharding import CLIENTS
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.cohort import Layout, choose_layout
from fedvlm_jax.federation.compiled import Programs, make_programs
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.methods import load_method
from fedvlm_jax.methods.config import LocalOptions, MethodOptions, ServerOptions
from fedvlm_jax.models import Stacking, Vlm
from fedvlm_jax.objectives import Objective

MOST_ROWS = 2**28
"""Rows that a round may take; their numbers alone are a GiB then."""


def choose_arithmetic(options: SystemOptions) -> dict[str, Any]:
    """Choose how the model computes, as `load_vlm` and `read_vlm` take it."""
    compute = jnp.bfloat16 if options.compute == "bfloat16" else jnp.float32
    return {"compute_dtype": compute, "stacking": Stacking(options.remat, options.unroll)}


def deal_ranks(dealt: Sequence[int], clients: int) -> tuple[int, ...]:
    """Deal ranks to the clients in turn; empty where all have the adapter's."""
    return tuple(dealt[number % len(dealt)] for number in range(clients)) if dealt else ()


def lay_out_sizes(run: Run, sizes: Sequence[int], mesh: Mesh, cohort: int | None, wave: int | None) -> Layout:
    """Choose the shapes of a run's rounds.

    Args:
        run: the options.
        sizes: training examples of every client that trains.
        mesh: the devices.
        cohort: clients a round; None means everybody.
        wave: clients side by side; None: as many as is usual.

    Raises:
        UserError: a round would take more rows than a computer can list.
    """
    train, steps = run.train, run.train.local_steps
    if train.local_epochs is not None:
        steps = max((count_steps(size, train.local_epochs, train.batch_size) for size in sizes), default=1)
    rows = (cohort or len(sizes)) * steps * train.batch_size
    if rows > MOST_ROWS:
        raise UserError(
            f"a round would take {rows:,} rows ({cohort or len(sizes)} clients, {steps} steps, batches of "
            f"{train.batch_size}): {MOST_ROWS:,} is the most; lower the local steps or --train.batch-size"
        )
    return choose_layout(
        sizes,
        cohort=cohort,
        wave=wave,
        devices=mesh.shape[CLIENTS],
        steps=max(steps, 1),
        batch=train.batch_size,
    )


def build_programs(
    run: Run,
    method: str,
    vlm: Vlm,
    objective: Objective,
    mesh: Mesh,
    *,
    population: int,
    layout: Layout,
    ranks: Sequence[int],
    common_start: bool,
    local: LocalOptions,
    server: ServerOptions,
) -> Programs:
    """Make a method's programs on a mesh; nothing is compiled yet.

    Args:
        run: the options, of which those that follow may be others' here.
        method: its name.
        vlm, objective, mesh: model, what is minimised, devices.
        population: clients that there are.
        layout: of the rounds.
        ranks: of every client, or none.
        common_start: do clients start from the same personal factors?
        local, server: options of local training and of the server's optimiser.

    Raises:
        UserError: options that the method cannot work with.
    """
    train = run.train
    trainer = make_local_trainer(
        vlm,
        objective,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        dropout=run.lora.dropout,
    )
    setup = replace(
        make_setup(run, vlm, trainer.start),
        common_start=common_start,
        population=population,
        cohort=layout.cohort,
        places=layout.places,
        local_steps=layout.steps,
        ranks=ranks,
        local=local,
        server=server,
        options=run.method_options if method == run.method else MethodOptions(),
    )
    return make_programs(load_method(method, setup), trainer, mesh, vlm.component)
