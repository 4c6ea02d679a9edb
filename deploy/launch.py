"""Starts a run on machines: the learner as a child process, rollout actors through Ray; ends all of it again.

Ray alone restarts actors, the launcher alone restarts the learner. What concerns Ray is in `deploy/ray_cluster.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actor.staging import engine_prefix, safe_name
from deploy.crew import Crew
from deploy.progress import RecordedView, View
from deploy.site import Site
from protocol.errors import DeadlineExceeded
from protocol.keys import make_keys
from protocol.rundir import RunDir, read_json

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.25
LEARNER_START_S = 300.0
STOP_S = 300.0
"""Longest a learner may take from the request to stop to its end: a step and a checkpoint lie between."""
MAX_LEARNER_RESTARTS = 3
STOPPED = 3
NO_RESTART = (0, 2, STOPPED, 4, 5)
"""Exit codes of the learner that a restart cannot mend; see `learner/outcome.py`."""


@dataclass
class Interrupts:
    """Ctrl-C once: stop after the step. Twice: at once. A closed terminal counts as Ctrl-C."""

    count: int = 0
    terminals: tuple[int, ...] = ()
    """Which of stdout and stderr are a terminal; asked at the start, since a closed one no longer says so."""

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        self.terminals = tuple(stream for stream in (1, 2) if os.isatty(stream))
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.arm()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def arm(self) -> None:
        """Take the signals; again after Ray has started, which puts a handler of its own on SIGTERM."""
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup means to go on
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: object) -> None:
        if signum != signal.SIGHUP:
            self.count += 1
            return
        self.count = max(self.count, 1)
        self._leave(self.terminals)

    def leave_closed_terminals(self) -> None:
        """For a run that ignores SIGHUP, or is not told: it goes on, and no print fails."""
        self._leave(tuple(stream for stream in self.terminals if not os.isatty(stream)))

    def _leave(self, streams: tuple[int, ...]) -> None:
        """Nobody sees what is printed there from here on, and printing would fail."""
        self.terminals = tuple(stream for stream in self.terminals if stream not in streams)
        for stream in streams:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream)


def launch(site: Site, run: RunDir, model: Path, view: View) -> int:
    """Run to the end, or until interrupted. Returns the learner's exit code; everything started here has ended then."""
    interrupts = Interrupts()
    view = RecordedView(view, run.events)
    draws = site.recipe.needs_actors
    with interrupts.caught(), contextlib.ExitStack() as stack:
        run.status.unlink(missing_ok=True)
        if draws:
            make_keys(run.keys)
        stack.callback(remove_left_over, run)
        crew = stack.enter_context(Crew(site, run, model, view, interrupts.arm)) if draws else None
        learner = stack.enter_context(LearnerProcess(run, model, site))
        if crew and site.recipe.actor.count:
            crew.open()  # while the learner loads the model
        if crew:
            _wait_for_endpoint(run, learner, view, interrupts)
        return _watch(run, learner, crew, view, interrupts)


def _wait_for_endpoint(run: RunDir, learner: LearnerProcess, view: View, interrupts: Interrupts) -> None:
    began = time.monotonic()
    while not run.endpoint.exists() and learner.poll() is None and not interrupts.count:
        interrupts.leave_closed_terminals()
        if time.monotonic() - began > LEARNER_START_S:
            raise DeadlineExceeded("the learner to open its sockets", time.monotonic() - began)
        view.update(read_json(run.status) or {})
        time.sleep(POLL_S)


def _watch(run: RunDir, learner: LearnerProcess, crew: Crew | None, view: View, interrupts: Interrupts) -> int:
    """Show the learner's state until it ends; restart it when it was killed, pass interrupts on, keep actors right."""
    stopping_since = 0.0
    while True:
        code = learner.poll()
        interrupts.leave_closed_terminals()
        status = read_json(run.status) or {}
        if crew and not interrupts.count and code not in NO_RESTART:  # actors also wait for a restarted learner
            crew.tick(status)
        view.update(status | (crew.figures() if crew else {}))
        if code is not None:
            if interrupts.count and code not in NO_RESTART:
                return STOPPED  # it was told to go, however it went
            if code in NO_RESTART or not learner.may_restart():
                return code
            view.note(f"the learner ended with {code}; restarting it from its last checkpoint")
            learner.start()
        if interrupts.count and not stopping_since:
            stopping_since = time.monotonic()
            learner.signal(signal.SIGTERM)
            view.note("stopping after the step in hand, with a checkpoint (Ctrl-C again: at once)")
        if interrupts.count > 1 or (stopping_since and time.monotonic() - stopping_since > STOP_S):
            view.note("stopping at once")
            learner.kill()
        time.sleep(POLL_S)


class LearnerProcess:
    """The learner as a child in a session of its own, so that Ctrl-C reaches only the launcher."""

    def __init__(self, run: RunDir, model: Path, site: Site) -> None:
        self.run, self.model, self.site = run, model, site
        # On a CPU the learner shares its cores with engines: threads that wait asleep leave them the core.
        shares = (
            {"CUDA_VISIBLE_DEVICES": ",".join(site.learner_gpus)}
            if site.learner_gpus
            else {"OMP_WAIT_POLICY": "PASSIVE"}
        )
        self.environment = os.environ | shares
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LearnerProcess:
        self.start()
        return self

    def start(self) -> None:
        command = [sys.executable, "-m", "learner", "--run", str(self.run.path), "--model", str(self.model)]
        command += ["--host", self.site.learner_host] if self.site.learner_host else []
        with open(self.run.logs / "learner.log", "ab") as output:
            self._process = subprocess.Popen(
                [*command, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def poll(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def may_restart(self) -> bool:
        """Whether another start makes sense: there is a checkpoint, and few restarts so far."""
        self.restarts += 1
        return self.restarts <= MAX_LEARNER_RESTARTS and bool(self.run.checkpoint_steps())

    def signal(self, signum: int) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process.wait(timeout=20)


def remove_left_over(run: RunDir) -> None:
    """Remove what killed actors of this run left: staged weights, in shared memory or not, and engines' error files."""
    for place in ("/dev/shm", tempfile.gettempdir()):
        names = (f"tandem-{safe_name(run.label)}-*", f"{engine_prefix(run.label)}*")
        for directory in {found for name in names for found in Path(place).glob(name)}:
            shutil.rmtree(directory, ignore_errors=True)
