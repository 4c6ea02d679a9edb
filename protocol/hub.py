"""The learner's three sockets. It moves messages and knows nothing of their meaning.

Used by one thread (`learner/intake/server.py`); it never blocks: a peer whose pipe is full is counted, not waited for.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Generator, Iterator

import zmq
import zmq.asyncio

from protocol import codec
from protocol.addresses import bind_address, check_host, check_loopback
from protocol.door import Door
from protocol.errors import OversizedFrame, UnknownVersion, WireError
from protocol.keys import LearnerKeys
from protocol.messages import (
    PROTOCOL_VERSION,
    Chunk,
    ChunkRequest,
    Delta,
    Form,
    Gone,
    Message,
    Refused,
    Update,
    UpdateRequest,
)  # fmt: skip
from protocol.shelf import Shelf
from protocol.sockets import HARD_LIMIT_FACTOR, LINGER_MS, FaultCounter, new_socket
from protocol.weights import Snapshot

log = logging.getLogger(__name__)

REQUEST_BYTES = 1 << 20
"""Largest frame that ZeroMQ takes in on the bulk and news sockets, where only requests and subscriptions come in."""
BACKLOG = 1024
"""Connections that wait for the hub to accept them: many actors, and a stranger's flood before them."""


class Hub:
    """The learner's three sockets. Single-threaded but for `wake`, which any thread may call."""

    def __init__(
        self,
        host: str,
        port: int,
        limits: codec.Limits = codec.DEFAULT_LIMITS,
        keys: LearnerKeys | None = None,
        *,
        trusted: bool = False,
        consecutive: bool = False,
    ) -> None:
        """Bind the sockets to a numeric address. `trusted`: without keys all the same, on any. `consecutive`: bulk and
        news on the ports after the work socket's, else on free ones.

        Raises ValueError for an address that may not be bound so, OSError for one that cannot, or a port in use."""
        check_host(host)
        if keys is None and not trusted:
            check_loopback(host)
        host = bind_address(host)
        self.limits = limits
        self.faults = FaultCounter()
        self.turned_away = FaultCounter("turned away a connection")
        self.keys = keys
        self.shelf = Shelf()
        self.bytes_sent = 0
        """Of weights: chunks, and the deltas inside news times those who listen."""
        self.emptied_at = time.monotonic()
        """When all that had come over the work socket had last been taken in: no message has waited since before."""
        self.frames: list[bytes] = []
        """Those of the message that `poll` gave last, as they came."""
        self._subscribers = 0
        self._context = zmq.Context()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._door = Door(self._context, keys, self.turned_away)
        ports = [port, port + 1, port + 2] if consecutive else [port, 0, 0]
        try:
            self._work = self._bind(zmq.ROUTER, host, ports[0])
            self._bulk = self._bind(zmq.ROUTER, host, ports[1], REQUEST_BYTES)
            self._news = self._bind(zmq.XPUB, host, ports[2], REQUEST_BYTES)
        except BaseException:
            self.close()
            raise
        self.work_endpoint, self.bulk_endpoint, self.news_endpoint = (
            sock.getsockopt_string(zmq.LAST_ENDPOINT) for sock in (self._work, self._bulk, self._news)
        )
        self._poller = zmq.Poller()
        for source in (self._work, self._bulk, self._news, self._wake_out, *self._door.sources()):
            self._poller.register(source, zmq.POLLIN)

    @property
    def rejected(self) -> dict[str, int]:
        """Peers whose key was not allowed, by address and the key's first characters: how often each came."""
        return self._door.rejected

    def _bind(self, kind: int, host: str, port: int, at_most: int = 0) -> zmq.Socket[bytes]:
        """`at_most`: bytes beyond which ZeroMQ cuts the connection, if that is less than for any frame."""
        sock: zmq.Socket[bytes] = new_socket(self._context, kind, self.limits)
        sock.setsockopt(zmq.BACKLOG, BACKLOG)
        if at_most:
            sock.setsockopt(zmq.MAXMSGSIZE, min(at_most, self.limits.max_frame_bytes * HARD_LIMIT_FACTOR))
        self._door.guard(sock)
        if kind == zmq.ROUTER:
            sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if kind == zmq.XPUB:
            sock.setsockopt(zmq.XPUB_VERBOSER, 1)  # says who comes and goes, for the count of bytes
        address = f"[{host}]" if ":" in host else host
        if ":" in host:
            sock.setsockopt(zmq.IPV6, 1)
        try:
            sock.bind(f"tcp://{address}:{port or '*'}")
        except zmq.ZMQError as error:
            sock.close(0)
            if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise OSError(
                    error.errno,
                    f"wire.host: found {host}, which is no address of this machine; allowed: one of its own",
                ) from None
            raise OSError(
                error.errno,
                f"wire.port: found {port} on {host}, which cannot be bound ({error}); allowed: a free one, or 0",
            ) from None
        return sock

    def poll(self, timeout_s: float) -> Iterator[tuple[bytes, Message]]:
        """Messages of actors on the work socket, with their peer. Serves bulk requests on the way.

        Waits at most `timeout_s` for anything to arrive; `wake` cuts the wait short.
        """
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        self._door.turn(ready)
        if self._wake_out.fileno() in ready:
            self._drain_wakeups()
        if self._news in ready:
            # somebody subscribed or left: news is a hint, so nothing is owed
            self._subscribers += {b"\x01": 1, b"\x00": -1}.get(self._news.recv(), 0)
        if self._bulk in ready:
            self._serve_bulk()
        emptied = True
        if self._work in ready:
            emptied = yield from self._receive(self._work)
        if emptied:
            self.emptied_at = time.monotonic()

    def _receive(self, sock: zmq.Socket[bytes], at_most: int = 256) -> Generator[tuple[bytes, Message], None, bool]:
        """Messages that have come; returns whether these are all."""
        for _ in range(at_most):
            try:
                peer, *self.frames = _take(sock)
            except zmq.Again:
                return True
            try:
                yield peer, codec.decode_from_actor(self.frames, self.limits)
            except UnknownVersion as error:
                self.faults("unknown version", error)
                self._send(sock, peer, Refused(f"{error}; this learner speaks {PROTOCOL_VERSION}"))
            except OversizedFrame as error:
                self.faults("oversized", error)
            except WireError as error:
                self.faults("malformed", error)
        return False

    def send(self, peer: bytes, message: Message) -> bool:
        """Queue a message for a peer. False, and counted, if the peer is gone or its pipe is full; never blocks."""
        return self._send(self._work, peer, message)

    def _send(self, sock: zmq.Socket[bytes], peer: bytes, message: Message) -> bool:
        try:
            copy = not isinstance(message, (Chunk, Update))
            sock.send_multipart([peer, *codec.encode(message)], zmq.NOBLOCK, copy=copy)
        except zmq.Again:
            self.faults("pipe full", peer)
            return False
        except zmq.ZMQError as error:
            self.faults("unroutable", f"{peer!r}: {error}")
            return False
        return True

    def announce(self, snapshot: Snapshot, delta: tuple[Delta, bytes] | None = None) -> None:
        """Make a version available to pull and tell every subscriber. `delta` leads to it from the version before."""
        self.shelf.put(snapshot, delta)
        news = self.shelf.news()
        self._news.send_multipart(codec.encode(news), zmq.NOBLOCK, copy=False)
        self.bytes_sent += len(news.payload) * self._subscribers

    def _serve_bulk(self) -> None:
        for peer, request in self._receive(self._bulk):
            if isinstance(request, UpdateRequest) and (update := self.shelf.answer(request)) is not None:
                self._send_weights(peer, update, len(update.payload))
            elif isinstance(request, ChunkRequest) and (data := self._chunk(request)) is not None:
                chunk = Chunk(request.version, request.offset, request.form, data)  # type: ignore[arg-type]  # no copy
                self._send_weights(peer, chunk, len(data))
            else:
                form: Form = request.form if isinstance(request, ChunkRequest) else "snapshot"
                self._send(self._bulk, peer, Gone(getattr(request, "version", 0), self.shelf.version, form))

    def _send_weights(self, peer: bytes, message: Message, nbytes: int) -> None:
        self.bytes_sent += nbytes if self._send(self._bulk, peer, message) else 0

    def _chunk(self, request: ChunkRequest) -> memoryview | None:
        return None if request.length > self.limits.max_frame_bytes else self.shelf.chunk(request)

    def wake(self) -> None:
        """End the current `poll` early. Safe from any thread."""
        with contextlib.suppress(OSError):  # enough wake-ups are pending, or the hub is closed already
            self._wake_in.send(b"x")

    def _drain_wakeups(self) -> None:
        try:
            while self._wake_out.recv(1024):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close sockets; what is already queued is sent for at most LINGER_MS."""
        self._context.destroy(LINGER_MS)
        self._wake_in.close()
        self._wake_out.close()


def _take(sock: zmq.Socket[bytes]) -> list[bytes]:
    """The frames of the next message, as `recv_multipart` gives them in a third more time. Raises zmq.Again."""
    frames = []
    while True:
        frame = sock.recv(zmq.NOBLOCK, copy=False)
        frames.append(frame.bytes)
        if not frame.more:
            return frames
