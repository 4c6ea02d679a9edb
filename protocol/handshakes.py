"""What ZeroMQ's socket monitors tell of connections that come about or fail, for both sides.

The hub counts with it who was turned away (`door.py`). A link (`link.py`) uses `Knocking`: a connection that the
learner has refused does not come back by itself, so it is made anew, in pauses that grow, until it is let in.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Callable
from typing import Any, Literal

import zmq

log = logging.getLogger(__name__)

HANDSHAKE_MS = 5_000
"""A connection that has not shown by then who it is, is cut."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 10.0
CLOSED_IN_A_ROW = 3
"""Handshakes that the other side broke off without a word, after which the log says so. One may be a restart."""

Outcome = Literal["accepted", "ended", "let in", "not allowed", "no keys", "other keys", "silent or closed", "protocol"]

FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_EVENTS: dict[int, Outcome] = {
    zmq.EVENT_ACCEPTED: "accepted",
    zmq.EVENT_DISCONNECTED: "ended",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "let in",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "silent or closed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "not allowed",
}
_PROTOCOL_ERRORS: dict[int, Outcome] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "no keys",
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "other keys",
}
_numbers = itertools.count()


def monitor(context: zmq.Context[Any], sock: Any, events: int) -> Any:
    """A socket that tells what becomes of another one's connections.

    Without a limit: at one, ZeroMQ's own thread would wait for whoever reads this."""
    address = f"inproc://monitor-{next(_numbers)}"
    sock.monitor(address, events)
    pair = context.socket(zmq.PAIR)
    pair.setsockopt(zmq.LINGER, 0)
    pair.setsockopt(zmq.RCVHWM, 0)
    pair.connect(address)
    return pair


def outcome(frames: list[bytes]) -> tuple[Outcome, int]:
    """What an event says, and the connection's file descriptor where one has come or gone."""
    event, value = struct.unpack("=HI", frames[0])
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return _PROTOCOL_ERRORS.get(value, "protocol"), value
    return _EVENTS[event], value


class Knocking:
    """Keeps the connections of a link coming back after a refusal, and says what stands in the way."""

    EVENTS = FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED

    def __init__(self, public: Callable[[], str]) -> None:
        """`public()`: the public key that the link shows; "" if it has none."""
        self._public = public
        self._problems: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def problem(self) -> str:
        """Why the learner does not let this link in; "" if it does, or if nobody is there."""
        return next(iter(self._problems.values()), "")

    def start(
        self, name: str, events: Any, connection: Callable[[], tuple[str, int]], again: Callable[[], None]
    ) -> None:
        """Watch one socket through its monitor. `connection()`: where it leads now, and how often it was connected;
        `again()` connects it anew."""
        watching = self._watch(name, events, connection, again)
        self._tasks.append(asyncio.get_running_loop().create_task(watching, name=f"knocking-{name}"))

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _watch(
        self, name: str, events: Any, connection: Callable[[], tuple[str, int]], again: Callable[[], None]
    ) -> None:
        pause, broken_off = FIRST_PAUSE_S, 0
        while True:
            what, _ = outcome(await events.recv_multipart())
            where, number = connection()
            if what == "let in":
                pause, broken_off = FIRST_PAUSE_S, 0
                if self._problems.pop(name, ""):
                    log.info("the learner at %s lets this actor in (%s)", where, name)
            elif what == "silent or closed":  # ZeroMQ tries that again itself
                broken_off += 1
                if broken_off >= CLOSED_IN_A_ROW and name not in self._problems:  # a reason that is known is better
                    self._say(name, self._reason(what, where))
            else:
                self._say(name, self._reason(what, where))
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                if connection()[1] == number:  # else it was led elsewhere meanwhile
                    again()

    def _say(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            known = problem in self._problems.values()
            self._problems[name] = problem
            if not known:  # three sockets have one key
                log.error("%s", problem)

    def _reason(self, what: Outcome, where: str) -> str:
        public = self._public()
        if what == "not allowed":
            return (
                f"the learner at {where} does not accept this actor's key: put its public key {public} into"
                " RUN/keys/allowed/NAME.pub there"
            )
        if what == "no keys" and not public:
            return f"the learner at {where} wants keys, this actor has none: give it a key file, RUN/keys/actor.json"
        if what == "no keys":
            return f"the learner at {where} uses no keys, this actor does: one of the two is not meant to"
        if public:
            return (
                f"whoever listens at {where} breaks off the handshake ({what}): it is not the learner whose public key"
                " is in this actor's key file, or it knows nothing of keys"
            )
        return f"whoever listens at {where} breaks off the handshake ({what}): it wants keys, or is no learner"
