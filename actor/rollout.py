"""One ticket becomes one group: prompt -> completions -> scores. Knows no socket; `loop.py` calls it.

`rollout` is the function to replace for multi-turn work: whatever it does, it returns a group, and the wire stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Protocol

import numpy as np

from actor.engine import Engine, Generated
from protocol.messages import Completion, Group, Ticket


class Gate(Protocol):
    """Admits requests to the engine: at most as many as it runs at once, none while weights are swapped."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *exception: object) -> None: ...


class Grader(Protocol):
    async def grade_group(
        self, grader: str, responses: list[str], answer: str
    ) -> list[tuple[dict[str, float], str]]: ...


def completion_seed(seed: int, index: int) -> int:
    """Seed of the i-th completion of a ticket: 31 bits of a hash, so that neighbours have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest(), "big") >> 1


async def rollout(
    engine: Engine, grader: Grader, gate: Gate, ticket: Ticket, actor: str, share_cache: bool = False
) -> Group:
    """Draw and grade the completions of a ticket. Cancelling it aborts its requests.

    `share_cache`: prefixes may come from keys and values that an older version has computed.

    Raises EngineFailed if the engine is lost, anything else if this ticket alone could not be done.
    """
    began = time.monotonic()

    async def draw(index: int) -> Generated:
        async with gate:
            return await engine.generate(
                request_id=f"{ticket.id}-{ticket.attempt}-{index}",
                prompt_ids=ticket.prompt_ids,
                sampling=ticket.sampling,
                seed=completion_seed(ticket.seed, index),
                cache_salt="" if share_cache else str(engine.version),
            )

    async with asyncio.TaskGroup() as tasks:
        draws = [tasks.create_task(draw(index)) for index in range(ticket.group_size)]
    drawn = [task.result() for task in draws]
    generated_at = time.monotonic()
    graded = await grader.grade_group(ticket.grader, [one.text for one in drawn], ticket.answer)
    token_ids = np.concatenate([np.asarray(one.token_ids, dtype="<i4") for one in drawn])
    logprobs = np.concatenate([np.asarray(one.logprobs, dtype="<f4") for one in drawn])
    return Group(
        id=ticket.id,
        kind=ticket.kind,
        attempt=ticket.attempt,
        actor=actor,
        prompt_ids=ticket.prompt_ids,
        temperature=ticket.sampling.temperature,
        completions=tuple(
            Completion(len(one.token_ids), one.spans, one.finish_reason, scores, one.text, error)
            for one, (scores, error) in zip(drawn, graded, strict=True)
        ),
        generate_s=generated_at - began,
        grade_s=time.monotonic() - generated_at,
        token_ids=token_ids.tobytes(),
        logprobs=logprobs.tobytes(),
        mask=np.ones(len(token_ids), dtype=np.uint8).tobytes(),
    )
