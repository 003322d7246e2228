"""`fedvlm evaluate RUN`: every client's stored adapter once more; or an adapter of PEFT's, on anybody's data."""

from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.cli._flags import find_written
from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import EvaluationOptions, Run, SystemOptions
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import Count, Seed


def evaluate(
    run: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="[RUN]", help="The folder of a run.", help_behavior_hint="(default: see --adapter)"),
    ] = None,
    adapter: Annotated[
        Path | None, tyro.conf.arg(metavar="PEFT_DIR", help_behavior_hint="(default: those of RUN)")
    ] = None,
    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR|HUB_ID")] = "florence2-nano",
    image_size: Annotated[
        Count | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="(default: its own)")
    ] = None,
    image_tiles: Annotated[Count | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")] = None,
    image_pixels: Annotated[
        Count | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="(default: all have one size)")
    ] = None,
    seed: Seed = 0,
    data: DataOptions = emoji.Options(),  # noqa: B008  # frozen
    evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008
    system: SystemOptions = SystemOptions(),  # noqa: B008
) -> None:
    """Evaluate every client's adapter of a finished run again, or an adapter of PEFT's that was trained elsewhere.

    The options after --adapter go with it alone: a run has its own.

    Args:
        adapter: a folder of PEFT's, evaluated on the data of every client.
        model: the base that it was trained on, as for `fedvlm train`, and so the next.
        image_size: side of the square that pictures are brought to.
        image_tiles: tiles along a picture's longer side.
        image_pixels: of a picture at most, each on a grid of its own.
        seed: decides the clients and their splits.
        data: whose rows.
        evaluation: how.
        system: devices and memory.
    """
    if adapter is None:
        if run is None:
            raise UserError("say what to evaluate: fedvlm evaluate RUN, or fedvlm evaluate --adapter PEFT_DIR")
        if written := sorted(find_written()):
            raise UserError(f"{written[0]} goes with --adapter: the options of {run} are those of its folder")
        _evaluate_run(run)
        return
    if run is not None:
        raise UserError(f"{run} and --adapter {adapter} exclude each other: leave one out")
    options = Run(
        method="local", model=model, image_size=image_size, image_tiles=image_tiles,
        image_pixels=image_pixels, start=adapter, seed=seed, data=data, evaluation=evaluation, system=system,
    )  # fmt: skip
    validate(options)
    start_quickly()

    from fedvlm_jax.reporting import score_tables, tables
    from fedvlm_jax.training.evaluate import evaluate_adapter
    from fedvlm_jax.utils import progress_display

    show = progress_display.open_progress()
    try:
        record = evaluate_adapter(options, show)
    finally:
        show.finish()
    tables.show_all(score_tables.tabulate_run(record))


def _evaluate_run(run: Path) -> None:
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no config.json there, so it is not the folder of a run")

    start_quickly()

    from fedvlm_jax.reporting import score_tables, tables
    from fedvlm_jax.run_dir import reader
    from fedvlm_jax.training import evaluate as evaluating
    from fedvlm_jax.utils import progress_display

    show = progress_display.open_progress()
    try:
        evaluating.evaluate(run, show)
    finally:
        show.finish()
    tables.show_all(score_tables.tabulate_run(reader.read_run(run)))
