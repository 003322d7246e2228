"""`fedvlm node NODE_FILE --data SOURCE`: one client of a deployment, on the machine that has its rows."""

import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedvlm_jax.cli._flags import find_written
from fedvlm_jax.cli._process.signals import advising
from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.config.run_options import optional
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.errors import UserError, format_count

SOCKET = "worker.sock"
REFUSED = {"--data.max-prompt-tokens", "--data.max-answer-tokens", "--data.class-prompt"}
"""Options that are the plan's, and so not listed here."""
REQUIRED = {"--data"}


def node(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NODE_FILE", help="This client's own file.")],
    data: DataOptions = emoji.Options(),  # noqa: B008  # frozen
    model: Annotated[str | None, optional("NAME|DIR|HUB_ID", "as the plan says")] = None,
    folder: Annotated[Path | None, optional("DIR", "node-<number>")] = None,
    socket: Annotated[Path | None, optional("PATH", f"DIR/{SOCKET}")] = None,
) -> None:
    """Be one client of a deployment: hold its rows, its model and its state, and answer what Flower brings.

    It stays until Ctrl-C. Beside it runs a flower-supernode, whose command is printed.

    Args:
        data: the rows of this client alone, in the forms of `fedvlm train`.
        model: where the base is on this machine.
        folder: for its personal state and, in the end, its model; say the same one when it is started again.
        socket: where orders are taken, from this user alone.
    """
    if not find_written() >= REQUIRED:
        raise UserError("say whose rows this client trains on: fedvlm node NODE_FILE --data rows.parquet, for example")
    if of_plan := sorted(find_written() & REFUSED):
        raise UserError(f"{of_plan[0]} is the plan's, the same at every node: leave it out")
    start_quickly()

    from fedvlm_jax.deployment.plan import read_node_file

    given = read_node_file(file)
    place = (folder or Path(f"node-{given.number}")).absolute()
    path = (socket or place / SOCKET).absolute()

    from fedvlm_jax.deployment.worker import open_worker
    from fedvlm_jax.run_dir.folder_lock import Claim
    from fedvlm_jax.utils import progress_display

    with Claim(place), open_worker(path) as worker:  # before the model is loaded
        from fedvlm_jax.deployment.node import open_node

        show = progress_display.open_progress()
        again = f"To go on, give the command again, with --folder {place}"
        with advising(show.finish, lambda: again):
            opened = open_node(given, data, model, place, show)
            _describe(opened, path)

            def answer(order: Any) -> Any:
                began = time.perf_counter()
                reply = opened.answer(order)
                named = " ".join(str(reply.header[name]) for name in ("kind", "round") if name in reply.header)
                came, went = len(order.payload), len(reply.payload)
                show.note(f"{named:12} {came:,} bytes in, {went:,} out, {time.perf_counter() - began:.1f} s")
                return reply

            worker.serve(answer, show.note)


def _describe(opened: Any, path: Path) -> None:
    """Print what a newcomer needs."""
    from fedvlm_jax.deployment.flower.app_folder import PORT, describe_supernode
    from fedvlm_jax.utils.untrusted_text import clean

    plan, client = opened.file.plan, opened.experiment.examples.clients[0]
    traffic = opened.describe_traffic()
    sizes = (
        f"{len(client.train)} training, {len(client.validation)} validation, "
        f"{format_count(len(client.test), 'test example')}"
    )
    print(f"client  {opened.file.number} of {plan.clients}, {clean(opened.name)}: {sizes}")
    print(
        f"plan    {plan.run.method} on {plan.run.model}, {format_count(plan.run.train.rounds, 'round')}, "
        f"digest {plan.digest}"
    )
    print(f"wire    a round takes {traffic['down']:,} bytes in and {traffic['up']:,} out, beside scores and counts;")
    print(f"        the rest stays in {opened.folder}")
    print(f"beside  {describe_supernode(path, opened.file.number, opened.file.port or PORT)}")
    print("        for another machine's SuperLink see the deployment's README; Ctrl-C ends this", flush=True)
