"""Tables and pictures of `methods_emoji.py`."""
import json
from pathlib import Path
from typing import Any
Json = dict[str, Any]
def read_all(folder: Path) -> list[Json]:
    """Every line of every part; a last one that a kill cut short is left out."""
    lines = []
    for path in sorted(folder.glob("lines-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines
