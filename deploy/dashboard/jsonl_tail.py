"""What came to a JSONL file since the last look, also where the writer replaces the file. Called by `rollouts.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonlTail:
    """Not for several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = self._offset = 0

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """(rows since the last call, whether the file is another one, so that what was read before is void).

        A torn last line waits for its rest; other lines that are no JSON are left out."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                replaced = found.st_ino != self._inode or found.st_size < self._offset
                if replaced:
                    self._inode, self._offset = found.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return [], False
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = []
        for line in whole.splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # torn by a crash
        return [row for row in rows if isinstance(row, dict)], replaced
