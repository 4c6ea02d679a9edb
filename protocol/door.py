"""The learner's door: who is let in to the hub's sockets, who is turned away, and how many may stand before it.

CURVE proves which key a peer has; the allow-list says which keys are welcome (ZAP, RFC 27, answered in the hub's own
thread). Socket monitors tell of those who never came as far as that: port scans, noise, peers without keys. They are
cut after `HANDSHAKE_MS`. Each takes a file descriptor until then; beyond a share of those that the process may have,
the hub stops listening for a moment, so that the learner can always open its files. Used by `sockets.Hub` alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Mapping
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
SHARE_OF_FILES = 0.75
"""Of the file descriptors that the process may still open, those that connections may take."""
LISTEN_AGAIN = 0.75
"""Share of the connections that are allowed below which a hub that had enough listens again."""
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


class Listener:
    """One listening socket: its connections, as the monitor tells of them."""

    def __init__(self, context: zmq.Context[Any], sock: zmq.Socket[bytes], fault: Fault) -> None:
        self.connections: dict[int, tuple[str, int]] = {}
        """File descriptor -> (the peer's address, handshakes that had succeeded when it came)."""
        self.monitor: zmq.Socket[bytes] = handshakes.monitor(
            context, sock, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | handshakes.Knocking.EVENTS
        )
        self._sock, self._fault = sock, fault
        self._endpoint = ""
        self._let_in = 0
        self._failure = ""

    def open(self) -> bool:
        """Listen again where it listened before. False if the address is still taken."""
        try:
            self._sock.bind(self._endpoint)
        except zmq.ZMQError:
            return False
        return True

    def shut(self) -> None:
        """Stop listening; connections stay."""
        self._endpoint = self._sock.getsockopt_string(zmq.LAST_ENDPOINT)
        with contextlib.suppress(zmq.ZMQError):
            self._sock.unbind(self._endpoint)

    def read(self) -> None:
        """Take in what the monitor says."""
        for _ in range(EVENTS_PER_TURN):
            try:
                what, value = handshakes.outcome(self.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if what == "accepted":
                self.connections[value] = (_address_of(value), self._let_in)
            elif what == "let in":
                self._let_in += 1
            elif what == "ended":
                self._ended(*self.connections.pop(value, ("unknown", -1)))
            else:
                self._failure = what  # of the connection whose end is the next event: one thread does it all

    def _ended(self, address: str, let_in_before: int) -> None:
        """Count an end without a handshake. One that does not even speak ZeroMQ's greeting has no failure of its own:
        it is known by no handshake having succeeded since it came (so beside a peer that joins it may be missed)."""
        failure, self._failure = self._failure, ""
        if not failure and self._let_in == let_in_before:
            failure = "not ZeroMQ"
        if failure and failure != "not allowed":  # that one is counted, with its key, where it was refused
            self._fault(f"handshake failed ({failure})", f"peer at {address}")


class Door:
    """The hub's listeners and who may come through them."""

    def __init__(self, context: zmq.Context[Any], keys: LearnerKeys | None, fault: Fault) -> None:
        """Before the first socket is bound. Without `keys` everybody who speaks ZeroMQ is let in."""
        self._context, self._fault = context, fault
        self._admission = Admission(context, keys, fault) if keys else None
        self._listeners: list[Listener] = []
        self._allowed = connections_allowed()
        self._shut: list[Listener] = []

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
                listener.read()
        self._bound()

    def _bound(self) -> None:
        count = sum(len(listener.connections) for listener in self._listeners)
        if not self._shut and count >= self._allowed:
            self._fault("too many connections", f"{count}, allowed {self._allowed}: no more until some are gone")
            self._shut = list(self._listeners)
            for listener in self._shut:
                listener.shut()
        elif self._shut and count <= self._allowed * LISTEN_AGAIN:
            self._shut = [listener for listener in self._shut if not listener.open()]
            if not self._shut:
                log.info("the hub listens again, %d connections are left", count)


def _address_of(descriptor: int) -> str:
    """Address of the peer behind a connection of libzmq's. It may be gone already, and its number another's."""
    try:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    except OSError:
        return "unknown"
    try:
        return str(connection.getpeername()[0]).removeprefix("::ffff:")
    except (OSError, IndexError):
        return "unknown"
    finally:
        connection.detach()  # it is libzmq's to close
