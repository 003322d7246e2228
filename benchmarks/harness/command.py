"""Which command made a file of numbers."""

import shlex
import sys
from pathlib import Path


def name_command() -> str:
    """Return the command that started this script, options included, as it is given in the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
