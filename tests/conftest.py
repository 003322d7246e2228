"""What all tests share: helpers beside this file can be imported, and float32 means float32."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
