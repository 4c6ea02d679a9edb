"""The Ray actor class: a shell around `ActorLoop`. The only file of this package that imports ray.

Ray reruns the constructor of a restarted actor and nothing else, and a constructor that raises is dead for good: so it
only starts the loop in a thread. When the loop fails, the process exits and Ray (`max_restarts=-1`) starts a new one;
when the learner has drained or refused it, the process waits idle for the launcher to remove it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

import ray

from actor.finding import DESK_PREFIX, NAMESPACE, Address, FindLearner, finder
from protocol.errors import DeadlineExceeded
from protocol.keys import ActorKeys, KeyPair
from protocol.rundir import OWNER_FILE

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 1.0
EXIT_CODE = 70
BEFORE_WORK = ("connecting", "starting engine")
"""Phases of the loop in which it holds no ticket and serves no weights."""


DESK_ANSWER_S = 10.0
FILES_DEADLINE_S = 120.0


def at_desk(desk: str) -> FindLearner:
    """A finder that asks the run's desk. Raises OSError while it has no learner's address, or does not answer."""

    def find() -> Address:
        found = ask_desk(desk, "address")
        if found is None:
            raise OSError(f"{desk} has no address of a learner yet")
        keys = found["keys"] and ActorKeys(found["keys"]["learner"], KeyPair(**found["keys"]["own"]))
        return Address(found["work"], keys)

    return find


def ask_desk(desk: str, question: str) -> Any:
    """One answer of the run's desk. Raises OSError if it does not answer."""
    try:
        handle = ray.get_actor(desk, namespace=NAMESPACE)
        return ray.get(getattr(handle, question).remote(), timeout=DESK_ANSWER_S)
    except (ValueError, ray.exceptions.RayError) as error:  # no actor of that name; it, or its node, is gone
        raise OSError(f"{desk} does not answer: {error}") from error


def fetch_model(desk: str) -> str:
    """Put the model's configuration and tokenizer into a temporary directory of this node; its path.

    Raises DeadlineExceeded if the desk never has them."""
    began = time.monotonic()
    while True:
        files = None
        with contextlib.suppress(OSError):
            files = ask_desk(desk, "files")
        if files is not None:
            break
        if time.monotonic() - began > FILES_DEADLINE_S:
            raise DeadlineExceeded(f"the model's files at {desk}", time.monotonic() - began)
        time.sleep(0.5)
    directory = Path(tempfile.mkdtemp(prefix="tandem-model-"))
    (directory / OWNER_FILE).write_text(str(os.getpid()))  # for `tandem doctor --clean`
    for name, content in files.items():
        (directory / Path(name).name).write_bytes(content)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return str(directory)


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
        if not Path(user_path).is_dir():  # on another machine: a Ray job's working directory is everywhere
            user_path = os.getcwd()
        options = {"lost_learner_s": lost_learner_s, "user_functions": user_functions, "user_path": user_path}
        self._thread = threading.Thread(target=self._run, args=(learner, name, options), name="actor-loop")
        self._thread.start()

    def _run(self, learner: str, name: str, options: dict[str, Any]) -> None:
        from actor.loop import ActorLoop, LearnerRefused

        try:
            if learner.startswith(DESK_PREFIX):
                find, options["model"] = at_desk(learner), fetch_model(learner)
            else:
                find = finder(learner)
            self._loop = ActorLoop(find, name, **options)
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
