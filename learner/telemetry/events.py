"""events.jsonl: what happened once, for people who look later. Learner and launcher append whole lines.

In the learner every log record of its packages from WARNING on is an event, and those below that carry a kind:
`log.info("…", extra={"event": "checkpoint"})`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

PACKAGES = ("learner", "protocol")
MAX_CHARACTERS = 500
TAIL_BYTES = 64 << 10


def note_event(path: Path, kind: str, text: str) -> None:
    """Append one line, whole: several processes write. A full disk loses the event, not the run."""
    row = json.dumps({"t": time.time(), "kind": kind, "text": text[:MAX_CHARACTERS]}) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, row.encode())
        finally:
            os.close(descriptor)
    except OSError:
        pass


def read_events(path: Path, last: int = 0) -> list[dict[str, Any]]:
    """Events, oldest first; with `last` only so many of the newest, out of the end of the file, however long it is.

    What is no event (torn by a crash) is left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - TAIL_BYTES) if last else 0
            file.seek(begin)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    whole = lines[1 if begin else 0 : -1]
    return [event for line in whole[-last:] if (event := _event(line)) is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return {"t": float(row["t"]), "kind": str(row["kind"]), "text": str(row["text"])}
    except (ValueError, KeyError, TypeError):
        return None


class EventLog(logging.Handler):
    """Context manager: while it is open, the learner's log feeds events.jsonl."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        kind = getattr(record, "event", "")
        if kind or record.levelno >= logging.WARNING:
            note_event(self.path, kind or record.levelname.lower(), record.getMessage())

    def __enter__(self) -> EventLog:
        for package in PACKAGES:
            logging.getLogger(package).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(self)
