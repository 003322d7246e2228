"""`fedvlm data`: what a federation would look like, before any training."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.config.run_options import optional
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.errors import UserError
from fedvlm_jax.records.detection import FORMS
from fedvlm_jax.run_dir.folder_lock import open_folder
from fedvlm_jax.utils.option_ranges import Count, Seed


def data(
    data: DataOptions = emoji.Options(),  # noqa: B008  # frozen
    seed: Seed = 0,
    model: Annotated[str | None, optional("NAME|DIR|HUB_ID", "no tokens are counted")] = None,
    image_size: Annotated[Count | None, optional("PIXELS", "as the model's processor has it")] = None,
    image_tiles: Annotated[Count | None, optional("INT", "none")] = None,
    image_pixels: Annotated[Count | None, optional("PIXELS", "all have one size")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/<time>-data)")] = None,
    check_images: bool = False,
    strict: bool = False,
) -> None:
    """Show who would have which rows, of what, and whether an image stands where it may not, before any training.

    Args:
        data: the same options as those of `fedvlm train`.
        seed: the run's; it decides the partition and the splits.
        model: count prompts and answers in the tokens of this model, whose weights are not read.
        image_size: as `fedvlm train` has it, for --model.
        image_tiles: as `fedvlm train` has it, for --model.
        image_pixels: as `fedvlm train` has it, for --model.
        out: folder for data.json and data.png.
        check_images: decode every image too, to find broken ones and files that show the same; else they are hashed.
        strict: end with exit code 1 if an image is in two splits.
    """
    if model is None and (image_size or image_tiles or image_pixels):
        raise UserError(
            "--image-size, --image-tiles and --image-pixels are for --model, whose tokens they change: name it"
        )
    from fedvlm_jax.reporting import data_report, tables
    from fedvlm_jax.utils import progress_display
    from fedvlm_jax.utils.console import Terminal

    show = progress_display.open_progress()
    with open_folder(out, "data") as folder:
        try:
            description = data_report.describe_data(
                data, seed, folder, check_images=check_images, model=model, image_size=image_size,
                image_tiles=image_tiles, image_pixels=image_pixels, note=show.note,
            )  # fmt: skip
        finally:
            show.finish()
    console = Terminal()
    for table in data_report.tabulate_data(description):
        tables.show(console, dataclasses.replace(table, note=""))
        console.say(f"{table.note}\n" if table.note else "", style="dim")
    if form := description["form"]:
        console.say(f"form     {form}: {FORMS[form]}")
    leaks = data_report.find_leaks(description)
    for sentences, style in ((data_report.word_findings(description), "yellow"), (leaks, "bold red")):
        for sentence in sentences:
            console.say(sentence, style=style)
    if not check_images:
        todo = "were not decoded: --check-images does that, and finds broken ones"
        if model is not None:  # whose tokens are counted of sound ones
            todo = "were decoded to find broken ones, and not compared: --check-images does that"
        console.say(f"pictures {todo}", style="dim")
    console.say(f"picture  {folder / 'data.png'}\ndata     {folder / 'data.json'}")
    if leaks and strict:
        print(f"fedvlm: --strict: {len(leaks)} of the checks found a leak", file=sys.stderr)
        raise SystemExit(1)
