"""Actors for tests of the wire: the real loop in a thread, and a puppet that the test moves frame by frame.

Used against `tests.intake_harness.Intake`, whose small learner is `train` here. Not a test itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from actor.fake_engine import FakeEngine
from actor.loop import ActorLoop
from protocol import codec
from protocol.messages import Ack, Beat, Goodbye, Group, Heartbeat, Hello, Message, Ticket, TicketId
from protocol.sockets import peer_id
from tests.intake_harness import Intake

DEADLINE_S = 30.0


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Poll a condition until it is true; its value. Fails after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}"
        time.sleep(0.005)
    return value


def train(intake: Intake, to_step: int) -> list[list[Group]]:
    """What the learner does with an intake, but for the mathematics: batches of the steps up to `to_step`."""
    intake.source.resume_training()
    batches = []
    for step in range(intake.dispatcher.step, to_step):
        batches.append(intake.source.take(DEADLINE_S))
        intake.source.commit(step + 1, intake.publish(step + 1))
    return batches


def begin(intake: Intake) -> None:
    """Announce the first version, and let training begin when an actor serves it."""
    intake.publish(0)
    intake.source.wait_for_actor(1, DEADLINE_S)
    intake.source.resume_training()


def indices(batches: list[list[Group]]) -> list[int]:
    return [group.id.index for batch in batches for group in batch]


class ActorThread:
    """Context manager: an `ActorLoop` on a fake engine in a thread of its own."""

    def __init__(
        self, learner: str, name: str = "actor-0", engine: FakeEngine | None = None, lost_learner_s: float = 60.0
    ) -> None:
        self.engine = engine or FakeEngine()
        self.loop = ActorLoop(learner, name, lost_learner_s=lost_learner_s, engine=self.engine)
        self.reason = ""
        self.error: BaseException | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[str] | None = None
        self._running, self._thawed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name=name, daemon=True)

    async def _run(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(self.loop.run())
        self._running.set()
        try:
            self.reason = await self._task
        except BaseException as error:
            self.error = error

    def cancel(self) -> None:
        """As SIGTERM does: it leaves in good order."""
        assert self._asyncio is not None and self._task is not None
        with contextlib.suppress(RuntimeError):  # it has left by itself, and its loop is closed
            self._asyncio.call_soon_threadsafe(self._task.cancel)

    def die(self) -> None:
        """As SIGKILL does, seen from outside: nothing more is sent, no goodbye."""

        async def swallow(message: Message) -> None:
            pass

        self.loop.link.send = swallow  # type: ignore[method-assign]
        self.cancel()
        self.join()

    def freeze(self) -> None:
        """As SIGSTOP does: it is silent until `thaw`, and believes afterwards that no time has passed."""
        assert self._asyncio is not None
        still = threading.Event()

        def stand_still() -> None:
            still.set()
            self._thawed.wait(DEADLINE_S)

        self._thawed.clear()
        self._asyncio.call_soon_threadsafe(stand_still)
        assert still.wait(DEADLINE_S), f"{self.loop.name} does not stand still ({self.loop.phase})"

    def thaw(self) -> None:
        self._thawed.set()

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), f"{self.loop.name} does not end ({self.loop.phase})"

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> ActorThread:
        self._thread.start()
        assert self._running.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self.join()


class Puppet:
    """Context manager: an actor without a mind of its own on the work socket. It claims to serve version 1."""

    def __init__(self, endpoint: str, name: str = "actor-9", slots: int = 8, incarnation: str = "p1") -> None:
        self.endpoint, self.name, self.slots, self.incarnation = endpoint, name, slots, incarnation
        self.tickets: list[Ticket] = []
        self.received: list[Message] = []

    def __enter__(self) -> Puppet:
        self._context = zmq.Context()
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(0)

    def connect(self) -> None:
        self._sock = self._context.socket(zmq.DEALER)
        self._sock.setsockopt(zmq.IDENTITY, peer_id(self.name, self.incarnation))
        self._sock.connect(self.endpoint)

    def send(self, message: Message) -> None:
        self._sock.send_multipart(codec.encode(message))

    def hello(self, held: tuple[TicketId, ...] = (), unacked: tuple[TicketId, ...] = (), version: int = 1) -> None:
        self.send(Hello(self.name, self.incarnation, self.slots, held, unacked, version))

    def beat(self, held: tuple[TicketId, ...] = (), unacked: tuple[TicketId, ...] = (), version: int = 1) -> None:
        self.send(Heartbeat(held, unacked, self.slots - len(held), version, "serving", 0.0))

    def goodbye(self, error: str = "") -> None:
        self.send(Goodbye("puppet", error))

    def next(self, kind: type[Message], count: int = 1) -> list[Any]:
        """The next `count` messages of a kind; others are kept in `received`, tickets in `tickets`, too."""
        found: list[Message] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < count:
            assert self._sock.poll(max(0, int((deadline - time.monotonic()) * 1000))), f"no {kind.__name__} came"
            message = codec.decode_from_learner(self._sock.recv_multipart())
            self.received.append(message)
            if isinstance(message, Ticket):
                self.tickets.append(message)
            if isinstance(message, kind):
                found.append(message)
        return found

    def acknowledged(self, count: int) -> list[TicketId]:
        """The next ids that are acknowledged, `count` of them, in however many messages."""
        ids: list[TicketId] = []
        while len(ids) < count:
            ids += self.next(Ack)[0].ids
        return ids

    def rest(self) -> list[Message]:
        """All messages so far; the last ones are waited for a moment."""
        while self._sock.poll(200):
            self.received.append(codec.decode_from_learner(self._sock.recv_multipart()))
        return self.received

    def settle(self, held: tuple[TicketId, ...] = (), unacked: tuple[TicketId, ...] = ()) -> list[Message]:
        """Two heartbeats and all messages up to the second answer: by then the hub has settled the first."""
        before = len(self.received)
        self.beat(held, unacked)
        self.beat(held, unacked)
        self.next(Beat, 2)
        return self.received[before:]
