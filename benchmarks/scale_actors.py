"""Simulated actors for `benchmarks/scale.py`: the real link and protocol, no engine, many of them in one process.

An actor says hello, subscribes to news, confirms a version the moment it hears of it, sends heartbeats with its
absolute state, and answers tickets with whole groups that it remembers until they are acknowledged. What it does not do
is generate: groups are prepared before (`scale_groups.py`). All actors of a process share one loop around one epoll: a
task for each, or ZeroMQ's poll over all of them, would cost several times as much.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
import zmq

from benchmarks.scale_groups import POOL, Prepared, make_groups
from protocol import codec
from protocol.keys import load_actor_keys
from protocol.link import Link
from protocol.messages import (
    Ack,
    Beat,
    Cancel,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Refused,
    Rehello,
    Ticket,
    TicketId,
    Update,
    Welcome,
)  # fmt: skip

Mode = Literal["paced", "saturating"]

TURN_S = 0.02
"""Longest wait of the loop, for what is no socket's."""


@dataclass
class Tally:
    """What the actors of a process saw since they were last asked."""

    acknowledged: int = 0
    tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    """From a group's sending to its acknowledgement's arrival."""


@dataclass
class Simulated:
    """One actor."""

    name: str
    link: Link
    work: zmq.Socket[bytes]
    descriptor: int
    """Of `work`."""
    packed_name: bytes
    version: int = 0
    welcomed: bool = False
    engine_free_at: float = 0.0
    held: dict[TicketId, Ticket] = field(default_factory=dict)
    unacked: dict[TicketId, tuple[float, int]] = field(default_factory=dict)
    """Id -> (when it was sent, its tokens)."""


class Swarm:
    """The simulated actors of one process. Everything runs in the thread that calls `run`."""

    def __init__(
        self, names: list[str], endpoint: str, keys: Path | None, slots: int, tokens_per_s: float, heartbeat_s: float
    ) -> None:
        """`tokens_per_s`: pace of each actor's engine in the mode "paced"; "saturating" answers at once."""
        self.mode: Mode = "paced"
        self.tally = Tally()
        self._names, self._endpoint, self._keys = names, endpoint, keys
        self._slots, self._tokens_per_s, self._heartbeat_s = slots, tokens_per_s, heartbeat_s
        self._actors: list[Simulated] = []
        self._groups = make_groups()
        self._prepared: dict[int, list[Prepared]] = {}
        self._draw = random.Random(names[0])
        self._due: list[tuple[float, int, Simulated, Ticket]] = []
        """Heap of groups that engines are at: when each will be complete."""
        self._beats: list[tuple[float, int]] = []
        """Heap of heartbeats: when the next one of which actor is due."""
        self._order = 0
        self._sockets: dict[int, tuple[Simulated, zmq.Socket[bytes]]] = {}
        """By the descriptor that says that something has come (ZMQ_FD)."""
        self._used: set[int] = set()
        """Those that were used otherwise, which may have taken that word in: looked at in any case."""
        self._stopped = False

    @property
    def serving(self) -> int:
        """Actors that have said which version they serve."""
        return sum(actor.version > 0 for actor in self._actors)

    def stop(self) -> None:
        self._stopped = True

    def saturate(self) -> None:
        """From now on answer every ticket at once; those that engines are at, too."""
        self.mode = "saturating"
        due, self._due = self._due, []
        for _, _, actor, ticket in due:
            self._answer(actor, ticket)

    def run(self, turn: Callable[[Swarm], None]) -> None:
        """Act until `stop`; `turn` is called now and then, at least every TURN_S where there is nothing to do."""
        asyncio.run(self._run(turn))

    async def _run(self, turn: Callable[[Swarm], None]) -> None:
        turned = 0.0
        try:
            self._connect()
            with select.epoll() as poller:
                for descriptor in self._sockets:
                    poller.register(descriptor, select.EPOLLIN)
                while not self._stopped:
                    used, self._used = self._used, set()
                    used.update(descriptor for descriptor, _ in poller.poll(0 if used else self._pause()))
                    for descriptor in used:
                        self._drain(*self._sockets[descriptor])
                    now = time.perf_counter()
                    self._do_what_is_due(now)
                    if now - turned > TURN_S:
                        turned = now
                        turn(self)
                        await asyncio.sleep(0)  # the links' own tasks
        finally:
            for actor in self._actors:
                self._send(actor, Goodbye("the benchmark ends"))
                actor.link.close()

    def _connect(self) -> None:
        keys = load_actor_keys(self._keys) if self._keys else None
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        for name in self._names:
            link = Link(self._endpoint, name, "i", keys=keys)
            work, news = (zmq.Socket.shadow(sock.underlying) for sock in (link._work, link._news))
            actor = Simulated(name, link, work, work.FD, msgspec.msgpack.encode(name))
            for sock in (work, news):
                loop.remove_reader(sock.FD)  # it would take the word in before this loop hears it
                self._sockets[sock.FD] = actor, sock
            self._beats.append((now + self._heartbeat_s * self._draw.random(), len(self._actors)))
            self._actors.append(actor)
            self._send(actor, Hello(name, "i", self._slots))
        heapq.heapify(self._beats)

    def _do_what_is_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, actor, ticket = heapq.heappop(self._due)
            self._answer(actor, ticket)
        while (beat := self._beats[0])[0] <= now:
            self._beat(self._actors[beat[1]])
            heapq.heapreplace(self._beats, (beat[0] + self._heartbeat_s, beat[1]))

    def _pause(self) -> float:
        """Seconds until something is due."""
        next_at = min([heap[0][0] for heap in (self._beats, self._due) if heap])
        return min(max(0.0, next_at - time.perf_counter()), TURN_S)

    def _drain(self, actor: Simulated, sock: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(actor, codec.decode_from_learner(frames))

    def _receive(self, actor: Simulated, message: Message) -> None:
        if isinstance(message, Ticket):
            self._begin(actor, message)
        elif isinstance(message, Ack):
            now = time.perf_counter()
            for ticket_id in message.ids:
                if sent := actor.unacked.pop(ticket_id, None):
                    self.tally.acknowledged += 1
                    self.tally.tokens += sent[1]
                    self.tally.latencies_s.append(now - sent[0])
        elif isinstance(message, Update):
            self._serve(actor, message.manifest.version)
        elif isinstance(message, Beat):
            self._serve(actor, message.version)
        elif isinstance(message, Welcome):
            if not actor.welcomed:
                actor.welcomed = True
                actor.link.open_weights(message.bulk, message.news)
                self._used |= self._sockets.keys()
                self._beat(actor)
        elif isinstance(message, Rehello):
            self._send(actor, Hello(actor.name, "i", self._slots, tuple(actor.held), tuple(actor.unacked)))
        elif isinstance(message, Cancel):
            for ticket_id in message.ids:
                actor.held.pop(ticket_id, None)
        elif isinstance(message, (Refused, Drain)):
            raise RuntimeError(f"{actor.name}: {message}")

    def _serve(self, actor: Simulated, version: int) -> None:
        """Serve a version at once, and say so."""
        if version > actor.version:
            actor.version = version
            self._beat(actor)

    def _begin(self, actor: Simulated, ticket: Ticket) -> None:
        assert ticket.min_version <= actor.version, "a ticket for weights that this actor does not serve"
        actor.held[ticket.id] = ticket
        if self.mode == "saturating":
            self._answer(actor, ticket)
            return
        tokens = self._choose(ticket, actor.version).num_tokens
        actor.engine_free_at = max(actor.engine_free_at, time.perf_counter()) + tokens / self._tokens_per_s
        self._order += 1
        heapq.heappush(self._due, (actor.engine_free_at, self._order, actor, ticket))

    def _choose(self, ticket: Ticket, version: int) -> Prepared:
        """The group for a ticket: always of the same length, of whatever version."""
        if version not in self._prepared:
            self._prepared = {version: [Prepared(group, version) for group in self._groups]}
        return self._prepared[version][ticket.id.index % POOL]

    def _answer(self, actor: Simulated, ticket: Ticket) -> None:
        if actor.held.pop(ticket.id, None) is None:
            return  # cancelled
        prepared = self._choose(ticket, actor.version)
        actor.unacked[ticket.id] = time.perf_counter(), prepared.num_tokens
        self._put(actor, prepared.frames(ticket.id, actor.packed_name))

    def _beat(self, actor: Simulated) -> None:
        if not actor.welcomed:
            return
        held, unacked = tuple(actor.held), tuple(actor.unacked)
        free = max(0, self._slots - len(held) - len(unacked))
        self._send(actor, Heartbeat(held, unacked, free, actor.version, "serving", 1.0))

    def _send(self, actor: Simulated, message: Message) -> None:
        self._put(actor, codec.encode(message))

    def _put(self, actor: Simulated, frames: list[codec.Frame]) -> None:
        actor.work.send_multipart(frames, zmq.NOBLOCK)
        self._used.add(actor.descriptor)


def act(arguments: tuple[Any, ...], cpu: int | None, pipe: Any) -> None:
    """The process of a swarm: does what the pipe says, "collect" is answered with the tally, memory and CPU seconds."""
    import os

    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    swarm = Swarm(*arguments)

    def turn(swarm: Swarm) -> None:
        while pipe.poll():
            what = pipe.recv()
            if what == "collect":
                tally, swarm.tally = swarm.tally, Tally()
                times = os.times()
                rss = psutil.Process().memory_info().rss
                pipe.send((swarm.serving, msgspec.to_builtins(tally), rss, times.user + times.system))
            elif what == "end":
                swarm.stop()
            elif what == "saturating":
                swarm.saturate()

    swarm.run(turn)
