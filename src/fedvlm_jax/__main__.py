"""The `fedvlm` command, also as `python -m fedvlm_jax`."""

import sys

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

COMPUTING = ("plan", "train", "compare", "evaluate", "audit", "node")
"""Commands that compile or compute; the others, and a command's help, gain nothing by settings of malloc."""

HELP = {"-h", "--help", "--help-all"}


def main() -> None:
    """Run the command line. A process that will compute starts again first, before it imports what takes long."""
    if sys.argv[1:2] and sys.argv[1] in COMPUTING and HELP.isdisjoint(sys.argv):
        restart_with_kept_memory()

    from fedvlm_jax.cli._process.signals import ending_at_once

    with ending_at_once():
        from fedvlm_jax.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
