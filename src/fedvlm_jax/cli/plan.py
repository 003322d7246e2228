"""`fedvlm plan`: what a round would take of devices that need not be there."""

from typing import Annotated

import tyro

from fedvlm_jax.analysis.plan_options import Request, check_request
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.folder_lock import open_folder


def plan(request: Annotated[Request, tyro.conf.arg(name="")] = Request()) -> None:  # noqa: B008  frozen
    """Compile a round for a TPU pod, or for CPU devices, that need not be there, and say what it would take."""
    check_request(request)
    validate(request.run)

    from fedvlm_jax.analysis.plan import plan_round
    from fedvlm_jax.reporting import plan_report, tables
    from fedvlm_jax.utils import progress_display

    show = progress_display.open_progress()
    with open_folder(request.out, "plan") as folder:
        try:
            planned = plan_round(request, show.note)
        finally:
            show.finish()
        plan_report.write_plan(folder, planned)
    console = tables.show_all(plan_report.tabulate_plan(planned))
    console.say(f"plan     {folder / 'plan.md'}\nnumbers  {folder / 'plan.json'}")
    if refusal := plan_report.describe_refusal(planned):
        if request.system.wave is not None:
            raise UserError(f"--wave {request.system.wave} {refusal}")
        console.say(refusal, style="yellow")
