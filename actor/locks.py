"""Locks on files, between the processes of a node: the kernel lets go of them when a process dies. Used by staging, and
by whoever clears away what it left behind."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

from protocol.errors import DeadlineExceeded

POLL_S = 0.01


class FileLock:
    """A lock on a file, held until `release` or the end of the process; several may share one."""

    def __init__(self, path: Path) -> None:
        """Opens the file, which is created if need be."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def try_to(self, share: bool) -> bool:
        """Take the lock, or change it to a shared or an exclusive one; False if somebody else is in the way."""
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def take(self, share: bool, what: str, timeout_s: float) -> None:
        """Wait for the lock. Raises DeadlineExceeded, naming `what` is waited for; then the file is let go of."""
        deadline = time.monotonic() + timeout_s
        try:
            while not self.try_to(share):
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"{what} ({self.path})", timeout_s)
                await asyncio.sleep(POLL_S)
        except BaseException:
            self.release()
            raise

    @property
    def is_current(self) -> bool:
        """Whether the file is still there under its name: else the lock is on something that nobody else finds."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def remove_unused(directory: Path, users: FileLock) -> bool:
    """Remove a directory unless somebody else holds `users`, the lock of those who use it; whether it is gone."""
    if not users.is_current or not users.try_to(share=False):
        return False
    gone = directory.with_name(f"{directory.name}-{secrets.token_hex(4)}")
    try:
        directory.rename(gone)  # at once: who joins now makes a new one, of which nothing is removed
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
