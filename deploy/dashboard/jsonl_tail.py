"""What came to a JSONL file since the last look. Called by `rollouts.py`, `steps.py` and `deploy/status.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protocol.rundir import LineTail


class JsonlTail:
    """Not for several threads."""

    def __init__(self, path: Path) -> None:
        self._lines = LineTail(path)

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """(rows since the last call, whether the file is another one, so that what was read before is void).

        A torn last line waits for its rest; other lines that are no JSON are left out."""
        lines, replaced = self._lines.new()
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # torn by a crash
        return [row for row in rows if isinstance(row, dict)], replaced
