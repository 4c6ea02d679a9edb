"""One ticket becomes one group: order, seeds, buffers, and what a fault or a cancellation does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor.engine import Generated
from actor.rollout import completion_seed, rollout
from protocol.errors import EngineFailed
from protocol.messages import Manifest, Sampling, Ticket, TicketId, Welcome

TICKET = Ticket(
    id=TicketId(0, 5), kind="train", attempt=2, prompt_ids=(3, 4), answer="7", grader="integer", group_size=4,
    sampling=Sampling(max_tokens=9, temperature=0.7), seed=11, min_version=1,
)  # fmt: skip


class ScriptedEngine:
    """Completion i has i tokens, all of them i; the last one is the first to be ready."""

    version = 3

    def __init__(self, fault: BaseException | None = None, hang: bool = False) -> None:
        self.requests: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.fault, self.hang = fault, hang
        self.all_started = asyncio.Event()

    async def generate(self, **request: Any) -> Generated:
        self.requests.append(request)
        index = int(request["request_id"].rpartition("-")[2])
        if len(self.requests) == TICKET.group_size:
            self.all_started.set()
        try:
            await self.all_started.wait()
            if self.fault and index == 2:
                raise self.fault
            for _ in range(TICKET.group_size - index):
                await asyncio.sleep(0)
            if self.hang or self.fault:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(request["request_id"])
            raise
        return Generated([index] * index, [-index / 2] * index, ((3, 0),) if index else (), "stop", f"text {index}")

    async def start(self, welcome: Welcome) -> None: ...
    async def load(self, manifest: Manifest, staged: Path) -> float: ...  # type: ignore[empty-body]
    async def stop(self) -> None: ...


class LengthGrader:
    async def grade_group(self, grader: str, responses: list[str], answer: str) -> list[tuple[dict[str, float], str]]:
        assert (grader, answer) == ("integer", "7")
        return [({"reward": float(text[-1])}, "slow" if text == "text 1" else "") for text in responses]


class OpenGate:
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *exception: object) -> None: ...


async def test_group_keeps_the_order_of_completions_whoever_is_ready_first() -> None:
    group = await rollout(ScriptedEngine(), LengthGrader(), OpenGate(), TICKET, "actor-3")
    assert (group.id, group.kind, group.attempt, group.actor) == (TICKET.id, "train", 2, "actor-3")
    assert (group.prompt_ids, group.temperature) == ((3, 4), 0.7)
    assert [completion.num_tokens for completion in group.completions] == [0, 1, 2, 3]
    assert [completion.text for completion in group.completions] == ["text 0", "text 1", "text 2", "text 3"]
    assert group.rewards == (0.0, 1.0, 2.0, 3.0)
    assert [completion.grader_error for completion in group.completions] == ["", "slow", "", ""]
    assert np.frombuffer(group.token_ids, "<i4").tolist() == [1, 2, 2, 3, 3, 3]
    assert np.frombuffer(group.logprobs, "<f4").tolist() == [-0.5, -1.0, -1.0, -1.5, -1.5, -1.5]
    assert group.mask == b"\1" * 6


async def test_each_completion_has_its_own_request_and_seed() -> None:
    engine = ScriptedEngine()
    await rollout(engine, LengthGrader(), OpenGate(), TICKET, "actor-3")
    assert [request["request_id"] for request in engine.requests] == [f"0/5-2-{index}" for index in range(4)]
    assert [request["seed"] for request in engine.requests] == [completion_seed(11, index) for index in range(4)]
    assert {request["cache_salt"] for request in engine.requests} == {"3"}
    assert {request["sampling"] for request in engine.requests} == {TICKET.sampling}
    assert {request["prompt_ids"] for request in engine.requests} == {(3, 4)}


async def test_prefixes_are_shared_between_versions_only_if_the_recipe_says_so() -> None:
    engine = ScriptedEngine()
    await rollout(engine, LengthGrader(), OpenGate(), TICKET, "actor-3", share_cache=True)
    assert {request["cache_salt"] for request in engine.requests} == {""}


def test_completion_seeds_are_fixed_positive_and_all_different() -> None:
    assert completion_seed(0, 0) == completion_seed(0, 0)
    seeds = {completion_seed(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) > 9_990
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert completion_seed(1, 11) != completion_seed(11, 1)


async def test_cancelling_aborts_every_request() -> None:
    engine = ScriptedEngine(hang=True)
    task = asyncio.ensure_future(rollout(engine, LengthGrader(), OpenGate(), TICKET, "a"))
    await engine.all_started.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(engine.cancelled) == 4


@pytest.mark.parametrize("fault", [EngineFailed("out of memory"), ValueError("prompt too long")])
async def test_fault_of_one_completion_ends_the_others_and_comes_out(fault: Exception) -> None:
    engine = ScriptedEngine(fault)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(rollout(engine, LengthGrader(), OpenGate(), TICKET, "a"), 10)
    assert caught.value.exceptions == (fault,)
    assert len(engine.cancelled) == 3
