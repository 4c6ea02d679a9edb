"""The actor: keeps the engine saturated with tickets, sends each group when it is complete, follows the weights.

One asyncio loop. Three things run beside each other: messages of the learner (`_listen`), heartbeats with absolute
state (`_beat`), and weights (`_follow_weights`); each ticket is a task of its own. Whatever the learner has not
acknowledged is kept and sent again after a reconnection. The loop ends when the learner drains it, refuses it or is
gone for too long, or when the engine fails; Ray starts a new process then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TypeVar

from actor.engine import Engine
from actor.grading import GraderPool
from actor.rollout import rollout
from actor.staging import Staging
from protocol.errors import DeadlineExceeded, EngineFailed, WeightsError
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Drain,
    Failed,
    Goodbye,
    Group,
    Heartbeat,
    Hello,
    Refused,
    Rehello,
    Ticket,
    TicketId,
    Welcome,
)  # fmt: skip
from protocol.sockets import Link

log = logging.getLogger(__name__)

T = TypeVar("T")

HELLO_EVERY_S = 2.0
RETRY_WEIGHTS_S = 1.0
LOAD_TIMEOUT_S = 300.0


class LearnerLost(Exception):
    """No word from the learner for too long."""


class LearnerRefused(Exception):
    """The learner does not want this actor, and says why."""


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


def learner_address(learner: str) -> str:
    """Address of the learner: an endpoint (tcp://HOST:PORT), or a file that it keeps up to date (endpoint.json)."""
    if "://" in learner:
        return learner
    return str(json.loads(Path(learner).read_text())["work"])


def make_engine(name: str) -> Engine:
    """The engine that the recipe names. Raises ValueError for an unknown one."""
    if name == "vllm":
        from actor.vllm_engine import VLLMEngine

        return VLLMEngine()
    if name == "fake":
        from actor.fake_engine import FakeEngine

        return FakeEngine()
    raise ValueError(f"actor.engine: found {name!r}, allowed: vllm, fake")


class ActorLoop:
    """One actor process's work, from hello to goodbye."""

    def __init__(self, learner: str, name: str, *, lost_learner_s: float = 120.0, engine: Engine | None = None) -> None:
        self.learner = learner
        self.name = name
        self.incarnation = secrets.token_hex(4)
        self.lost_learner_s = lost_learner_s
        self.engine = engine
        self.phase, self.phase_since = "connecting", time.monotonic()
        self.held: dict[TicketId, asyncio.Task[None]] = {}
        self.unacked: dict[TicketId, Group] = {}
        self.slots = 0
        self.generated_tokens = self.swaps = self.grader_errors = 0
        self.fetch_s = self.pause_s = 0.0
        self.newest = 0
        self._heard_at = time.monotonic()
        self._hello_at = 0.0
        self._leaving = ""
        """Why the learner drains this actor, once it does."""
        self._version_changed = asyncio.Condition()
        self._newer = asyncio.Event()
        self._done: asyncio.Future[str] | None = None

    async def run(self) -> str:
        """Work until drained; returns the reason. Raises EngineFailed, LearnerLost or LearnerRefused."""
        self._done = asyncio.get_running_loop().create_future()
        address = await self._find_learner()
        self.link = Link(address, self.name, self.incarnation)
        log.info("%s (incarnation %s) looks for the learner at %s", self.name, self.incarnation, address)
        error = ""
        reason = "told to stop"
        try:
            self.welcome = await self._introduce()
            self.engine = self.engine or make_engine(str(self.welcome.engine.get("engine", "vllm")))
            reason = await self._work()
        except Exception as failure:
            error = f"{failure}" if isinstance(failure, EngineFailed) else f"{type(failure).__name__}: {failure}"
            reason = "failed"
            raise
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.link.send(Goodbye(reason, error)), 1.0)
            self.link.close()
        return reason

    async def _find_learner(self) -> str:
        while True:
            try:
                return learner_address(self.learner)
            except (OSError, ValueError, KeyError):
                self._check_learner_alive()
                await asyncio.sleep(0.5)

    async def _introduce(self) -> Welcome:
        """Say hello until the learner answers."""
        while True:
            self._check_learner_alive()
            await self.link.send(self._hello())
            with contextlib.suppress(TimeoutError):
                message = await asyncio.wait_for(self.link.receive(), HELLO_EVERY_S)
                self._heard_at = time.monotonic()
                if isinstance(message, Refused):
                    raise LearnerRefused(message.reason)
                if isinstance(message, Welcome):
                    return message

    def _hello(self) -> Hello:
        self._hello_at = time.monotonic()
        return Hello(
            actor=self.name,
            incarnation=self.incarnation,
            slots=self.slots,
            held=tuple(self.held),
            unacked=tuple(self.unacked),
            version=self.engine.version if self.engine else 0,
            pid=os.getpid(),
            host=platform.node(),
        )

    async def _work(self) -> str:
        settings = self.welcome.engine
        max_running = int(settings.get("max_running", 64))
        groups = max(1, max_running // self.welcome.group_size)
        self.slots = groups + max(1, groups // 2)  # the surplus fills gaps that early finishers of a group leave
        self.gate = EngineGate(max_running)
        self.staging = Staging(self.welcome.run, self.name, self.incarnation)
        assert self.engine is not None and self._done is not None
        workers, limit_s = int(settings.get("grader_workers", 1)), self.welcome.grader_timeout_s
        beating = asyncio.create_task(self._beat())
        listening = asyncio.create_task(self._listen())
        background = [beating, listening]
        try:
            self._enter("starting engine")
            await self._or_fail(self.engine.start(self.welcome), background)
            async with GraderPool(workers, limit_s) as self.grader:
                self.link.open_weights(self.welcome.bulk, self.welcome.news)
                self._enter("waiting for weights")
                await self.link.send(self._hello())  # with the number of slots, now that it is known to be real
                background += [asyncio.create_task(self._follow_news()), asyncio.create_task(self._follow_weights())]
                return await self._or_fail(self._done, background)
        finally:
            for task in [*background, *self.held.values()]:
                task.cancel()
            await asyncio.gather(*background, *self.held.values(), return_exceptions=True)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.engine.stop(), 30)
            self.staging.remove()

    async def _or_fail(self, wanted: Awaitable[T], background: list[asyncio.Task[None]]) -> T:
        """Result of `wanted`, unless a background task fails first: then its exception."""
        main = asyncio.ensure_future(wanted)
        try:
            while not main.done():
                await asyncio.wait([main, *background], return_when=asyncio.FIRST_COMPLETED)
                for task in background:
                    if task.done() and not main.done():
                        task.result()
                        raise RuntimeError("a background task of the actor ended early")
            return main.result()
        finally:
            if not main.done():
                main.cancel()
                await asyncio.gather(main, return_exceptions=True)

    def _enter(self, phase: str) -> None:
        self.phase, self.phase_since = phase, time.monotonic()
        log.info("%s: %s", self.name, phase)

    def _finish(self, outcome: str | BaseException) -> None:
        if self._done is not None and not self._done.done():
            if isinstance(outcome, BaseException):
                self._done.set_exception(outcome)
            else:
                self._done.set_result(outcome)

    # --- messages ---

    async def _listen(self) -> None:
        while True:
            message = await self.link.receive()
            self._heard_at = time.monotonic()
            if isinstance(message, Ticket):
                if message.id not in self.held and message.id not in self.unacked and not self._leaving:
                    self.held[message.id] = asyncio.create_task(self._serve(message))
            elif isinstance(message, Ack):
                for ticket_id in message.ids:
                    self.unacked.pop(ticket_id, None)
            elif isinstance(message, Beat):
                self._heard_of(message.version)
            elif isinstance(message, Cancel):
                self._drop(message.ids)
            elif isinstance(message, Rehello):
                await self._say_hello_again()
            elif isinstance(message, Welcome):
                await self._welcomed_again(message)
            elif isinstance(message, Drain):
                self._leaving = message.reason
                self._enter("draining")
                self._drop(() if message.finish else tuple(self.held))
            elif isinstance(message, Refused):
                self._finish(LearnerRefused(message.reason))

    def _drop(self, ids: tuple[TicketId, ...]) -> None:
        """Stop work on tickets, and forget their groups: they are the learner's to issue again."""
        for ticket_id in ids:
            self.unacked.pop(ticket_id, None)
            if task := self.held.pop(ticket_id, None):
                task.cancel()
        self._leave_when_done()

    def _leave_when_done(self) -> None:
        """End a drained actor. Groups sent before go ahead of its goodbye, so it need not wait for their acks."""
        if self._leaving and not self.held:
            self._finish(self._leaving)

    async def _say_hello_again(self) -> None:
        """Once for all the frames that a restarted learner did not understand, not once for each."""
        if time.monotonic() - self._hello_at >= self.welcome.heartbeat_s:
            log.info("the learner does not know this connection: saying hello again")
            await self.link.send(self._hello())

    async def _welcomed_again(self, welcome: Welcome) -> None:
        """The learner was restarted, or answers a second hello: new sockets, and all groups it may have missed."""
        if welcome.run != self.welcome.run:
            self._finish(LearnerRefused(f"run {welcome.run!r} answers at this address, expected {self.welcome.run!r}"))
            return
        if (welcome.bulk, welcome.news) != (self.welcome.bulk, self.welcome.news) and self.phase != "starting engine":
            self.link.open_weights(welcome.bulk, welcome.news)
        self.welcome = welcome
        for group in list(self.unacked.values()):
            await self.link.send(group)

    async def _beat(self) -> None:
        while True:
            await self.link.send(self._heartbeat())
            await asyncio.sleep(self.welcome.heartbeat_s)
            self._check_learner_alive()
            if time.monotonic() - self._heard_at > self.welcome.dead_after_s and "://" not in self.learner:
                await self._look_up_again()

    async def _look_up_again(self) -> None:
        """A restarted learner may have another address: connect there, and say hello."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self.link.reconnect(learner_address(self.learner))
            await self.link.send(self._hello())

    def _check_learner_alive(self) -> None:
        silence = time.monotonic() - self._heard_at
        if silence > self.lost_learner_s:
            raise LearnerLost(f"no word from the learner at {self.learner} for {silence:.0f} s")

    def _heartbeat(self) -> Heartbeat:
        assert self.engine is not None
        return Heartbeat(
            held=tuple(self.held),
            unacked=tuple(self.unacked),
            free_slots=max(0, self.slots - len(self.held) - len(self.unacked)),
            version=self.engine.version,
            phase=self.phase,
            phase_s=time.monotonic() - self.phase_since,
            generated_tokens=self.generated_tokens,
            busy_s=self.gate.busy_s,
            swaps=self.swaps,
            fetch_s=self.fetch_s,
            pause_s=self.pause_s,
            grader_errors=self.grader_errors,
            rss_bytes=_rss_bytes(),
        )

    # --- tickets ---

    async def _serve(self, ticket: Ticket) -> None:
        """Turn a ticket into a group and send it. A failing engine ends the actor, anything else only the ticket."""
        engine = self.engine
        assert engine is not None
        try:
            async with self._version_changed:  # waits for the learner's weights; freed by `_update`
                await self._version_changed.wait_for(lambda: engine.version >= ticket.min_version)
            group = await rollout(engine, self.grader, self.gate, ticket, self.name)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            causes = _causes(error)
            failure = next((cause for cause in causes if isinstance(cause, EngineFailed)), None)
            if failure is not None:
                self._finish(failure)
                return
            log.exception("ticket %s failed", ticket.id)
            self.held.pop(ticket.id, None)
            await self.link.send(Failed(ticket.id, ticket.attempt, f"{type(causes[0]).__name__}: {causes[0]}"))
            self._leave_when_done()
            return
        self.generated_tokens += group.num_tokens
        self.grader_errors += sum(bool(completion.grader_error) for completion in group.completions)
        self.unacked[ticket.id] = group
        self.held.pop(ticket.id, None)
        await self.link.send(group)
        self._leave_when_done()

    # --- weights ---

    def _heard_of(self, version: int) -> None:
        if version > self.newest:
            self.newest = version
            self._newer.set()

    async def _follow_news(self) -> None:
        while True:
            self._heard_of((await self.link.news()).version)

    async def _follow_weights(self) -> None:
        """Stage and swap in the newest version, whenever there is one. A failure before the swap changes nothing."""
        assert self.engine is not None
        while True:
            await self._newer.wait()  # set by news, or by the answer to a heartbeat
            self._newer.clear()
            try:
                await self._update()
            except (WeightsError, DeadlineExceeded, OSError) as error:
                log.warning("version %d stays in service: %s", self.engine.version, error)
                await asyncio.sleep(RETRY_WEIGHTS_S)
                self._newer.set()
            except EngineFailed as error:
                self._finish(error)
                await asyncio.Event().wait()  # condemned: `_work` ends everything

    async def _update(self) -> None:
        assert self.engine is not None
        manifest = await self.link.fetch_manifest()
        if manifest.version < self.newest:
            raise WeightsError(f"version {self.newest} was announced, {manifest.version} can be had")
        if manifest.version <= self.engine.version:
            return
        if self.engine.version == 0:
            self._enter("loading weights")
        staged = await self.staging.fetch(self.link, manifest, self.welcome)
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
        if self.phase != "serving":
            self._enter("serving")
        log.info("serves version %d: staged in %.2f s, paused %.2f s", manifest.version, staged.seconds, self.pause_s)
        async with self._version_changed:
            self._version_changed.notify_all()
        await self.link.send(self._heartbeat())  # confirms the version at once


def _causes(error: BaseException) -> list[BaseException]:
    """The errors inside an error: task groups wrap what their tasks raise."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for inner in error.exceptions for cause in _causes(inner)]
    return [error]


def _rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
