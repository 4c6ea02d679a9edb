"""What came to a JSONL file since the last look. Called by `rollouts.py`, `steps.py` and `deploy/status.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from protocol.rundir import LineTail

_decoder = msgspec.json.Decoder()
"""Takes a fifth of the time of `json`: a long run has hundreds of megabytes of figures."""


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
            row = _decoder.decode(line)
        except (msgspec.MsgspecError, ValueError):
            continue  # torn by a crash
        if isinstance(row, dict):
            yield row
