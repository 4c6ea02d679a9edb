"""`tandem dashboard`: serves a run's page until it is interrupted. Called by `deploy/cli.py`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from deploy.dashboard.server import Dashboard, open_socket
from protocol.addresses import is_loopback
from protocol.rundir import RunDir

LOOK_S = 1.0


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
