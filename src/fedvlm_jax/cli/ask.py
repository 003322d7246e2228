"""`fedvlm ask RUN --client NAME --image PICTURE QUESTION`: what the models of a finished run answer."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.errors import UserError

_IMAGES = "A picture; give it again for a question about several. A folder: ask about each picture in it."


def ask(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="The folder of a finished run.")],
    question: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="QUESTION", help="The question, in quotes.")],
    client: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(required)")] = None,
    image: Annotated[
        tyro.conf.UseAppendAction[tuple[Path, ...]],
        tyro.conf.arg(metavar="FILE|FOLDER", help=_IMAGES, help_behavior_hint="(required)"),
    ] = (),
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(default: a table)")] = False,
) -> None:
    """Ask a client's own model about a picture, beside the bare base and the global model.

    Args:
        run: of `fedvlm train`.
        question: as the rows of the run's data ask.
        client: whose personal model answers.
        image: to ask about.
        json: print the answers as JSON.
    """
    from fedvlm_jax.asking.question import check_question, look_at
    from fedvlm_jax.run_dir.reader import find_client, read_finished

    stored = read_finished(run)
    name = find_client(client, stored.clients)
    question = check_question(question)
    if not image:
        raise UserError("say about which picture: --image FILE, or --image FOLDER for each picture of a folder")
    shown = look_at(image, stored.run.data.max_image_pixels)

    start_quickly()

    from fedvlm_jax.asking.answers_shown import tabulate_answers, write_answers
    from fedvlm_jax.asking.asker import open_asker
    from fedvlm_jax.reporting import tables
    from fedvlm_jax.utils import progress_display

    show = progress_display.open_progress()
    try:
        asker = open_asker(run, stored, show)
        answers = asker.ask(name, question, shown)
    finally:
        show.finish()
    notes = asker.list_notes(shown)
    if json:
        sys.stdout.write(write_answers(run, name, question, shown, answers, notes))
        return
    console = tables.show_all(tabulate_answers(name, question, shown, answers))
    for note in notes:
        console.say(note, style="dim")
