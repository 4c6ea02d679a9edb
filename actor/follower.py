"""Follows the learner's versions: hears of one, stages it beside the engine, checks it, swaps it in. Used by `loop.py`.

Until the swap begins any failure keeps the old version in service and is tried again; one inside it condemns the
engine. Knows the link, the staging directory and the engine, but no tickets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable

from actor.engine import Engine
from actor.gate import EngineGate
from actor.probing import answer
from actor.staging import Staged, Staging
from protocol.errors import DeadlineExceeded, EngineFailed, WeightsError
from protocol.link import Link
from protocol.messages import Probe, Probed, Update, Welcome

log = logging.getLogger(__name__)

RETRY_S = 1.0
LOAD_TIMEOUT_S = 300.0
PROBE_S = 10.0
"""Longest that a new version waits for a probe of the one before it."""
GIVE_UP_S = 300.0
"""Longest time without success while there is a newer version; then the actor ends and is started anew."""


class WeightFollower:
    """The weights' side of one actor."""

    def __init__(
        self,
        engine: Engine,
        link: Link,
        staging: Staging,
        gate: EngineGate,
        welcome: Callable[[], Welcome],
        enter: Callable[[str], None],
        confirm: Callable[[], Awaitable[None]],
    ) -> None:
        """`welcome()`: the latest one; `enter(phase)` says what goes on; `confirm()` tells the learner of a version."""
        self.engine, self.link, self.staging, self.gate = engine, link, staging, gate
        self.swaps = 0
        self.fetch_s = self.pause_s = self.paused_s = 0.0
        """Of the last swap: fetch, check and staging; the pause of generation. `paused_s`: all pauses so far."""
        self._serves_since = math.inf
        self.newest = 0
        self._news: Update | None = None
        self._welcome, self._enter, self._confirm = welcome, enter, confirm
        self._newer = asyncio.Event()
        self._probing = asyncio.Lock()
        self._changed = asyncio.Condition()

    @property
    def serving_s(self) -> float:
        """Seconds since the first version was in service, whether there was a learner meanwhile or not."""
        return max(0.0, time.monotonic() - self._serves_since)

    def heard_of(self, version: int) -> None:
        """News, or the answer to a heartbeat, name a version."""
        if version > self.newest:
            self.newest = version
            self._newer.set()

    async def listen(self) -> None:
        """Take in news for ever."""
        while True:
            self._news = await self.link.news()
            self.heard_of(self._news.manifest.version)

    async def wait_for(self, version: int) -> None:
        """Wait until the engine serves `version` or a later one: for the learner's weights; freed by `follow`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.engine.version >= version)

    async def follow(self) -> None:
        """Swap in the newest version whenever there is one. Raises EngineFailed (condemned), DeadlineExceeded."""
        failing_since = 0.0
        while True:
            await self._newer.wait()  # set by `heard_of`
            self._newer.clear()
            try:
                await self._update()
                failing_since = 0.0
            except (WeightsError, DeadlineExceeded, OSError) as error:
                log.warning("version %d stays in service: %s", self.engine.version, error)
                self._enter(f"cannot stage version {self.newest}: {error}"[:300])
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > GIVE_UP_S:
                    raise DeadlineExceeded(f"version {self.newest} to be staged ({error})", GIVE_UP_S) from error
                await asyncio.sleep(RETRY_S)
                self._newer.set()

    async def _update(self) -> None:
        if self.engine.version == 0:
            self._enter("loading weights")
        news, self._news = self._news, None
        staged = await self.staging.bring(self.link, self._welcome(), news, self.newest, self.engine.version)
        if staged is None:
            return
        manifest = staged.manifest
        try:
            await self._let_probe_end()
            with self.gate.swapping():
                self.pause_s = await self._load(staged)
        finally:
            staged.release()
        self.fetch_s = sum(staged.seconds.values())
        self.swaps += 1
        self._serves_since = min(self._serves_since, time.monotonic())
        self.paused_s += self.pause_s
        self._enter("serving")
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in staged.seconds.items())
        log.info("serves version %d: %s, %s; paused %.2f s", manifest.version, staged.form, stages, self.pause_s)
        async with self._changed:
            self._changed.notify_all()
        await self._confirm()

    async def answer(self, probe: Probe) -> Probed | None:
        """What the engine computes with the version in service; no other one is swapped in meanwhile. None if it is
        not the one that is asked for."""
        async with self._probing:
            return await answer(self.engine, self.gate, probe) if probe.version == self.engine.version else None

    async def _let_probe_end(self) -> None:
        """Wait for a probe that is under way; one that takes too long gets tokens of two versions, and no answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_S), self._probing:
                pass

    async def _load(self, staged: Staged) -> float:
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                return await self.engine.load(staged.manifest, staged.path)
        except TimeoutError:
            raise EngineFailed(
                f"loading version {staged.manifest.version} took more than {LOAD_TIMEOUT_S:.0f} s"
            ) from None
