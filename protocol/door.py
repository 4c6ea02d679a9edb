"""The learner's door: who is let in to the hub's sockets, who is turned away, and how many may stand before it.

CURVE proves which key a peer has; the allow-list says which keys are welcome (ZAP, RFC 27, answered in the hub's own
thread). Socket monitors tell of those who never came as far as that: port scans, noise, peers without keys. They are
cut after `HANDSHAKE_MS`. Each takes a file descriptor until then; beyond a share of those that the process may have,
newcomers are sent away, so that the learner can always open its files. (To stop listening would end every connection:
libzmq's sessions belong to their listener.) Used by `hub.py` alone.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils import z85

from protocol import handshakes
from protocol.keys import AllowList, LearnerKeys

log = logging.getLogger(__name__)

ZAP_DOMAIN = b"tandem"
ZAP_VERSION = b"1.0"
REQUESTS_PER_TURN = 64
EVENTS_PER_TURN = 2_000
NAMED_AT_MOST = 64
"""Rejected peers that are kept by name; the others are counted together."""
SHARE_OF_FILES = 0.5
"""Of the file descriptors that the process may still open, those that connections may take. ZeroMQ's thread accepts
while the hub's is busy, so in a flood some more come in before they are sent away."""
PLENTY = 100_000

Fault = Callable[[str, object], None]


def connections_allowed() -> int:
    """Connections for which this process has file descriptors, with room for files of its own."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return PLENTY
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    return max(16, min(PLENTY, int((soft - in_use) * SHARE_OF_FILES)))


class Admission:
    """Says of every key whether it may come in. Its socket belongs into the hub's poller."""

    def __init__(self, context: zmq.Context[Any], keys: LearnerKeys, fault: Fault) -> None:
        self.rejected: Counter[str] = Counter()
        """"ADDRESS, key FIRST8…" -> how often."""
        self._keys, self._fault = keys, fault
        self._list = AllowList(keys.allowed)
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")  # where libzmq asks; before anything listens

    def guard(self, sock: zmq.Socket[bytes]) -> None:
        """Have a socket accept nobody without an allowed key. Before it is bound."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.own.secret.encode())
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own.public.encode())
        sock.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else libzmq lets everybody in where nobody answers

    def answer(self) -> None:
        """Answer who waits, but no more than a few at a time."""
        for _ in range(REQUESTS_PER_TURN):
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            name = self._name_of(request)
            status = (
                [b"200", b"OK", name.encode(errors="replace")]
                if name is not None
                else [b"400", b"key not allowed", b""]
            )
            self.socket.send_multipart([ZAP_VERSION, request[1], *status, b""], zmq.NOBLOCK)

    def _name_of(self, request: list[bytes]) -> str | None:
        """Under which name the peer is allowed; None, and counted, if it is not. `request`: as in RFC 27."""
        version, _, domain, address, _, mechanism, *credentials = request
        if (version, domain, mechanism) != (ZAP_VERSION, ZAP_DOMAIN, b"CURVE") or len(credentials) != 1:
            return None
        public = z85.encode(credentials[0]).decode()
        name = self._list.name_of(public)
        if name is None:
            who = f"{address.decode(errors='replace')}, key {public[:8]}…"
            self.rejected[who if who in self.rejected or len(self.rejected) < NAMED_AT_MOST else "others"] += 1
            self._fault("rejected", f"{who} is not on the allow-list")
        return name


@dataclass
class Connection:
    """One that was accepted, whoever it is."""

    address: str
    let_in_before: int
    """Handshakes that had succeeded at this listener when it came."""
    cut: bool = False
    """It was one too many."""


class Listener:
    """One listening socket: its connections, as the monitor tells of them."""

    def __init__(self, context: zmq.Context[Any], sock: zmq.Socket[bytes], fault: Fault) -> None:
        self.connections: dict[int, Connection] = {}
        """By file descriptor."""
        self.monitor: zmq.Socket[bytes] = handshakes.monitor(
            context, sock, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | handshakes.Knocking.EVENTS
        )
        self._sock, self._fault = sock, fault
        self._let_in = 0
        self._failure = ""

    def read(self, is_full: Callable[[], bool]) -> None:
        """Take in what the monitor says. While `is_full`, who comes is sent away."""
        for _ in range(EVENTS_PER_TURN):
            try:
                what, value = handshakes.outcome(self.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if what != "ended" and self._failure:  # libzmq leaves such a connection standing, and cuts it for silence
                self._count(self._failure, "an address not known")
                self._failure = ""
            if what == "accepted":
                full = is_full()
                self.connections[value] = Connection(self._meet(value, full), self._let_in, full)
            elif what == "let in":
                self._let_in += 1
            elif what == "ended":
                self._ended(self.connections.pop(value, None))
            else:
                self._failure = what  # of the connection whose end is the next event: one thread does it all

    def _ended(self, connection: Connection | None) -> None:
        """Count an end without a handshake. One that does not even speak ZeroMQ's greeting has no failure of its own:
        it is known by no handshake having succeeded since it came (so beside a peer that joins it may be missed)."""
        failure, self._failure = self._failure, ""
        if connection is None or connection.cut:
            return
        if not failure and self._let_in == connection.let_in_before:
            failure = "not ZeroMQ"
        if failure:
            self._count(failure, connection.address)

    def _count(self, failure: str, address: str) -> None:
        if failure != "not allowed":  # that one is counted, with its key, where it was refused
            self._fault(f"handshake failed ({failure})", f"peer at {address}")

    def _meet(self, descriptor: int, cut: bool) -> str:
        """Address of the peer of a new connection, which is ended if it is to be cut. The descriptor is libzmq's: it is
        looked at, never closed. It may have been closed meanwhile, and be another's: then it is let be."""
        try:
            connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
        except OSError:
            return "unknown"
        try:
            address = str(connection.getpeername()[0]).removeprefix("::ffff:")
            if cut and connection.getsockname()[1] == self._port():
                connection.shutdown(socket.SHUT_RDWR)
            return address
        except (OSError, IndexError):
            return "unknown"
        finally:
            connection.detach()

    def _port(self) -> int:
        return int(self._sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


class Door:
    """The hub's listeners and who may come through them."""

    def __init__(self, context: zmq.Context[Any], keys: LearnerKeys | None, fault: Fault) -> None:
        """Before the first socket is bound. Without `keys` everybody who speaks ZeroMQ is let in."""
        self._context, self._fault = context, fault
        self._admission = Admission(context, keys, fault) if keys else None
        self._listeners: list[Listener] = []
        self.allowed = connections_allowed()

    @property
    def rejected(self) -> dict[str, int]:
        """Peers whose key was not allowed, by address and the key's first characters: how often each came."""
        return dict(self._admission.rejected) if self._admission else {}

    def guard(self, sock: zmq.Socket[bytes]) -> None:
        """Put a socket behind the door, before it is bound."""
        sock.setsockopt(zmq.HANDSHAKE_IVL, handshakes.HANDSHAKE_MS)
        if self._admission:
            self._admission.guard(sock)
        self._listeners.append(Listener(self._context, sock, self._fault))

    def sources(self) -> list[zmq.Socket[bytes]]:
        """What belongs into the hub's poller."""
        sockets = [listener.monitor for listener in self._listeners]
        return [*sockets, self._admission.socket] if self._admission else sockets

    def turn(self, ready: Mapping[Any, int]) -> None:
        """Answer who knocks, take in who came and went, and do not let too many in."""
        if self._admission and self._admission.socket in ready:
            self._admission.answer()
        for listener in self._listeners:
            if listener.monitor in ready:
                listener.read(self._is_full)

    def _is_full(self) -> bool:
        """Whether connections take all the file descriptors that are theirs. Those that are no actor's are gone within
        `HANDSHAKE_MS`; until then nobody else comes in."""
        count = sum(len(listener.connections) for listener in self._listeners)
        if count < self.allowed:
            return False
        self._fault("too many connections", f"{count}, allowed {self.allowed}")
        return True
