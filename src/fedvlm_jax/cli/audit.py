"""`fedvlm audit RUN`: attacks on what left a run's clients."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge

from fedvlm_jax.cli._process.startup import start_quickly
from fedvlm_jax.utils.option_ranges import Count


def audit(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="The folder of a finished run.")],
    rounds: Count = 8,
    clients: Count = 32,
    candidates: Annotated[int, Ge(2)] = 128,
    others: Literal["test", "validation"] = "test",
    canaries: Annotated[int, Ge(8)] = 256,
) -> None:
    """Measure how much of the clients' rows a run's messages tell: membership, attribution, inputs, and epsilon.

    The run has to be made with --audit.keep. All attacks are lower bounds: what they do not find others may.

    Args:
        run: of `fedvlm train --audit.keep`.
        rounds: so many of the rounds that were kept, evenly spread.
        clients: so many clients, drawn by the run's seed.
        candidates: so many rows of a client that were trained on, at most, and so many that were not.
        others: the split of the rows that were not trained on; validation has chosen the round, test nothing.
        canaries: clients that are made up to bound the epsilon of a run with noise.
    """
    from fedvlm_jax.audit.audit_run import AuditChoices, open_kept

    open_kept(run)  # for its errors, before long work
    start_quickly()

    from fedvlm_jax.audit import audit_run
    from fedvlm_jax.reporting import audit_report, report, tables
    from fedvlm_jax.utils import progress_display

    show = progress_display.open_progress()
    try:
        found = audit_run.audit(run, AuditChoices(rounds, clients, candidates, others, canaries), show)
    finally:
        show.finish()
    page = report.write_report([run])
    console = tables.show_all(audit_report.tabulate_audit(found))
    for sentence in audit_report.describe_audit(found):
        console.say(sentence)
    console.say(f"report  {page}")
