"""The door to the engine: bounds what runs inside, keeps requests out while weights are swapped. Used by `loop.py`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator


class EngineGate:
    """At most `max_running` requests inside the engine, and none submitted while weights are swapped."""

    def __init__(self, max_running: int) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._open = asyncio.Event()
        self._open.set()
        self.running = 0
        self._busy_s = self._busy_since = 0.0

    async def __aenter__(self) -> None:
        await self._slots.acquire()
        try:
            while not self._open.is_set():  # waits for a swap, which ends in `swapping`
                await self._open.wait()
        except BaseException:
            self._slots.release()
            raise
        if self.running == 0:
            self._busy_since = time.monotonic()
        self.running += 1

    async def __aexit__(self, *exception: object) -> None:
        self.running -= 1
        if self.running == 0:
            self._busy_s += time.monotonic() - self._busy_since
        self._slots.release()

    @property
    def busy_s(self) -> float:
        """Seconds with at least one request in the engine."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.running else 0.0)

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()
