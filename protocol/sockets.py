"""The learner's hub and the actor's link, the sockets between. They move messages and know nothing of their meaning.

The hub is used by one thread (`learner/intake/server.py`) and never blocks: a peer whose pipe is full is counted, not
waited for. The link lives in an actor's asyncio loop (`actor/loop.py`). Weight chunks have sockets of their own, so
that gigabytes never stand in front of a heartbeat; they are pulled through a window, so that nothing piles up.

With keys (`keys.py`) every connection is CURVE: encrypted, the learner proven to the actor and the actor to the learner
(`door.py`). Without, sockets are bound to loopback only, unless the recipe says that the network is trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import zmq
import zmq.asyncio

from protocol import codec
from protocol.addresses import bind_address, check_host, check_loopback
from protocol.door import Door
from protocol.errors import DeadlineExceeded, OversizedFrame, UnknownVersion, WeightsError, WireError
from protocol.handshakes import HANDSHAKE_MS, Knocking, monitor
from protocol.keys import ActorKeys, LearnerKeys
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
from protocol.weights import Snapshot, check_chain, check_manifest, chunk_ranges

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 10_000
"""Messages a pipe holds before the hub counts the peer as full. Tickets are bounded by leases long before."""
NEWS_HIGH_WATER_MARK = 8
"""A version's news may carry its delta. A subscriber that reads none misses what comes after these, and asks later."""
LINGER_MS = 1_000
TRANSPORT_HEARTBEAT_MS = 5_000
CHUNK_TIMEOUT_S = 10.0
CHUNK_ATTEMPTS = 6
BULK_POLL_S = 0.5
HARD_LIMIT_FACTOR = 4
"""ZeroMQ itself cuts the connection at this multiple of the frame limit; up to there a frame is refused and counted."""
REQUEST_BYTES = 1 << 20
"""The same where only requests and subscriptions come in: on the hub's bulk and news sockets."""
BACKLOG = 1024
"""Connections that wait for the hub to accept them: many actors, and a stranger's flood before them."""


def peer_id(actor: str, incarnation: str) -> bytes:
    """Routing id of a new connection: a second DEALER with an id in use would be silently unheard, hence the nonce."""
    return f"{actor}.{incarnation}.{secrets.token_hex(4)}".encode()


def _socket(context: Any, kind: int, limits: codec.Limits) -> Any:
    sock = context.socket(kind)
    high_water_mark = NEWS_HIGH_WATER_MARK if kind in (zmq.XPUB, zmq.SUB) else HIGH_WATER_MARK
    sock.setsockopt(zmq.LINGER, LINGER_MS)
    sock.setsockopt(zmq.SNDHWM, high_water_mark)
    sock.setsockopt(zmq.RCVHWM, high_water_mark)
    sock.setsockopt(zmq.MAXMSGSIZE, limits.max_frame_bytes * HARD_LIMIT_FACTOR)
    sock.setsockopt(zmq.HEARTBEAT_IVL, TRANSPORT_HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 4 * TRANSPORT_HEARTBEAT_MS)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    return sock


class FaultCounter:
    """Counts what goes wrong by kind and says so, of each kind at most once a second."""

    def __init__(self, what: str = "dropped a frame") -> None:
        self.what = what
        self.counts: Counter[str] = Counter()
        self._last_log: dict[str, float] = {}

    def __call__(self, fault: str, detail: object) -> None:
        self.counts[fault] += 1
        now = time.monotonic()
        if now - self._last_log.get(fault, -1.0) >= 1.0:
            self._last_log[fault] = now
            log.warning("%s (%s): %s; so far: %s", self.what, fault, detail, dict(self.counts))


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
        sock: zmq.Socket[bytes] = _socket(self._context, kind, self.limits)
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
        if self._work in ready:
            yield from self._receive(self._work)

    def _receive(self, sock: zmq.Socket[bytes], at_most: int = 256) -> Iterator[tuple[bytes, Message]]:
        for _ in range(at_most):
            try:
                peer, *frames = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                yield peer, codec.decode_from_actor(frames, self.limits)
            except UnknownVersion as error:
                self.faults("unknown version", error)
                self._send(sock, peer, Refused(f"{error}; this learner speaks {PROTOCOL_VERSION}"))
            except OversizedFrame as error:
                self.faults("oversized", error)
            except WireError as error:
                self.faults("malformed", error)

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


class Link:
    """An actor's connection to the learner. Used inside one asyncio loop."""

    def __init__(
        self,
        endpoint: str,
        actor: str,
        incarnation: str,
        limits: codec.Limits = codec.DEFAULT_LIMITS,
        keys: ActorKeys | None = None,
    ) -> None:
        """Connect the work socket (ZeroMQ connects in the background). Raises ValueError for a malformed endpoint."""
        self.limits = limits
        self.faults = FaultCounter()
        self._keys = keys
        self._knocking = Knocking(lambda: self._keys.own.public if self._keys else "")
        self._context = zmq.asyncio.Context()
        self._actor, self._incarnation = actor, incarnation
        self._work: zmq.asyncio.Socket = _socket(self._context, zmq.DEALER, limits)
        self._bulk: zmq.asyncio.Socket = _socket(self._context, zmq.DEALER, limits)
        self._news: zmq.asyncio.Socket = _socket(self._context, zmq.SUB, limits)
        self._news.setsockopt(zmq.SUBSCRIBE, b"")
        self._connected: dict[zmq.asyncio.Socket, str] = {}
        self._connections: Counter[zmq.asyncio.Socket] = Counter()
        self._bulk_connections = 0
        try:
            self._connect(self._work, endpoint)
        except ValueError:
            self.close()
            raise
        for name, sock in (("work", self._work), ("bulk", self._bulk), ("news", self._news)):
            self._knock(name, sock)

    def _knock(self, name: str, sock: zmq.asyncio.Socket) -> None:
        """Have the socket connected anew for as long as the learner refuses it."""

        def again() -> None:
            self._bulk_connections += sock is self._bulk
            self._connect(sock, self._connected[sock])
            sock.get(zmq.EVENTS)  # whoever waits to send on it finds that it can

        events = monitor(self._context, sock, Knocking.EVENTS)
        self._knocking.start(name, events, lambda: (self._connected.get(sock, ""), self._connections[sock]), again)

    @property
    def problem(self) -> str:
        """Why the learner does not let this actor in; "" if it does, or if nobody is there."""
        return self._knocking.problem

    def _connect(self, sock: zmq.asyncio.Socket, endpoint: str) -> None:
        """Connect a socket, leaving its earlier peer. The socket stays: closing it would cancel whoever waits on it."""
        if before := self._connected.pop(sock, ""):
            with contextlib.suppress(zmq.ZMQError):  # refused: ZeroMQ has given it up already
                sock.disconnect(before)
        if sock is not self._news:
            sock.setsockopt(zmq.IDENTITY, peer_id(self._actor, self._incarnation))  # of the connection made next
        sock.setsockopt(zmq.IPV6, "[" in endpoint)
        sock.setsockopt(zmq.CURVE_SERVER, 0)  # back to a connection without keys
        if self._keys:
            sock.setsockopt(zmq.CURVE_SERVERKEY, self._keys.learner.encode())
            sock.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.own.secret.encode())
        try:
            sock.connect(endpoint)
        except zmq.ZMQError as error:
            raise ValueError(f"learner address: found {endpoint!r}, allowed: tcp://HOST:PORT ({error})") from None
        self._connected[sock] = endpoint
        self._connections[sock] += 1

    def _lead(self, sock: zmq.asyncio.Socket, endpoint: str, keys: ActorKeys | None) -> None:
        """Connect a socket elsewhere, or leave all as it was."""
        before, keys_before = self._connected.get(sock, ""), self._keys
        self._keys = keys
        try:
            self._connect(sock, endpoint)
        except ValueError:
            self._keys = keys_before
            if before:
                self._connect(sock, before)
            raise

    def reconnect(self, endpoint: str, keys: ActorKeys | None) -> None:
        """Leave the work socket's connection for another address, under a new routing id. What was queued is lost.

        `keys`: those of every connection from now on; where they change, the other sockets are connected anew, too."""
        before = self._keys
        self._lead(self._work, endpoint, keys)
        if keys != before and self._bulk in self._connected:
            self.open_weights(self._connected[self._bulk], self._connected[self._news])

    def open_weights(self, bulk: str, news: str) -> None:
        """Connect to the learner's bulk and news sockets, replacing earlier connections."""
        self._lead(self._bulk, bulk, self._keys)
        self._lead(self._news, news, self._keys)
        self._bulk_connections += 1

    async def receive(self) -> Message:
        """Next message of the learner on the work socket; bad frames are counted and skipped."""
        return await self._receive(self._work)

    async def news(self) -> Update:
        """Next announcement. May never come (PUB drops): the heartbeat's answer says what was missed."""
        while True:
            message = await self._receive(self._news)
            try:
                if isinstance(message, Update):
                    return _checked(message)
                self.faults("malformed", f"{type(message).__name__} as news")
            except WeightsError as error:
                self.faults("malformed", error)

    async def _receive(self, sock: zmq.asyncio.Socket) -> Message:
        while True:
            parts = await sock.recv_multipart(copy=False)
            frames = [part.buffer for part in parts]
            try:
                return codec.decode_from_learner(frames, self.limits)
            except UnknownVersion as error:  # the learner's own refusal is not readable either
                self.faults("unknown version", error)
                return Refused(f"the learner speaks another protocol: {error}")
            except WireError as error:
                self.faults("malformed", error)

    async def send(self, message: Message) -> None:
        """Queue a message. Blocks this coroutine only if ten thousand messages wait already."""
        await self._put(self._work, message)

    async def fetch_update(self, base: int = 0, base_digest: str = "") -> Update:
        """The newest version, and the way to it from a base that is at hand.

        Raises WeightsError if there is none or its description is damaged, DeadlineExceeded for no answer."""
        request = UpdateRequest(base, base_digest)
        return _checked(await self._ask(request, lambda message: isinstance(message, Update), "the newest version"))

    async def fetch(
        self,
        version: int,
        total_bytes: int,
        chunk_bytes: int,
        window: int,
        write: Callable[[int, memoryview], None],
        form: Form = "snapshot",
    ) -> None:
        """Pull a version's bytes, `window` requests in flight, and hand each chunk to `write(offset, data)`.

        Raises WeightsError if the version or the learner is gone meanwhile, DeadlineExceeded if chunks stop coming.
        """
        connection = self._bulk_connections
        todo = list(chunk_ranges(total_bytes, chunk_bytes))[::-1]
        flying: dict[int, tuple[int, float, int]] = {}  # offset -> length, sent at, attempts

        async def request(offset: int, length: int, attempts: int) -> None:
            flying[offset] = (length, time.monotonic(), attempts)
            await self._put(self._bulk, ChunkRequest(version, offset, length, form))

        async def fill_window() -> None:
            while todo and len(flying) < window:
                await request(*todo.pop(), 1)

        await fill_window()
        while flying:
            message = await self._bulk_reply(CHUNK_TIMEOUT_S / 4, connection)
            if isinstance(message, (Chunk, Gone)) and (message.version, message.form) == (version, form):
                if isinstance(message, Gone):
                    raise WeightsError(f"the {form} of version {version} is gone, version {message.newest} can be had")
                if message.offset in flying and len(message.data) == flying[message.offset][0]:
                    del flying[message.offset]
                    await fill_window()  # before the bytes are written: the next ones travel meanwhile
                    write(message.offset, memoryview(message.data))
            for offset, (length, sent, attempts) in list(flying.items()):
                if time.monotonic() - sent > CHUNK_TIMEOUT_S:
                    if attempts >= CHUNK_ATTEMPTS:
                        raise DeadlineExceeded(
                            f"bytes {offset}.. of version {version} from the learner",
                            attempts * CHUNK_TIMEOUT_S,
                        )
                    await request(offset, length, attempts + 1)

    async def _ask(self, request: Message, fits: Callable[[Any], bool], what: str) -> Any:
        connection = self._bulk_connections
        for _ in range(CHUNK_ATTEMPTS):
            await self._put(self._bulk, request)
            deadline = time.monotonic() + CHUNK_TIMEOUT_S
            while (left := deadline - time.monotonic()) > 0:
                message = await self._bulk_reply(left, connection)
                if isinstance(message, Gone) and not message.version:  # else: of a chunk asked for earlier
                    raise WeightsError("the learner has no weights yet")
                if message is not None and fits(message):
                    return message
        raise DeadlineExceeded(f"{what} from the learner", CHUNK_ATTEMPTS * CHUNK_TIMEOUT_S)

    async def _put(self, sock: zmq.asyncio.Socket, message: Message) -> None:
        frames = codec.encode(message)
        while True:
            try:
                await sock.send_multipart(frames)
                return
            except zmq.Again:  # the learner refused the connection in this moment: wait for the next one
                await asyncio.sleep(0)

    async def _bulk_reply(self, timeout_s: float, connection: int) -> Message | None:
        """Next message on the bulk socket; None if there is none for a while. Raises WeightsError if the socket was
        connected anew since `connection`: what was asked of the learner before is lost."""
        ready = await self._bulk.poll(min(timeout_s, BULK_POLL_S) * 1000)
        if connection != self._bulk_connections:
            raise WeightsError("the connection was made anew during a pull")
        return await self._receive(self._bulk) if ready else None

    def close(self) -> None:
        """Close all sockets; what is queued is sent for at most LINGER_MS."""
        self._knocking.stop()
        self._context.destroy(LINGER_MS)


def _checked(update: Update) -> Update:
    """The update, or WeightsError if it does not fit together."""
    check_manifest(update.manifest)
    check_chain(update.manifest, update.chain)
    if update.payload and len(update.payload) != sum(delta.nbytes for delta in update.chain):
        raise WeightsError(f"version {update.manifest.version}: {len(update.payload)} bytes of deltas with its news")
    return update
