"""The actor's loop against a learner that the test scripts, on real sockets and the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actor import engine_metrics, fake_engine, follower
from actor import loop as loop_module
from actor.engine import Generated
from actor.fake_engine import FakeEngine, draw
from actor.gate import EngineGate
from actor.locks import FileLock
from actor.loop import ActorLoop, LearnerLost, LearnerRefused, make_engine
from actor.staging import SHARED_MEMORY
from protocol.deltas import DeltaCoder
from protocol.engine_text import unpack
from protocol.errors import EngineFailed, WeightsError
from protocol.hub import Hub
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Delta,
    Drain,
    EngineMetrics,
    Failed,
    Goodbye,
    Group,
    Heartbeat,
    Hello,
    Manifest,
    Message,
    Probe,
    Probed,
    Refused,
    Rehello,
    Sampling,
    Ticket,
    TicketId,
    Update,
    Welcome,
)
from protocol.weights import Snapshot
from tests.hub_harness import DEADLINE_S, RunningHub, snapshot
from tests.intake_harness import make_ticket

GROUP_SIZE = 2
MAX_RUNNING = 4
RUN = f"loop-test-{os.getpid()}"
"""Actors of a run share a directory, those of tests that run side by side must not."""


@pytest.fixture(autouse=True)
def nothing_staged() -> Iterator[None]:
    """What a failed actor leaves for its successor is not for the next test."""
    yield
    shutil.rmtree(SHARED_MEMORY / f"tandem-{RUN}-weights", ignore_errors=True)


class ScriptedLearner(RunningHub):
    """Welcomes actors and answers heartbeats; everything else is the test's to send."""

    def __init__(self, port: int = 0, run: str = RUN, welcomes: bool = True) -> None:
        super().__init__(port, answer=self._reply)
        self.welcomes = welcomes
        self.peer = b""
        self.welcome = Welcome(
            run=run, model="none", dtype="float32", max_model_len=64, bulk=self.hub.bulk_endpoint,
            news=self.hub.news_endpoint, heartbeat_s=0.05, dead_after_s=60.0, seed=0, group_size=GROUP_SIZE,
            chunk_bytes=300,
            engine={"engine": "fake", "max_running": MAX_RUNNING, "grader_workers": 1},
        )  # fmt: skip

    def _reply(self, hub: Hub, peer: bytes, message: Message) -> None:
        if isinstance(message, Hello) and self.welcomes:
            self.peer = peer
            hub.send(peer, self.welcome)
        elif isinstance(message, Heartbeat):
            hub.send(peer, Beat(hub.shelf.version))

    async def send(self, *messages: Message) -> None:
        for message in messages:
            assert await asyncio.to_thread(self.run, lambda m=message: self.hub.send(self.peer, m))

    async def announce(self, version: Snapshot, delta: tuple[Delta, bytes] | None = None) -> None:
        await asyncio.to_thread(self.run, lambda: self.hub.announce(version, delta))

    async def publish(self, version: int) -> None:
        """Announce a version and wait until the actor serves it."""
        await self.announce(snapshot(version))
        await until(lambda: any(beat.version == version for beat in self.all(Heartbeat)))

    def all(self, kind: type[Any]) -> list[Any]:
        return [message for _, message in list(self.received) if isinstance(message, kind)]

    async def wait_for(self, kind: type[Any], count: int = 1) -> list[Any]:
        await until(lambda: len(self.all(kind)) >= count)
        return self.all(kind)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the condition changes in another thread
            await asyncio.sleep(0.005)


def long_ticket(index: int, max_tokens: int = 1000, **changes: Any) -> Ticket:
    return msgspec.structs.replace(make_ticket(index), sampling=Sampling(max_tokens=max_tokens), **changes)


@contextlib.asynccontextmanager
async def running(
    learner: ScriptedLearner, engine: FakeEngine, version: int = 1, **options: Any
) -> AsyncIterator[tuple[ActorLoop, asyncio.Task[str]]]:
    """An actor at work, serving `version` (0: none yet)."""
    actor = ActorLoop(learner.hub.work_endpoint, "actor-0", engine=engine, **options)
    task = asyncio.create_task(actor.run())
    try:
        await until(lambda: actor.phase == "waiting for weights" or task.done())
        if version:
            await learner.publish(version)
        yield actor, task
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=DEADLINE_S)


# --- introduction and end ---


async def test_actor_introduces_itself_with_its_absolute_state() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine(), version=3) as (actor, _):
            first, second, *_ = learner.all(Hello)
            assert (first.actor, first.incarnation, first.slots, first.pid) == (
                "actor-0",
                actor.incarnation,
                0,
                os.getpid(),
            )
            assert second.slots == 3, "two groups fill the engine, one more is in hand"
            beat = learner.all(Heartbeat)[-1]
            assert (beat.version, beat.phase, beat.held, beat.unacked, beat.swaps) == (3, "serving", (), (), 1)
            assert beat.rss_bytes > 10_000_000


async def test_serving_time_begins_with_the_first_version_and_goes_on_over_another_hello() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine(), version=0) as (actor, _):
            beats = len(learner.all(Heartbeat))
            assert {beat.serving_s for beat in await learner.wait_for(Heartbeat, beats + 2)} == {0.0}
            await learner.publish(1)
            await until(lambda: learner.all(Heartbeat)[-1].serving_s > 0)
            await asyncio.sleep(learner.welcome.heartbeat_s)
            before, hellos = learner.all(Heartbeat)[-1], len(learner.all(Hello))
            await learner.send(Rehello())
            await learner.wait_for(Hello, hellos + 1)
            await learner.publish(2)
            await until(lambda: learner.all(Heartbeat)[-1].version == 2)
            after = learner.all(Heartbeat)[-1]
            assert after.serving_s > before.serving_s > 0 and after.swaps == 2
            assert actor.weights.serving_s >= after.serving_s >= after.busy_s


async def test_hello_is_repeated_until_the_learner_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "HELLO_EVERY_S", 0.05)
    with ScriptedLearner(welcomes=False) as learner:
        actor = ActorLoop(learner.hub.work_endpoint, "actor-0", engine=FakeEngine())
        task = asyncio.create_task(actor.run())
        await learner.wait_for(Hello, 3)
        learner.welcomes = True
        await until(lambda: actor.phase == "waiting for weights")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [bye.error for bye in await learner.wait_for(Goodbye)] == [""]


async def test_refused_actor_ends_with_the_reason() -> None:
    def refuse(hub: Hub, peer: bytes, message: Message) -> None:
        hub.send(peer, Refused("no room"))

    with RunningHub(answer=refuse) as learner, pytest.raises(LearnerRefused, match="no room"):
        await asyncio.wait_for(ActorLoop(learner.hub.work_endpoint, "a", engine=FakeEngine()).run(), DEADLINE_S)


@pytest.mark.parametrize("reason", ["refused", "another run"])
async def test_actor_at_work_can_be_sent_away(reason: str) -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine()) as (_, task):
            other = msgspec.structs.replace(learner.welcome, run="another run")
            await learner.send(Refused("refused") if reason == "refused" else other)
            with pytest.raises(LearnerRefused, match=reason):
                await asyncio.wait_for(asyncio.shield(task), DEADLINE_S)


async def test_actor_gives_up_a_learner_that_is_gone(tmp_path: Path) -> None:
    with ScriptedLearner() as learner:
        stack = contextlib.AsyncExitStack()
        actor, task = await stack.enter_async_context(running(learner, FakeEngine(), lost_learner_s=3.0))
        directory = actor.weights.staging.directory
        assert directory is not None
        assert directory.exists()
    with pytest.raises(LearnerLost, match="no word from the learner at tcp://"):
        await asyncio.wait_for(asyncio.shield(task), DEADLINE_S)
    assert not directory.exists()
    await stack.aclose()


def test_unknown_engine_is_refused_by_name() -> None:
    assert isinstance(make_engine("fake"), FakeEngine)
    with pytest.raises(ValueError, match=r"actor\.engine: found 'sglang', allowed: vllm, fake"):
        make_engine("sglang")


async def test_drain_drops_what_is_in_hand_and_says_goodbye() -> None:
    engine = FakeEngine(token_s=60)
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (_, task):
            await learner.send(long_ticket(0))
            await until(lambda: len(engine.started) == GROUP_SIZE)
            await learner.send(Drain("pack up"))
            assert await asyncio.wait_for(asyncio.shield(task), DEADLINE_S) == "pack up"
            assert await learner.wait_for(Goodbye) == [Goodbye("pack up")]
            assert learner.all(Group) == []
            assert len(engine.aborted) == GROUP_SIZE


async def test_drain_with_finish_completes_what_is_in_hand_and_takes_nothing_new() -> None:
    engine = FakeEngine(token_s=0.05)
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (_, task):
            await learner.send(make_ticket(0), make_ticket(1))
            await until(lambda: engine.started)
            await learner.send(Drain("pack up", finish=True), make_ticket(2))
            assert await asyncio.wait_for(asyncio.shield(task), DEADLINE_S) == "pack up"
            await learner.wait_for(Goodbye)
            order = [type(message) for _, message in learner.received if not isinstance(message, Heartbeat | Hello)]
            assert order == [Group, Group, Goodbye]
            assert {group.id.index for group in learner.all(Group)} == {0, 1}


# --- tickets ---


async def test_group_is_kept_until_it_is_acknowledged_and_sent_again_when_asked() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine()) as (actor, _):
            await learner.send(make_ticket(0), make_ticket(1))
            await learner.wait_for(Group, 2)
            await learner.send(Ack((TicketId(0, 0),)))
            await until(lambda: list(actor.unacked) == [TicketId(0, 1)])
            await until(lambda: learner.all(Heartbeat)[-1].unacked == (TicketId(0, 1),))
            await asyncio.sleep(learner.welcome.heartbeat_s)
            hellos = len(learner.all(Hello))
            await learner.send(Rehello())
            *_, hello = await learner.wait_for(Hello, hellos + 1)
            assert (hello.unacked, hello.version, hello.slots) == ((TicketId(0, 1),), 1, 3)
            groups = await learner.wait_for(Group, 3)
            assert groups[2] == next(group for group in groups[:2] if group.id.index == 1)


async def test_ticket_that_comes_twice_is_worked_on_once() -> None:
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            await learner.send(make_ticket(0), make_ticket(0), make_ticket(0))
            await learner.wait_for(Group)
            await learner.send(make_ticket(0), make_ticket(1))
            await learner.wait_for(Group, 2)
            assert [group.id.index for group in learner.all(Group)] == [0, 1]
            assert len(engine.started) == 2 * GROUP_SIZE


async def test_cancelled_ticket_is_aborted_and_nothing_is_sent_for_it() -> None:
    engine = FakeEngine(token_s=60)
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (actor, _):
            await learner.send(long_ticket(0))
            await until(lambda: len(engine.started) == GROUP_SIZE)
            engine.token_s = 0
            await learner.send(Cancel((TicketId(0, 0), TicketId(0, 99))), make_ticket(1))
            (group,) = await learner.wait_for(Group)
            assert group.id == TicketId(0, 1)
            assert len(engine.aborted) == GROUP_SIZE
            assert actor.held == {}
            await learner.send(msgspec.structs.replace(make_ticket(0), attempt=2))
            assert [group.id.index for group in await learner.wait_for(Group, 2)] == [1, 0]


async def test_cancel_forgets_a_group_that_the_learner_never_took() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine()) as (actor, _):
            await learner.send(make_ticket(0))
            await learner.wait_for(Group)
            await learner.send(Cancel((TicketId(0, 0),)), msgspec.structs.replace(make_ticket(0), attempt=2))
            assert [group.attempt for group in await learner.wait_for(Group, 2)] == [1, 2]
            assert list(actor.unacked) == [TicketId(0, 0)]


async def test_ticket_waits_for_its_version() -> None:
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            await learner.send(long_ticket(0, 5, min_version=2), make_ticket(1))
            (group,) = await learner.wait_for(Group)
            assert group.id.index == 1
            await until(lambda: learner.all(Heartbeat)[-1].held == (TicketId(0, 0),))
            await learner.publish(2)
            _, group = await learner.wait_for(Group, 2)
            assert {completion.spans for completion in group.completions} == {((2, 0),)}


class PickyEngine(FakeEngine):
    """Cannot digest the prompt of ticket 0."""

    async def generate(self, request_id: str, *rest: Any, **more: Any) -> Generated:
        if request_id.startswith("0/0-"):
            raise ValueError("prompt does not fit")
        return await super().generate(request_id, *rest, **more)


async def test_ticket_that_cannot_be_done_fails_alone() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, PickyEngine()) as (actor, task):
            await learner.send(make_ticket(0), make_ticket(1))
            (failed,) = await learner.wait_for(Failed)
            assert (failed.id, failed.attempt) == (TicketId(0, 0), 1)
            assert "unhandled errors in a TaskGroup" not in failed.error
            assert "ValueError: prompt does not fit" in failed.error
            (group,) = await learner.wait_for(Group)
            assert group.id.index == 1
            assert not task.done()
            assert actor.held == {}


async def test_failing_engine_is_reported_in_its_own_words_and_ends_the_actor() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine(fail_on_request="0/1-")) as (_, task):
            await learner.send(make_ticket(0), make_ticket(1))
            with pytest.raises(EngineFailed, match="injected: request 0/1-1-"):
                await asyncio.wait_for(asyncio.shield(task), DEADLINE_S)
            (goodbye,) = await learner.wait_for(Goodbye)
            assert goodbye.reason == "failed"
            assert goodbye.error.startswith("injected: request 0/1-1-")
            assert learner.all(Failed) == []


async def test_engine_that_fails_in_mid_swap_is_condemned() -> None:
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine(fail_on_version=2)) as (_, task):
            await learner.announce(snapshot(2))
            with pytest.raises(EngineFailed, match="injected: version 2"):
                await asyncio.wait_for(asyncio.shield(task), DEADLINE_S)
            assert [bye.error for bye in await learner.wait_for(Goodbye)] == ["injected: version 2"]
        sent, engine = learner.hub.bytes_sent, FakeEngine()
        successor = asyncio.create_task(ActorLoop(learner.hub.work_endpoint, "actor-0", engine=engine).run())
        await until(lambda: engine.version == 2)
        successor.cancel()
        await asyncio.wait([successor], timeout=DEADLINE_S)
        assert learner.hub.bytes_sent == sent, "it finds what was staged"


async def test_actor_whose_engine_fails_leaves_the_directory_when_its_thread_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A delta is being decoded then, and turns out to be wrong: that is noted where the slots are."""
    monkeypatch.chdir(tmp_path)
    begun, go = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        assert go.wait(DEADLINE_S)
        raise WeightsError("wrong")

    versions = [snapshot(version) for version in (1, 2)]
    with ScriptedLearner() as learner:
        async with running(learner, FakeEngine(fail_on_request="0/0-")) as (actor, task):
            directory = actor.weights.staging.directory
            assert directory is not None
            monkeypatch.setattr(actor.weights.staging._coder, "decode", slow)
            await learner.announce(versions[1], DeltaCoder(1).encode(*versions))
            assert await asyncio.to_thread(begun.wait, DEADLINE_S)
            await learner.send(make_ticket(0))
            await until(lambda: actor._done is not None and actor._done.done())
            await asyncio.wait([task], timeout=0.05)
            assert not task.done()
            assert not is_free(directory / "users.lock")
            go.set()
            with pytest.raises(EngineFailed, match="injected"):
                await asyncio.wait_for(asyncio.shield(task), DEADLINE_S)
            assert is_free(directory / "users.lock")
            assert json.loads((directory / "slots.json").read_text()) == {}
    assert list(tmp_path.iterdir()) == []


# --- the gate ---


class CountingEngine(FakeEngine):
    """Keeps count of the requests inside, and of those that came in during a load."""

    def __init__(self, **faults: Any) -> None:
        super().__init__(**faults)
        self.inside = self.most_inside = 0
        self.loading = False
        self.started_in_a_load: list[str] = []

    async def generate(self, request_id: str, *rest: Any, **more: Any) -> Generated:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        if self.loading:
            self.started_in_a_load.append(request_id)
        try:
            return await super().generate(request_id, *rest, **more)
        finally:
            self.inside -= 1

    async def load(self, manifest: Manifest, staged: Path) -> float:
        self.loading = True
        try:
            return await super().load(manifest, staged)
        finally:
            self.loading = False


async def test_engine_never_holds_more_than_it_runs_at_once() -> None:
    engine = CountingEngine(token_s=0.002)
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (actor, _):
            await learner.send(*(make_ticket(index) for index in range(8)))
            await learner.wait_for(Group, 8)
            assert engine.most_inside == MAX_RUNNING
            assert actor.gate.busy_s > 0


async def test_nothing_is_submitted_during_a_swap() -> None:
    engine = CountingEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            engine.pause_s = 0.5
            await learner.announce(snapshot(2))
            await until(lambda: engine.loading)
            await learner.send(*(make_ticket(index) for index in range(3)))
            await until(lambda: not engine.loading)
            await learner.wait_for(Group, 3)
            assert engine.started_in_a_load == []
            assert {salt for _, salt in engine.started} == {"2"}, "the salt is of the version that serves at the start"


def probe_of(version: int, max_tokens: int = 30) -> Probe:
    return Probe(version, ((1, 2), (3, 4), (5, 6)), max_tokens, seed=3)


async def test_engine_is_told_of_only_when_the_learner_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_metrics, "UNASKED_S", 0.05)
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            assert not learner.all(EngineMetrics)
            await learner.send(msgspec.structs.replace(learner.welcome, engine_metrics_s=0.05))
            await learner.send(make_ticket(0))
            await learner.wait_for(Group)
            seen = len(learner.all(EngineMetrics))
            *_, told = await learner.wait_for(EngineMetrics, seen + 2)  # the first may have been on its way
            assert f"fake:requests_total {len(engine.started)}.0" in unpack(told.text)


async def test_engine_whose_metrics_fail_serves_on(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(FakeEngine):
        asked = 0

        def metrics(self) -> str:
            self.asked += 1
            raise RuntimeError("no metrics today")

    engine = Mute()
    with ScriptedLearner() as learner:
        learner.welcome = msgspec.structs.replace(learner.welcome, engine_metrics_s=0.01)
        async with running(learner, engine):
            await until(lambda: engine.asked > 2)
            await learner.send(make_ticket(0))
            await learner.wait_for(Group)
    assert caplog.text.count("no metrics today") == 1


async def test_probe_is_answered_with_what_the_engine_draws() -> None:
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine, version=4):
            await learner.send(probe_of(4))
            (probed,) = await learner.wait_for(Probed)
            drawn = [
                await engine.generate(f"again-{index}", prompt, Sampling(30), 3 + index, "x")
                for index, prompt in enumerate(probe_of(4).prompts)
            ]
            assert (probed.version, probed.checksum) == (4, "")
            assert probed.num_tokens == tuple(len(one.token_ids) for one in drawn)
            expected = [token for one in drawn for token in one.token_ids]
            assert np.frombuffer(probed.token_ids, "<i4").tolist() == expected
            logprobs = [logprob for one in drawn for logprob in one.logprobs]
            assert np.frombuffer(probed.logprobs, "<f4").tolist() == pytest.approx(logprobs)


async def test_version_waits_for_the_probe_of_the_one_before() -> None:
    engine = FakeEngine(token_s=0.01)
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            await learner.send(probe_of(1))
            await until(lambda: engine.started)
            await learner.announce(snapshot(2))
            (probed,) = await learner.wait_for(Probed)
            assert probed.version == 1, "all of its tokens are of that version"
            await until(lambda: engine.version == 2)


async def test_probe_of_a_version_that_is_gone_is_not_answered() -> None:
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine, version=2):
            await learner.send(probe_of(1), probe_of(2))
            (probed,) = await learner.wait_for(Probed)
            assert probed.version == 2


async def test_probe_that_takes_too_long_holds_no_version_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "PROBE_S", 0.05)
    engine = FakeEngine(token_s=0.1)
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            await learner.send(probe_of(1, max_tokens=40))
            await until(lambda: engine.started)
            await learner.publish(2)
            await learner.send(probe_of(2, max_tokens=1))
            (probed,) = await learner.wait_for(Probed)
            assert probed.version == 2, "the first one drew tokens of both"


async def test_gate_lets_a_cancelled_waiter_go_without_losing_a_slot() -> None:
    gate = EngineGate(1)

    async def enter() -> None:
        async with gate:
            pass

    with gate.swapping():
        waiters = [asyncio.create_task(enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        await asyncio.sleep(0)
        assert gate.running == 0
    done = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), DEADLINE_S)
    assert [type(result) for result in done] == [asyncio.CancelledError, type(None), type(None)]
    await asyncio.wait_for(enter(), DEADLINE_S)


async def test_gate_counts_busy_time_and_completion_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("actor.gate.time.monotonic", lambda: now[0])
    gate = EngineGate(4)
    now[0] += 1  # idle
    async with gate:
        now[0] += 2
        async with gate:
            now[0] += 3
            assert (gate.running, gate.busy_s, gate.running_s) == (2, 5.0, 2 + 2 * 3)
        now[0] += 5
    now[0] += 7
    assert (gate.running, gate.busy_s, gate.running_s) == (0, 10.0, 2 + 2 * 3 + 5)


# --- weights ---


async def test_completion_that_crosses_an_update_says_so_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(token_s=0.01)
    begun: set[int] = set()

    def noted(prompt_ids: Any, seed: int, version: int, index: int) -> tuple[int, float]:
        begun.add(seed)
        return draw(prompt_ids, seed, version, index)

    monkeypatch.setattr(fake_engine, "draw", noted)
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            await learner.send(long_ticket(3, max_tokens=20_000))
            await until(lambda: len(begun) == GROUP_SIZE)
            await learner.publish(2)
            engine.token_s = 0.0
            (group,) = await learner.wait_for(Group)
            for completion in group.completions:
                assert completion.num_tokens > 1000
                (first, start), (second, position) = completion.spans
                assert (first, start, second) == (1, 0, 2)
                assert 0 < position < completion.num_tokens


async def test_missed_news_is_learnt_from_the_answer_to_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedLearner() as learner:
        monkeypatch.setattr(learner.hub._news, "send_multipart", lambda *_, **__: None)
        engine = FakeEngine()
        async with running(learner, engine, version=5):
            await learner.publish(6)
            assert [version for version, _ in engine.loaded] == [5, 6]


async def test_version_is_swapped_in_from_the_delta_that_came_with_its_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    versions = [snapshot(version) for version in (1, 2)]
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (actor, _):
            before = learner.hub.bytes_sent
            delta = DeltaCoder(1).encode(*versions)
            assert delta is not None
            await learner.announce(versions[1], delta)
            await until(lambda: engine.version == 2)
            await until(lambda: actor.phase == "serving" and actor.weights.swaps == 2)
            assert "serves version 2: delta, fetch" in caplog.text
            assert learner.hub.bytes_sent == before + delta[0].nbytes
            assert actor.weights.fetch_s > 0


def is_free(path: Path) -> bool:
    """Whether an actor could write a slot."""
    lock = FileLock(path)
    try:
        return lock.try_to(share=False)
    finally:
        lock.release()


class LookingEngine(FakeEngine):
    """Looks whether the slot that it loads from could be written meanwhile."""

    def __init__(self, **faults: Any) -> None:
        super().__init__(**faults)
        self.slots: list[Path] = []
        self.free_in_a_load: list[bool] = []

    async def load(self, manifest: Manifest, staged: Path) -> float:
        self.slots.append(staged)
        self.free_in_a_load.append(is_free(staged))
        return await super().load(manifest, staged)


async def test_slot_is_held_while_the_engine_loads_from_it_and_no_longer() -> None:
    """Also if the engine fails at it: the other actors of the node go on."""
    engine = LookingEngine(fail_on_version=2)
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (actor, task):
            assert is_free(engine.slots[0])
            assert actor.weights.staging.directory is not None
            neighbour = FileLock(actor.weights.staging.directory / "users.lock")
            assert neighbour.try_to(share=True)
            await learner.announce(snapshot(2))
            with pytest.raises(EngineFailed, match="injected: version 2"):
                await asyncio.wait_for(asyncio.shield(task), DEADLINE_S)
            assert engine.free_in_a_load == [False, False]
            assert [(path.name, is_free(path)) for path in engine.slots] == [
                ("slot-0.safetensors", True),
                ("slot-1.safetensors", True),
            ]
            shutil.rmtree(neighbour.path.parent)
            neighbour.release()


async def test_damaged_version_is_not_loaded_and_the_next_sound_one_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower, "RETRY_S", 0.02)
    good = snapshot(2)
    damaged = bytearray(good.data)
    damaged[500] ^= 4
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (actor, task):
            await learner.announce(Snapshot(good.manifest, memoryview(damaged)))
            await until(lambda: "version 1 stays in service: version 2: wrong digest of tensor w" in caplog.text)
            await learner.send(make_ticket(0))
            (group,) = await learner.wait_for(Group)
            assert group.completions[0].spans == ((1, 0),)
            await learner.publish(3)
            assert [version for version, _ in engine.loaded] == [1, 3]
            assert not task.done()
            assert actor.weights.staging.directory is not None
            held = json.loads((actor.weights.staging.directory / "slots.json").read_text())
            assert [slot["version"] for slot in held.values()] == [1, 3], "the damaged one was never on record"


async def test_full_disk_keeps_the_old_version_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower, "RETRY_S", 0.02)
    room = True

    def small_disk(descriptor: int, start: int, size: int, fallocate: Any = os.posix_fallocate) -> None:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        fallocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", small_disk)
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine):
            room = False
            await learner.announce(snapshot(2))
            await until(lambda: "version 1 stays in service: [Errno 28] No space left" in caplog.text)
            await learner.send(make_ticket(0))
            await learner.wait_for(Group)
            assert engine.version == 1
            room = True
            await until(lambda: engine.version == 2)


async def test_answer_that_is_older_than_the_announcement_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follower, "RETRY_S", 0.02)
    engine = FakeEngine()
    with ScriptedLearner() as learner:
        async with running(learner, engine) as (actor, _):
            fetch_update, answers = actor.link.fetch_update, [Update(snapshot(1).manifest)]

            async def late(base: int, base_digest: str) -> Update:
                return answers.pop() if answers else await fetch_update(base, base_digest)

            monkeypatch.setattr(actor.link, "fetch_update", late)
            await learner.publish(2)
            assert answers == []


async def test_restarted_learner_with_new_sockets_is_followed() -> None:
    engine = FakeEngine()
    first = ScriptedLearner()
    port = int(first.hub.work_endpoint.rpartition(":")[2])
    stack = contextlib.AsyncExitStack()
    with first:
        _, task = await stack.enter_async_context(running(first, engine))
    with ScriptedLearner(port) as second:
        second._answer = lambda hub, peer, message: (
            second._reply(hub, peer, message)
            if isinstance(message, Hello) or second.peer
            else hub.send(peer, Rehello())
        )
        assert second.hub.bulk_endpoint != first.hub.bulk_endpoint
        await second.wait_for(Hello)
        await second.publish(2)
        assert not task.done()
        assert [version for version, _ in engine.loaded] == [1, 2]
        await stack.aclose()
