"""Runs `tandem` commands as a user would, in their own process, and tells what they left behind. Not a test itself."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from protocol.rundir import RunDir, read_json

TANDEM = [sys.executable, "-m", "deploy.cli"]


class Terminal:
    """Context manager: a pseudo-terminal whose screen is read by a thread."""

    def __init__(self, ignored: bool = False) -> None:
        """`ignored`: the command is told to go on without it, as by nohup."""
        self._ignored = ignored
        self._master, self.slave = pty.openpty()
        self.shown = ""
        self._open = True
        self._reader = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while self._open:
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 4096).decode(errors="replace")

    def take_control(self) -> None:
        """In the child: this is its controlling terminal, whose end it is told by SIGHUP, unless that is ignored."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN if self._ignored else signal.SIG_DFL)
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def hang_up(self) -> None:
        """Close the window: the kernel tells the session with SIGHUP."""
        self._open = False
        self._reader.join()  # a read in progress would keep it open
        os.close(self.slave)
        os.close(self._master)

    def __enter__(self) -> Terminal:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.hang_up()


class Command:
    """A running `tandem …`. As a context manager it is interrupted, then killed, if it has not ended by itself."""

    def __init__(self, arguments: list[str], log: Path, terminal: Terminal | None = None, **environment: str) -> None:
        """Output goes to `log`, or to a terminal, which is then the controlling one."""
        self.log = log
        self.processes: dict[int, psutil.Process] = {}
        """Every process seen below the command so far: they must all end with it."""
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*TANDEM, *arguments],
                stdin=terminal and terminal.slave,
                stdout=terminal.slave if terminal else output,
                stderr=subprocess.STDOUT,
                env=os.environ | ({"TERM": "xterm"} if terminal else {}) | environment,
                start_new_session=terminal is not None,
                preexec_fn=terminal and terminal.take_control,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for signum in (signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(signum)
                try:
                    self.process.wait(timeout=90)
                except subprocess.TimeoutExpired:
                    continue
        for process in self.left_running():
            process.kill()

    def look(self) -> None:
        """Remember the processes that exist now."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.processes.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass

    def named(self) -> list[tuple[psutil.Process, list[str]]]:
        """The processes of the command that run now, with their arguments."""
        self.look()
        found = []
        for process in self.processes.values():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                if arguments := process.cmdline():
                    found.append((process, arguments))
        return found

    def names(self) -> list[str]:
        """What the processes of the command call themselves now."""
        return [" ".join(arguments) for _, arguments in self.named()]

    def running(self, argument: str) -> list[psutil.Process]:
        """Those that run now with an argument."""
        return [process for process, arguments in self.named() if argument in arguments]

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """Wait for a condition; fails with the command's output if it ends first, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            self.look()
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:.0f} s:\n{self.output()}"
            time.sleep(0.1)
        return result

    def wait(self, timeout_s: float) -> int:
        """Exit code of the command."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline, f"still running after {timeout_s:.0f} s:\n{self.output()}"
            time.sleep(0.1)
        return self.process.returncode

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def left_running(self, patience_s: float = 10.0) -> list[psutil.Process]:
        """Processes of the command that live on after it."""
        _, alive = psutil.wait_procs(list(self.processes.values()), timeout=patience_s)
        return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def left_behind(run: RunDir, launcher_pid: int) -> list[Path]:
    """Staged weights and engines' files of the run, and temporary Ray directories of its launcher."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    staged = [path for place in places for path in place.glob(f"tandem-{run.label}-*")]
    rays = [
        directory
        for directory in Path(tempfile.gettempdir()).glob("tandem-ray-*")
        if (owner := directory / "owner.pid").is_file() and owner.read_text() == str(launcher_pid)
    ]
    return staged + rays


def open_to_the_network(pid: int) -> list[str]:
    """Listening sockets of a process and all below it that other machines could reach. There must be others."""
    sockets = []
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            name = process.name()
            sockets += [
                (name, ipaddress.ip_address(connection.laddr.ip), connection.laddr.port)
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert sockets, "a run listens somewhere"
    return [
        f"{name} listens on {address}, port {port}"
        for name, address, port in sockets
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback
    ]


def files_of(run: RunDir) -> dict[str, bytes]:
    """Path -> content of every file of a run, which may go on meanwhile: what goes away under the reader is missing."""
    texts = {}
    for directory, _, names in os.walk(run.path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                texts[f"{directory}/{name}"] = Path(directory, name).read_bytes()
    return texts


def secrets_shown(run: RunDir, pid: int = 0) -> list[str]:
    """Where a secret key of the run stands outside of the key files: files of the run, and arguments and environments
    of a process and all below it."""
    texts = files_of(run) | {str(log): log.read_bytes() for log in run.path.parent.parent.glob("*.log")}
    for path in (run.keys / "learner.json", run.actor_keys):
        texts.pop(str(path), None)
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if pid else []
    for process in processes:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                texts[f"{name} of {process.pid}"] = Path(f"/proc/{process.pid}/{name}").read_bytes()
    assert not pid or any(name.startswith("environ") for name in texts)
    secrets = [read_json(path)["secret"].encode() for path in (run.keys / "learner.json", run.actor_keys)]
    return [name for name, text in texts.items() for secret in secrets if secret in text]


def status(run: RunDir) -> dict[str, Any]:
    return read_json(run.status) or {}
