"""What a history of joins, drains, deaths and zombies needs beside the real loop: an engine that can be stopped, an
honest puppet, and a watch on the hub that notes what no actor may be sent.

Used by `tests/learner/intake/test_histories.py`. Not a test itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from types import TracebackType
from typing import Any

from actor.fake_engine import FakeEngine
from actor.rewards import Scores
from protocol import codec
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Drain,
    Group,
    Heartbeat,
    Hello,
    Message,
    Rehello,
    Sampling,
    Ticket,
    TicketId,
    Welcome,
)
from protocol.scaling import actor_number
from tests.actor_harness import ActorThread, Puppet, until
from tests.intake_harness import Intake, group_of


class GraderInProcess:
    """In place of `actor.grading.GraderPool`, whose process takes longer to start than all else of an actor."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    async def __aenter__(self) -> GraderInProcess:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        pass

    async def grade_group(self, grader: str, responses: list[str], answer: str) -> list[tuple[Scores, str]]:
        return [({"reward": 1.0}, "")] * len(responses)


class HeldEngine(FakeEngine):
    """Begins no completion while it is `held`: its actor keeps the tickets that it has."""

    def __init__(self, held: bool = False) -> None:
        super().__init__()
        self.held = held

    async def generate(
        self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, cache_salt: str
    ) -> Any:
        while self.held:  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.005)
        return await super().generate(request_id, prompt_ids, sampling, seed, cache_salt)


class Actor(ActorThread):
    """A whole actor on a `HeldEngine`."""

    engine: HeldEngine

    def __init__(self, learner: str, name: str, held: bool) -> None:
        super().__init__(learner, name, HeldEngine(held))
        self.sent_home = self.buried = False
        """What the history has done to it."""

    @property
    def name(self) -> str:
        return self.loop.name

    @property
    def incarnation(self) -> str:
        return self.loop.incarnation


class HonestPuppet(Puppet):
    """Keeps what it is given until it is told to answer, and always lists it. It has more room than a whole actor of
    these tests, so that it is given tickets first."""

    def __init__(self, endpoint: str, name: str, incarnation: str) -> None:
        super().__init__(endpoint, name, slots=8, incarnation=incarnation)
        self.open: dict[TicketId, Ticket] = {}
        self.unacked: dict[TicketId, Group] = {}
        self.answered: list[Group] = []
        self.claim = 0
        self.buried = False

    def read(self, wait_s: float = 0.0) -> Message | None:
        """Next message, if there is one."""
        if not self._sock.poll(int(wait_s * 1000)):
            return None
        message = codec.decode_from_learner(self._sock.recv_multipart())
        if isinstance(message, Ticket):
            self.open[message.id] = message
        elif isinstance(message, (Ack, Cancel)):
            for ticket_id in message.ids:
                self.unacked.pop(ticket_id, None)
                self.open.pop(ticket_id, None)
        return message

    def ask(self, message: Message, *answers: type[Message]) -> Message:
        """Send a message and read up to the first answer of one of these kinds."""
        self.send(message)

        def answered() -> Message | None:
            found = self.read(0.1)
            return found if isinstance(found, answers) else None

        found: Message = until(answered, f"{answers} for {self.name}")
        return found

    def introduce(self) -> None:
        """Say hello until the learner, which may be starting, answers."""

        def welcomed() -> bool:
            self.hello(tuple(self.open), tuple(self.unacked), self.claim)
            while (message := self.read(0.2)) is not None:
                if isinstance(message, Welcome):
                    return True
            return False

        until(welcomed, f"a welcome for {self.name}")

    def confirm(self, version: int) -> None:
        """A heartbeat with all that it holds. No two in a row can miss a ticket: what came before an answer is read."""
        self.claim = version
        while self.read():
            pass
        answer = self.ask(self.state(), Beat, Rehello)
        assert isinstance(answer, Beat), f"{self.name} takes part, and was not known"

    def state(self) -> Heartbeat:
        return Heartbeat(tuple(self.open), tuple(self.unacked), 0, self.claim, "serving", 0.0)

    def answer(self, ids: Collection[TicketId]) -> None:
        """Send groups for those of these tickets that it holds, and wait until they are acknowledged."""
        for ticket_id in [ticket_id for ticket_id in self.open if ticket_id in ids]:
            group = group_of(self.open.pop(ticket_id), self.name, max(1, self.claim))
            self.answered.append(group)
            self.unacked[ticket_id] = group
            self.send(group)
        until(self._acknowledged, f"{self.name}'s acknowledgements")

    def _acknowledged(self) -> bool:
        if self.unacked:
            self.read(0.1)
        return not self.unacked


class Watch:
    """What the hub sends and hears over a whole history, restarts of the learner included."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        """What should not have happened, in words."""
        self.issued: list[TicketId] = []
        """Train tickets in the order in which they were first sent to anybody."""
        self.beats: Counter[str] = Counter()
        """Incarnation -> heartbeats heard."""
        self.welcomed: set[str] = set()
        """Incarnations that this learner has let in."""
        self.engines: dict[str, HeldEngine] = {}
        self._sent_home: set[str] = set()
        self._claims: dict[str, int] = {}
        """Incarnation -> version that it has confirmed."""
        self._current: dict[str, str] = {}
        """Name -> the incarnation that was welcomed last."""
        self._replaced: set[str] = set()

    def attach(self, intake: Intake) -> None:
        """Watch a learner that has not begun. It knows nobody, and nobody whom an earlier one has replaced."""
        self.welcomed, self._current, self._replaced = set(), {}, set()
        send, receive = intake.hub.send, intake.server._receive

        def sent(peer: bytes, message: Message) -> bool:
            name, incarnation, _ = peer.decode().rsplit(".", 2)
            delivered = send(peer, message)
            if isinstance(message, Welcome):
                self._welcome(name, incarnation)
            elif isinstance(message, Drain):
                self._sent_home.add(incarnation)
            elif isinstance(message, Ticket):
                self._ticket(intake, name, incarnation, message, delivered)
            return delivered

        def heard(peer: bytes, message: Message, now: float) -> None:
            incarnation = peer.decode().rsplit(".", 2)[1]
            if isinstance(message, (Hello, Heartbeat)):
                self._claims[incarnation] = message.version
            receive(peer, message, now)
            self.beats[incarnation] += isinstance(message, Heartbeat)

        intake.hub.send = sent  # type: ignore[method-assign]
        intake.server._receive = heard  # type: ignore[method-assign]

    def _welcome(self, name: str, incarnation: str) -> None:
        if incarnation in self._replaced:
            self.faults.append(f"{name}: incarnation {incarnation}, which was replaced, is let in again")
        if (before := self._current.get(name, incarnation)) != incarnation:
            self._replaced.add(before)
        self._current[name] = incarnation
        self.welcomed.add(incarnation)

    def _ticket(self, intake: Intake, name: str, incarnation: str, ticket: Ticket, delivered: bool) -> None:
        claimed, wanted, number = self._claims.get(incarnation, 0), intake.server.scale.wanted, actor_number(name)
        engine = self.engines.get(incarnation)
        wrong = {
            f"confirmed version {claimed}, {ticket.min_version} is asked for": not 0 < ticket.min_version <= claimed,
            "its engine serves nothing that is fit": engine and engine.version < ticket.min_version,
            "it was sent home": incarnation in self._sent_home,
            "it is surplus": None not in (wanted, number) and number >= wanted,  # type: ignore[operator]
            "another one has its name": self._current.get(name) != incarnation,
        }
        if not delivered:
            return
        self.faults += [f"{name} is sent {ticket.id}, but {why}" for why, true in wrong.items() if true]
        if ticket.kind == "train" and ticket.id not in self.issued:
            self.issued.append(ticket.id)
