"""Starts the learner's other processes, one for each of its GPUs, or finds out that torchrun has.

`python -m learner` of a recipe with `learner.processes` = K is rank 0, and starts ranks 1 to K - 1 as its children;
so its signals and its exit code are those of the learner, however many processes it has. They meet in a file of the
run's directory: nothing listens beyond loopback, as torchrun's rendezvous would. Called by `__main__.py`, before torch
is loaded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import RecipeError

PR_SET_PDEATHSIG = 1
END_S, END_AFTER_ERROR_S = 20.0, 3.0
"""Longest that the other ranks may take to end when rank 0 ends; then they are killed."""
LOST_S = 2.0
"""Longest wait for the exit code of a process whose connection has just broken."""


class RankLost(RuntimeError):
    """Another process of the learner has ended, or has not answered in time: this one cannot go on."""


def _nobody() -> str:
    return ""


@dataclass(frozen=True)
class Place:
    """A process's place among the learner's."""

    rank: int = 0
    size: int = 1
    store: Path | None = None
    """The file that the processes meet in; None under torchrun, whose environment says where."""
    ended: Callable[[], str] = _nobody
    """Says in words which other rank's process has ended, as far as this one can know; "" if none has."""


def under_torchrun() -> Place | None:
    """The place that torchrun's environment gives. Raises RecipeError for several machines."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if size != local:
        raise RecipeError(f"torchrun: found {size} processes of which {local} are here, allowed: one machine")
    return Place(int(os.environ["RANK"]), size)


@contextmanager
def started(size: int, command: list[str], store: Path) -> Iterator[Place]:
    """Ranks 1 to `size` - 1, each `command` with options of its own; they have ended when the context is left.

    They meet in the file `store`, which is made anew: nobody else may use it."""
    if size == 1:
        yield Place()
        return
    store.unlink(missing_ok=True)  # a killed learner has left it
    others: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, size):
            options = ["--rank", str(rank), "--size", str(size), "--store", str(store), "--parent", str(os.getpid())]
            # A process group of its own: Ctrl-C is rank 0's to hear.
            others.append(subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, process_group=0))
        yield Place(0, size, store, lambda: _ended(others))
    except BaseException:
        _end(others, END_AFTER_ERROR_S)
        raise
    finally:
        _end(others, END_S)
        store.unlink(missing_ok=True)


def _ended(others: list[subprocess.Popen[bytes]]) -> str:
    codes = {rank: process.poll() for rank, process in enumerate(others, start=1)}
    return ", ".join(f"rank {rank} has ended with {code}" for rank, code in codes.items() if code is not None)


def _end(others: list[subprocess.Popen[bytes]], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    for process in others:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def die_with_parent(parent: int, signum: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send a signal when the parent process dies, so that nothing is left running."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        raise SystemExit("the parent process is gone")
