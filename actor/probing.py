"""Answers the learner's probes: what the engine computes with the weights that it serves. Called by `follower.py`."""

from __future__ import annotations

import asyncio

import numpy as np

from actor.engine import Engine, Generated
from actor.gate import EngineGate
from protocol.messages import Probe, Probed, Sampling


async def answer(engine: Engine, gate: EngineGate, probe: Probe) -> Probed | None:
    """Draw the probe's completions; None if any token is of another version than the one asked for."""
    sampling = Sampling(max_tokens=probe.max_tokens)
    salt = f"probe-{probe.version}"

    async def draw(index: int, prompt: tuple[int, ...]) -> Generated:
        async with gate:
            return await engine.generate(f"{salt}-{index}-{probe.seed}", prompt, sampling, probe.seed + index, salt)

    drawn = await asyncio.gather(*(draw(index, prompt) for index, prompt in enumerate(probe.prompts)))
    checksum = await engine.checksum()
    if {version for one in drawn for version, _ in one.spans} != {probe.version} or engine.version != probe.version:
        return None
    return Probed(
        version=probe.version,
        num_tokens=tuple(len(one.token_ids) for one in drawn),
        checksum=checksum,
        token_ids=np.concatenate([np.asarray(one.token_ids, "<i4") for one in drawn]).tobytes(),
        logprobs=np.concatenate([np.asarray(one.logprobs, "<f4") for one in drawn]).tobytes(),
    )
