"""An actor's connection to the learner. It moves messages and knows nothing of their meaning.

Lives in an actor's asyncio loop (`actor/loop.py`); `actor/staging.py` pulls versions through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from protocol import codec
from protocol.errors import DeadlineExceeded, UnknownVersion, WeightsError, WireError
from protocol.handshakes import Knocking, monitor
from protocol.keys import ActorKeys
from protocol.messages import (
    Chunk,
    ChunkRequest,
    Form,
    Gone,
    Message,
    Refused,
    Update,
    UpdateRequest,
)  # fmt: skip
from protocol.sockets import LINGER_MS, FaultCounter, new_socket, peer_id
from protocol.weights import check_chain, check_manifest, chunk_ranges

log = logging.getLogger(__name__)

CHUNK_TIMEOUT_S = 10.0
CHUNK_ATTEMPTS = 6
BULK_POLL_S = 0.5


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
        self._work: zmq.asyncio.Socket = new_socket(self._context, zmq.DEALER, limits)
        self._bulk: zmq.asyncio.Socket = new_socket(self._context, zmq.DEALER, limits)
        self._news: zmq.asyncio.Socket = new_socket(self._context, zmq.SUB, limits)
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
