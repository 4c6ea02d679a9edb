"""Tells the learner now and then what the engine says of itself, for people. The run needs none of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from actor.engine import Engine
from protocol.engine_text import pack
from protocol.link import Link
from protocol.messages import EngineMetrics

log = logging.getLogger(__name__)

UNASKED_S = 5.0
"""How often is looked whether the learner, which may be another one by now, wants to be told."""


async def tell(engine: Engine, link: Link, every_s: Callable[[], float]) -> None:
    """Until cancelled: send the engine's metrics every so many seconds; 0: not now. What fails is said once."""
    said = False
    while True:
        period = every_s()
        await asyncio.sleep(period or UNASKED_S)
        if not period:
            continue
        try:
            text = await asyncio.to_thread(engine.metrics)
            if text:
                await link.send(EngineMetrics(pack(text)))
        except Exception as error:  # an engine that runs is worth more than its figures
            if not said:
                log.warning("the engine's own metrics cannot be told: %s: %s", type(error).__name__, error)
            said = True
