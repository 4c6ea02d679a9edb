"""Follows the learner's versions: hears of one, stages it beside the engine, checks it, swaps it in. Used by `loop.py`.

Until the swap begins any failure keeps the old version in service and is tried again; one inside it condemns the
engine. Knows the link, the staging directory and the engine, but no tickets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from actor.engine import Engine
from actor.gate import EngineGate
from actor.staging import Staging
from protocol.errors import DeadlineExceeded, EngineFailed, WeightsError
from protocol.messages import Welcome
from protocol.sockets import Link

log = logging.getLogger(__name__)

RETRY_S = 1.0
LOAD_TIMEOUT_S = 300.0
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
        self.fetch_s = self.pause_s = 0.0
        self.newest = 0
        self._welcome, self._enter, self._confirm = welcome, enter, confirm
        self._newer = asyncio.Event()
        self._changed = asyncio.Condition()

    def heard_of(self, version: int) -> None:
        """News, or the answer to a heartbeat, name a version."""
        if version > self.newest:
            self.newest = version
            self._newer.set()

    async def listen(self) -> None:
        """Take in news for ever."""
        while True:
            self.heard_of((await self.link.news()).version)

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
        manifest = await self.link.fetch_manifest()
        if manifest.version < self.newest:
            raise WeightsError(f"version {self.newest} was announced, {manifest.version} can be had")
        if manifest.version <= self.engine.version:
            return
        if self.engine.version == 0:
            self._enter("loading weights")
        staged = await self.staging.fetch(self.link, manifest, self._welcome())
        with self.gate.swapping():
            try:
                async with asyncio.timeout(LOAD_TIMEOUT_S):
                    self.pause_s = await self.engine.load(manifest, staged.path)
            except TimeoutError:
                raise EngineFailed(
                    f"loading version {manifest.version} took more than {LOAD_TIMEOUT_S:.0f} s"
                ) from None
        self.staging.keep_only(staged)
        self.fetch_s = staged.seconds
        self.swaps += 1
        self._enter("serving")
        log.info("serves version %d: staged in %.2f s, paused %.2f s", manifest.version, staged.seconds, self.pause_s)
        async with self._changed:
            self._changed.notify_all()
        await self._confirm()
