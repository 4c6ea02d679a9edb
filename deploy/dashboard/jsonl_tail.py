"""What came to a JSONL file since the last look. Called by `rollouts.py`, `steps.py` and `deploy/status.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from protocol.rundir import LineTail


class JsonlTail:
    """Not for several threads."""

    def __init__(self, path: Path) -> None:
        self._lines = LineTail(path)

    def new(self) -> tuple[Iterator[dict[str, Any]], bool]:
        """(rows since the last call, whether the file is another one, so that what was read before is void).

        Rows are read as they are taken. A torn last line waits for its rest; other lines that are no JSON are left
        out."""
        lines, replaced = self._lines.new()
        return _rows(lines), replaced


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if isinstance(row, dict):
            yield row
