"""The door to the engine: bounds what runs inside and measures it, keeps requests out while weights are swapped.

Used by `loop.py`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator


class EngineGate:
    """At most `max_running` requests inside the engine, and none submitted while weights are swapped."""

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self._slots = asyncio.Semaphore(max_running)
        self._open = asyncio.Event()
        self._open.set()
        self.running = 0
        self._busy_s = self._running_s = 0.0
        self._changed_at = time.monotonic()

    async def __aenter__(self) -> None:
        await self._slots.acquire()
        try:
            while not self._open.is_set():  # waits for a swap, which ends in `swapping`
                await self._open.wait()
        except BaseException:
            self._slots.release()
            raise
        self._count()
        self.running += 1

    async def __aexit__(self, *exception: object) -> None:
        self._count()
        self.running -= 1
        self._slots.release()

    def _count(self) -> None:
        """Add up the time since the number of requests changed last."""
        now = time.monotonic()
        passed, self._changed_at = now - self._changed_at, now
        self._busy_s += passed if self.running else 0.0
        self._running_s += passed * self.running

    @property
    def busy_s(self) -> float:
        """Seconds with at least one request in the engine."""
        self._count()
        return self._busy_s

    @property
    def running_s(self) -> float:
        """Requests in the engine, summed over time: completion-seconds."""
        self._count()
        return self._running_s

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()
