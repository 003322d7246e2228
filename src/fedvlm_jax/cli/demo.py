"""`fedvlm demo RUN`: a page on which the models of a finished run are asked."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.errors import format_count

PORT = 8765


def demo(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="The folder of a finished run.")],
    host: str = "127.0.0.1",
    port: Annotated[int, Ge(0), Le(65535)] = PORT,
    samples: Annotated[int, Ge(0), Le(24)] = 6,
) -> None:
    """Serve a local page: choose a client, drop a picture, ask, and see every model's answer.

    Args:
        run: of `fedvlm train`.
        host: to serve; of another than this machine's, whoever reaches it can ask, without a password.
        port: of the page; 0 for any that is free.
        samples: so many test pictures of each client are offered; 0 for none.
    """
    from fedvlm_jax.run_dir.reader import read_finished

    stored = read_finished(run)

    from fedvlm_jax.asking.demo_server import About, is_loopback, open_server

    with open_server(host, port) as server:  # before the model is loaded
        if not is_loopback(host):
            kept = " and sees test pictures (--samples 0 shows none)" if samples else ""
            print(
                f"fedvlm: whoever reaches {host} can ask this run's models{kept}; there is no password", file=sys.stderr
            )

        start_quickly()

        from fedvlm_jax.asking.asker import open_asker
        from fedvlm_jax.utils import progress_display
        from fedvlm_jax.utils.progress import NoProgress
        from fedvlm_jax.utils.untrusted_text import clean

        show = progress_display.open_progress()
        try:
            asker = open_asker(run, stored, show)
        finally:
            show.finish()
        server.models, server.samples = dataclasses.replace(asker, show=NoProgress()), samples
        record = asker.record
        subtitle = f"{record.method} on {stored.run.model}, {format_count(len(asker.clients), 'client')}"
        server.about = About(clean(record.folder.resolve().name), clean(subtitle), asker.list_notes())
        print(f"page    {server.url}\n        Ctrl-C ends it", flush=True)
        server.serve_forever()
