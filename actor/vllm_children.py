"""The bond between an actor and vLLM's processes: they die with it, and they leave their errors where it reads them.

vLLM runs its scheduler and its workers in child processes and tells the parent of a failure only that there was one
("See root cause above"). So every child, when it loads vLLM's plugins, arms a death signal and writes the errors that
vLLM logs there, with their exceptions, to a file of the actor. Uses the standard library only; `vllm_engine.py` calls
it in the actor, `vllm_weights.register` in the children.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path

PARENT_VARIABLE = "TANDEM_ENGINE_PARENT"
"""Process id of the actor."""
ERRORS_VARIABLE = "TANDEM_ENGINE_ERRORS"
"""File for the children's errors, one JSON object a line."""

_PR_SET_PDEATHSIG = 1


def adopt() -> None:
    """In a child of an actor's vLLM: die with the parent, record errors. Elsewhere, and the second time: nothing."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or parent == str(os.getpid()):
        return
    die_with_parent()
    errors = os.environ.get(ERRORS_VARIABLE)
    logger = logging.getLogger("vllm")
    if errors and not any(isinstance(handler, ErrorRecorder) for handler in logger.handlers):
        logger.addHandler(ErrorRecorder(Path(errors)))


def die_with_parent() -> None:
    """Have the kernel kill this multiprocessing child when the thread that started it ends, however it ends.

    The engine core is started by a thread of the actor that lives as long as the engine, a worker by the engine
    core's main thread: so kill -9 of the actor ends them all.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before the signal was armed
        os._exit(1)


class ErrorRecorder(logging.Handler):
    """Appends every logged error to a file; several processes may share it (one write a line)."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        text = describe(error) if error else record.getMessage()
        entry = {"cause": error is not None or "died unexpectedly" in text, "text": text}
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError:  # the actor is gone and its file with it
            self.handleError(record)


def recorded_cause(path: Path, offset: int = 0) -> str | None:
    """The first exception or death (else the first error message) that a child recorded after `offset` bytes.

    The first is the cause: what follows are the processes that lost a partner.
    """
    try:
        lines = path.read_bytes()[offset:].splitlines()
    except FileNotFoundError:
        return None
    entries = [json.loads(line) for line in lines]
    causes = [entry["text"] for entry in entries if entry["cause"]]
    return next(iter(causes or [entry["text"] for entry in entries]), None)


def describe(error: BaseException) -> str:
    """`Type: message`; of a pydantic error its messages, without the dump of the whole input."""
    faults = getattr(error, "errors", None)
    if callable(faults):
        return "ValueError: " + "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in faults())
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
