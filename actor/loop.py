"""The actor: keeps the engine saturated with tickets, sends each group when it is complete, follows the weights.

One asyncio loop. Three things run beside each other: messages of the learner (`_listen`), heartbeats with absolute
state (`_beat`), and weights (`follower.py`); each ticket is a task of its own. Whatever the learner has not
acknowledged is kept and sent again after a reconnection. The loop ends when the learner drains it, refuses it or is
gone for too long, or when the engine fails; Ray starts a new process then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import secrets
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import msgspec

from actor.engine import Engine
from actor.engine_metrics import tell
from actor.finding import Address, FindLearner, finder
from actor.follower import WeightFollower
from actor.gate import EngineGate
from actor.grading import GraderPool
from actor.rollout import rollout
from actor.staging import Staging
from protocol.errors import EngineFailed, KeysError
from protocol.link import Link
from protocol.memory import resident_bytes
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
    Probe,
    Refused,
    Rehello,
    Ticket,
    TicketId,
    Welcome,
)  # fmt: skip

log = logging.getLogger(__name__)

T = TypeVar("T")

HELLO_EVERY_S = 2.0
SAY_EVERY_S = 10.0


class LearnerLost(Exception):
    """No word from the learner for too long."""


class LearnerRefused(Exception):
    """The learner does not want this actor, and says why."""


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

    def __init__(
        self,
        learner: str | FindLearner,
        name: str,
        *,
        lost_learner_s: float = 120.0,
        engine: Engine | None = None,
        user_functions: Sequence[str] = (),
        user_path: str = "",
        model: str = "",
    ) -> None:
        """`learner`: finds it, or what `finding.finder` makes one of (an address, or the path of endpoint.json).
        `user_functions`: the graders module:function that this actor may call, modules also from `user_path`. They
        come from whoever starts the actor, never from the learner. `model`: directory with the model's configuration
        and tokenizer on this machine; "": the one that the learner names."""
        self.find = finder(learner) if isinstance(learner, str) else learner
        self.learner = learner if isinstance(learner, str) else "an address not known yet"
        """Where it is looked for, in words."""
        self.name = name
        self.incarnation = secrets.token_hex(4)
        self.lost_learner_s = lost_learner_s
        self.engine = engine
        self.user_functions, self.user_path = tuple(user_functions), user_path
        self.model = model
        self.phase, self.phase_since = "connecting", time.monotonic()
        self.held: dict[TicketId, asyncio.Task[None]] = {}
        self.unacked: dict[TicketId, Group] = {}
        self._probing: set[asyncio.Task[None]] = set()
        self.slots = 0
        self.generated_tokens = self.grader_errors = 0
        self._address = Address("")
        self._heard_at = time.monotonic()
        self._hello_at = 0.0
        self._leaving = ""
        """Why the learner drains this actor, once it does."""
        self._done: asyncio.Future[str] | None = None

    async def run(self) -> str:
        """Work until drained; returns the reason. Raises EngineFailed, LearnerLost or LearnerRefused."""
        self._done = asyncio.get_running_loop().create_future()
        self._address = await self._find_learner()
        self.link = Link(self._address.work, self.name, self.incarnation, keys=self._address.keys)
        log.info("%s (incarnation %s) looks for the learner at %s", self.name, self.incarnation, self._address.work)
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

    async def _find_learner(self) -> Address:
        """Address of the learner; waits for whoever names it. Raises KeysError for keys that cannot be used."""
        said = 0.0
        while True:
            try:
                return await asyncio.to_thread(self.find)
            except KeysError:
                raise
            except (OSError, ValueError) as error:
                self._check_learner_alive()
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    log.info("%s waits for a learner's address in %s (%s)", self.name, self.learner, error)
                await asyncio.sleep(0.5)

    async def _introduce(self) -> Welcome:
        """Say hello until the learner answers. The address is looked up each time: it may be an old one."""
        said = time.monotonic()
        while True:
            self._check_learner_alive()
            await self._follow_learner()
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                silence = said - self._heard_at
                log.info("%s knocks at %s, nobody has answered for %.0f s", self.name, self._address.work, silence)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HELLO_EVERY_S):  # of the sending, too: a refused socket takes nothing
                    await self.link.send(self._hello())
                    message = await self.link.receive()
                self._heard_at = time.monotonic()
                if isinstance(message, Refused):
                    raise LearnerRefused(message.reason)
                if isinstance(message, Welcome):
                    return message

    async def _follow_learner(self) -> bool:
        """Connect to where the learner is now, with the keys that it wants now. False if nothing is known of a move."""
        with contextlib.suppress(OSError, ValueError):
            if (now := await asyncio.to_thread(self.find)) != self._address:
                self.link.reconnect(now.work, now.keys)
                self._address = now
                return True
        return False

    def _hello(self) -> Hello:
        self._hello_at = time.monotonic()
        return Hello(
            actor=self.name,
            incarnation=self.incarnation,
            slots=0 if self._leaving else self.slots,  # this learner may not know that it was sent home
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
        assert self.engine is not None and self._done is not None
        self.weights = WeightFollower(
            self.engine,
            self.link,
            Staging(self.welcome.run),
            self.gate,
            lambda: self.welcome,
            self._enter,
            self._confirm,
        )
        workers, limit_s = int(settings.get("grader_workers", 1)), self.welcome.grader_timeout_s
        beating = asyncio.create_task(self._beat())
        listening = asyncio.create_task(self._listen())
        background = [beating, listening]
        failed = False
        try:
            self._enter("starting engine")
            graders = GraderPool(workers, limit_s, user_functions=self.user_functions, user_path=self.user_path)
            async with graders as self.grader:  # first: it takes a tenth of a second, and a fault of a user's shows
                here = msgspec.structs.replace(self.welcome, model=self.model or self.welcome.model)
                await self._or_fail(self.engine.start(here), background)
                self.link.open_weights(self.welcome.bulk, self.welcome.news)
                self._enter("waiting for weights")
                await self.link.send(self._hello())  # with the number of slots, now that it is known to be real
                background += [asyncio.create_task(self.weights.listen()), asyncio.create_task(self.weights.follow())]
                background.append(
                    asyncio.create_task(tell(self.engine, self.link, lambda: self.welcome.engine_metrics_s))
                )
                return await self._or_fail(self._done, background)
        except EngineFailed:
            failed = True
            raise
        finally:
            tasks = [*background, *self.held.values(), *self._probing]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.engine.stop(), 30)
            self.weights.staging.leave(keep=failed)  # whoever is started in its place finds what is staged

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
        if phase != self.phase:
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
                self.weights.heard_of(message.version)
            elif isinstance(message, Probe):
                self._probing.add(asyncio.create_task(self._probe(message)))
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
            if time.monotonic() - self._heard_at > self.welcome.dead_after_s and await self._follow_learner():
                await self.link.send(self._hello())

    def _check_learner_alive(self) -> None:
        silence = time.monotonic() - self._heard_at
        if silence > self.lost_learner_s:
            why = self.link.problem if self._address.work else ""  # without an address there is no link yet
            raise LearnerLost(
                f"no word from the learner at {self._address.work or self.learner} for {silence:.0f} s"
                f"{': ' if why else ''}{why}"
            )

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
            swaps=self.weights.swaps,
            fetch_s=self.weights.fetch_s,
            pause_s=self.weights.pause_s,
            grader_errors=self.grader_errors,
            rss_bytes=resident_bytes(),
            running=self.gate.running,
            running_s=self.gate.running_s,
            paused_s=self.weights.paused_s,
            serving_s=self.weights.serving_s,
        )

    async def _confirm(self) -> None:
        """Tell the learner at once which version is served now."""
        await self.link.send(self._heartbeat())

    async def _probe(self, probe: Probe) -> None:
        """Answer a probe beside the tickets. A failing engine ends the actor."""
        try:
            if (probed := await self.weights.answer(probe)) is not None:
                await self.link.send(probed)
        except EngineFailed as failure:
            self._finish(failure)
        except (ValueError, RuntimeError):
            log.exception("the probe of version %d failed", probe.version)
        finally:
            self._probing.discard(asyncio.current_task())

    # --- tickets ---

    async def _serve(self, ticket: Ticket) -> None:
        """Turn a ticket into a group and send it. A failing engine ends the actor, anything else only the ticket."""
        engine = self.engine
        assert engine is not None
        try:
            await self.weights.wait_for(ticket.min_version)
            shared = self.welcome.prefix_cache == "shared"
            group = await rollout(engine, self.grader, self.gate, ticket, self.name, shared)
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


def _causes(error: BaseException) -> list[BaseException]:
    """The errors inside an error: task groups wrap what their tasks raise."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for inner in error.exceptions for cause in _causes(inner)]
    return [error]
