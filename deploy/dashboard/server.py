"""Serves a run's page from a thread of this process: of `tandem dashboard`, or of the launcher beside its run."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import threading
import time
from types import TracebackType

import uvicorn

from deploy.dashboard.access import Access
from deploy.dashboard.app import make_app
from deploy.dashboard.rollouts import RolloutReader
from protocol.addresses import LOOPBACK
from protocol.errors import DeadlineExceeded, RecipeError
from protocol.rundir import RunDir

PORT = 7704
"""The first one after the wire's (`deploy/ports.py`)."""
START_S = 20.0
STOP_S = 5.0
MOST_CONNECTIONS = 64
NICER = 5
"""The page's thread gives way to the launcher's, and on a shared machine to the run's two sides."""


def open_socket(host: str = LOOPBACK, port: int | None = None) -> socket.socket:
    """A listening socket; without a port the usual one, or any free one where that is taken.

    Raises RecipeError for a port in use, and for a host that is not one address of this machine.
    """
    try:
        address = ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or address.is_unspecified:
        raise RecipeError(
            f"--host: found {host!r}, allowed: localhost, or the numeric address of one interface of this machine"
        )
    for wanted in (PORT, 0) if port is None else (port,):
        try:
            return _bound(str(address), wanted, address.version == 6)
        except OSError as error:
            if wanted == PORT and port is None and error.errno == errno.EADDRINUSE:
                continue
            raise RecipeError(
                f"dashboard: cannot listen on {host}, port {wanted}: {os.strerror(error.errno or 0)}"
            ) from None
    raise AssertionError("port 0 is never in use")


def _bound(address: str, port: int, v6: bool) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address, port))
        found.listen(MOST_CONNECTIONS)
    except BaseException:
        found.close()
        raise
    return found


class Dashboard:
    """Context manager: within, the page of a run is served."""

    def __init__(self, run: RunDir, listening: socket.socket) -> None:
        """Takes over the socket of `open_socket`."""
        self._socket = listening
        host, self.port = listening.getsockname()[:2]
        self.access = Access(host)
        self._where = f"[{host}]" if ":" in host else host
        app = make_app(run, self.access, RolloutReader(run))
        self._server = uvicorn.Server(uvicorn.Config(
            app, lifespan="off", ws="none", http="h11", loop="asyncio", log_config=None, access_log=False,
            log_level=logging.WARNING, server_header=False, limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=2,
        ))  # fmt: skip
        self._thread = threading.Thread(target=self._serve, name="dashboard", daemon=True)

    @property
    def address(self) -> str:
        """For people, once: whoever has it sees the run's rollouts and may scale it."""
        return f"http://{self._where}:{self.port}/#token={self.access.token}"

    def _serve(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICER)
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> Dashboard:
        self._thread.start()
        began = time.monotonic()
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() - began > START_S:
                raise DeadlineExceeded("the dashboard's server to start", time.monotonic() - began)
            time.sleep(0.01)
        return self

    def wait(self, timeout_s: float) -> bool:
        """Whether the server is still there after so long."""
        self._thread.join(timeout_s)
        return self._thread.is_alive()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(STOP_S)
        self._socket.close()
