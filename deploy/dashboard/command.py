"""`tandem dashboard`: picks the run and serves its page until it is interrupted. Called by `deploy/cli.py`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.dashboard.server import Dashboard, open_socket
from deploy.scale import running_runs
from protocol.addresses import is_loopback
from protocol.errors import RecipeError
from protocol.rundir import RunDir

LOOK_S = 1.0


def pick_run(name: str, runs: Path) -> RunDir:
    """The run of a name or path; without one the only running run under `runs`, or else the one that was written last.

    Raises RecipeError, naming what there is, if that is none or not one.
    """
    if name:
        for path in (runs / name, Path(name)):
            if (path / "recipe.toml").is_file() or (path / "metrics.jsonl").is_file():
                return RunDir(path.resolve())
        raise RecipeError(f"dashboard: no run {name!r} under {runs}, and {name!r} is no run directory")
    running = running_runs(runs)
    if len(running) > 1:
        names = ", ".join(run.path.name for run in running)
        raise RecipeError(f"dashboard: {len(running)} runs under {runs} are running, name one of them: {names}")
    found = running or [RunDir(path.parent.resolve()) for path in runs.glob("*/recipe.toml")]
    if not found:
        raise RecipeError(f"dashboard: no run under {runs}")
    return max(found, key=lambda run: run.path.stat().st_mtime)


def serve(run: RunDir, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM."""
    with Dashboard(run, open_socket(host, port)) as dashboard, _interrupted() as interrupted:
        say(f"{run.path.name}: {dashboard.address}")
        if not is_loopback(host):
            say("not only this machine can reach it, and nothing is encrypted: use it on a network that you trust")
        say("Ctrl-C ends it; the address is only for you: who has it sees the run's rollouts")
        while not interrupted() and dashboard.wait(LOOK_S):
            pass


@contextlib.contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM are only counted."""
    count = 0

    def note(_: int, __: object) -> None:
        nonlocal count
        count += 1

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: count > 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
