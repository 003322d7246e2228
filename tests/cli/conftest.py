"""The made-up folders are those of the tests of `runs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "runs"))
