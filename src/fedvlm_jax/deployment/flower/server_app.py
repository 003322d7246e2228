"""The ServerApp: the coordinator of a plan, with Flower's Grid as its transport."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvlm_jax.deployment.flower.library import load_flower
from fedvlm_jax.errors import UserError, describe_os_error
from fedvlm_jax.utils.standard_streams import quieten_libraries
from fedvlm_jax.utils.untrusted_text import clean

PLAN = "plan.json"
"""The plan's file, beside the app's modules."""


def make_server_app(folder: Path) -> Any:
    """Make the ServerApp of a plan.

    Args:
        folder: with the plan.

    Raises:
        UserError: Flower is not installed.
    """
    app = load_flower("serverapp").ServerApp()

    @app.main()
    def run(grid: Any, context: Any) -> None:
        try:
            run_plan(folder, context.run_config, grid)
        except (UserError, OSError) as error:
            text = describe_os_error(error) if isinstance(error, OSError) else str(error)
            sys.stderr.write(f"fedvlm: {clean(text)}\n")  # which Flower shows beside its own traceback
            raise

    return app


def run_plan(folder: Path, config: Mapping[str, Any], grid: Any) -> Path:
    """Run all rounds of a plan, or those that are left; returns the run's folder.

    Args:
        folder: with the plan.
        config: of Flower's run: `out`, the run's folder, and `model` where it is not the plan's.
        grid: Flower's.

    Raises:
        UserError: the plan is damaged, its model or the folder cannot be used, or no node obeys.
    """
    out = config.get("out")
    if not isinstance(out, str) or not out:
        raise UserError("the app does not say where the run shall be: flwr run ... --run-config 'out=\"DIR\"'")

    quieten_libraries()

    from fedvlm_jax.deployment.coordinator import coordinate
    from fedvlm_jax.deployment.flower.transport import GridTransport
    from fedvlm_jax.deployment.plan import read_plan
    from fedvlm_jax.utils.compilation_cache import keep_programs
    from fedvlm_jax.utils.progress_display import open_progress

    keep_programs()
    plan = read_plan(folder / PLAN)
    show = open_progress()
    try:
        return coordinate(plan, str(config.get("model") or "") or None, GridTransport(grid), Path(out), show)
    finally:
        show.finish()
