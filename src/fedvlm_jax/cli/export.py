"""`fedvlm export RUN --to peft|merged`: the models of a finished run, for other programs."""

import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.errors import UserError, format_count


def export(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="The folder of a finished run.")],
    to: Literal["peft", "merged"] = "peft",
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: RUN/peft, RUN/merged)")
    ] = None,
    clients: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: all, to peft)")
    ] = (),
    uniform: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(default: no)")] = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    base: Annotated[
        str | None, tyro.conf.arg(metavar="NAME|DIR", help_behavior_hint="(default: its hub id, or where it lies)")
    ] = None,
    push: Annotated[str | None, tyro.conf.arg(metavar="HUB_ID", help_behavior_hint="(default: nowhere)")] = None,
) -> None:
    """Write every client's model for PEFT or transformers, and check its logits.

    Args:
        to: adapters that PEFT loads, one folder per client and one of the shared part; or whole checkpoints that
            transformers loads, the adapter written into the base.
        out: a folder to write to, which is not there yet or empty.
        clients: whose models; merged ones are large, and none is written that is not named ("all" is everybody).
        uniform: one rank and alpha for all modules of an adapter, for servers that read no patterns (vLLM).
        dtype: of the tensors that are written.
        base: how PEFT folders name the base.
        push: upload what was written to this private repository of the Hugging Face hub.
    """
    if to == "merged" and (uniform or base):
        raise UserError(f"{'--uniform' if uniform else '--base'} is for --to peft: leave it out")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UserError(f"--push {push}: expected a hub id, owner/name")
    if push is not None and to == "peft" and not base:
        _require_hub_id(run)
    start_quickly()

    import jax.numpy as jnp

    from fedvlm_jax.export.hub_upload import upload
    from fedvlm_jax.export.merged_export import export_merged
    from fedvlm_jax.export.peft_export import export_peft
    from fedvlm_jax.utils import progress_display

    place, kind = out or run / to, jnp.dtype(dtype)
    show = progress_display.open_progress()
    try:
        if to == "peft":
            count, error = export_peft(
                run, place, clients=clients, uniform=uniform, dtype=kind, base=base or "", note=show.note
            )
        else:
            count, error = export_merged(run, place, clients=clients, dtype=kind, note=show.note)
    finally:
        show.finish()
    print(f"{format_count(count, 'adapter' if to == 'peft' else 'model')}  {place}")
    print(f"logits, read back, against the run's own: largest difference {error}")
    if push is not None:
        print(f"pushed  {upload(place, push)}")


def _require_hub_id(run: Path) -> None:
    from fedvlm_jax.export.exported_run import find_hub_id
    from fedvlm_jax.run_dir.reader import read_finished

    if not find_hub_id(model := read_finished(run).run.model):
        raise UserError(
            f"--push: the folders would name their base, {model}, by its place on this machine, where nobody else "
            "finds it: say how others get it with --base owner/name"
        )
