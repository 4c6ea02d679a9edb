"""The Ray actor class: a shell around `ActorLoop`. The only file of this package that imports ray.

Ray reruns the constructor of a restarted actor and nothing else, and a constructor that raises is dead for good: so it
only starts the loop in a thread. When the loop fails, the process exits and Ray (`max_restarts=-1`) starts a new one;
when the learner has drained or refused it, the process waits idle for the launcher to remove it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

import ray

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 1.0
EXIT_CODE = 70
BEFORE_WORK = ("connecting", "starting engine")
"""Phases of the loop in which it holds no ticket and serves no weights."""


class ActorState(TypedDict):
    """What an actor says of itself through Ray."""

    state: Literal["running", "left", "refused"]
    why: str
    phase: str
    working: bool
    pid: int


def redirect_output(path: str) -> None:
    """Send this process's output, and that of its children, to the run's log, if that directory exists here."""
    if path and Path(path).parent.is_dir():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)


def configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


class RolloutActor:
    """Runs one `ActorLoop` for the life of the process."""

    def __init__(
        self,
        learner: str,
        name: str,
        log_path: str,
        lost_learner_s: float,
        user_functions: tuple[str, ...] = (),
        user_path: str = "",
    ) -> None:
        self._state: Literal["running", "left", "refused"] = "running"
        self._why = ""
        self._loop: Any = None
        redirect_output(log_path)
        configure_logging()
        options = {"lost_learner_s": lost_learner_s, "user_functions": user_functions, "user_path": user_path}
        self._thread = threading.Thread(target=self._run, args=(learner, name, options), name="actor-loop")
        self._thread.start()

    def _run(self, learner: str, name: str, options: dict[str, Any]) -> None:
        from actor.loop import ActorLoop, LearnerRefused

        try:
            self._loop = ActorLoop(learner, name, **options)
            reason = asyncio.run(self._loop.run())
            log.info("%s ends: %s", name, reason)
            self._why, self._state = reason, "left"
        except LearnerRefused as error:
            log.error("%s ends: %s", name, error)
            self._why, self._state = str(error), "refused"
        except BaseException:
            log.exception("%s failed; Ray restarts it", name)
            time.sleep(RESTART_PAUSE_S)
            os._exit(EXIT_CODE)

    def state(self) -> ActorState:
        """What the loop does, and in which process. `working`: it has an engine, and so perhaps tickets."""
        phase = self._loop.phase if self._loop else "connecting"
        working = self._state == "running" and phase not in BEFORE_WORK
        return {"state": self._state, "why": self._why, "phase": phase, "working": working, "pid": os.getpid()}


RemoteRolloutActor = ray.remote(max_restarts=-1, max_task_retries=-1)(RolloutActor)
