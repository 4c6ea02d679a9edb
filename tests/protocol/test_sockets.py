"""The hub and the link on real sockets: what strangers send, who is waited for (nobody), how weights are pulled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any
from unittest import mock

import msgspec
import pytest
import zmq
import zmq.asyncio

from protocol import codec, shelf, sockets
from protocol import link as link_module
from protocol.errors import DeadlineExceeded, WeightsError
from protocol.hub import Hub
from protocol.link import Link
from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Beat,
    Chunk,
    ChunkRequest,
    Delta,
    Gone,
    Heartbeat,
    Hello,
    Manifest,
    Message,
    Refused,
    Rehello,
    Ticket,
    TicketId,
    Update,
    UpdateRequest,
)
from protocol.sockets import FaultCounter, peer_id
from protocol.weights import Snapshot, check_data, manifest_digest
from tests.hub_harness import DEADLINE_S, RunningHub, delta, snapshot
from tests.intake_harness import make_ticket

HELLO = Hello("actor-0", "i", slots=1)
PREAMBLE = b"TNDM" + bytes([PROTOCOL_VERSION])


@contextlib.contextmanager
def raw_socket(kind: int, endpoint: str, **options: int) -> Iterator[zmq.Socket[bytes]]:
    """A peer that sends and reads bytes of its own choice."""
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.linger = 0
        sock.rcvtimeo = sock.sndtimeo = int(DEADLINE_S * 1000)
        for name, value in options.items():
            setattr(sock, name.lower(), value)
        sock.connect(endpoint)
        yield sock


@contextlib.asynccontextmanager
async def link_to(hub: Hub, weights: bool = True) -> AsyncIterator[Link]:
    link = Link(hub.work_endpoint, "actor-0", "i", hub.limits)
    try:
        if weights:
            link.open_weights(hub.bulk_endpoint, hub.news_endpoint)
        yield link
    finally:
        link.close()


def resealed(manifest: Manifest, **changes: object) -> Manifest:
    """A manifest with other fields and a digest that fits them."""
    changed = msgspec.structs.replace(manifest, **changes)
    return msgspec.structs.replace(changed, digest=manifest_digest(changed))


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, DEADLINE_S)


# --- binding ---


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_hub_without_keys_refuses_what_is_not_loopback(host: str) -> None:
    with pytest.raises(ValueError, match=f"wire.host: found '{host}', allowed without keys: a loopback address"):
        Hub(host, 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "example.org"])
def test_hub_refuses_a_wildcard_whoever_trusts_the_network(host: str) -> None:
    with pytest.raises(ValueError, match="no wildcard"):
        Hub(host, 0, trusted=True)


def test_hub_names_an_address_that_is_not_of_this_machine() -> None:
    with pytest.raises(OSError, match=r"wire\.host: found 192\.0\.2\.1, which is no address of this machine"):
        Hub("192.0.2.1", 0, trusted=True)


def test_hub_takes_three_ports_in_a_row_where_the_first_is_fixed() -> None:
    port = three_free_ports()
    hub = Hub("127.0.0.1", port, consecutive=True)
    try:
        endpoints = (hub.work_endpoint, hub.bulk_endpoint, hub.news_endpoint)
        assert endpoints == tuple(f"tcp://127.0.0.1:{port + i}" for i in range(3))
        with pytest.raises(OSError, match=rf"wire\.port: found {port} on"):
            Hub("127.0.0.1", port, consecutive=True)
        with pytest.raises(OSError, match=rf"wire\.port: found {port + 1} on"):
            Hub("127.0.0.1", port + 1)
    finally:
        hub.close()


def three_free_ports() -> int:
    """The first of three that were free a moment ago."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                socket.create_server(("127.0.0.1", port + 1)).close()
                socket.create_server(("127.0.0.1", port + 2)).close()
                return int(port)


def test_hub_names_a_port_in_use() -> None:
    first = Hub("127.0.0.1", 0)
    try:
        port = int(first.work_endpoint.rpartition(":")[2])
        with pytest.raises(OSError, match=rf"wire\.port: found {port} on 127\.0\.0\.1.*in use.*allowed: a free"):
            Hub("127.0.0.1", port)
    finally:
        first.close()


def test_hub_on_ipv6_loopback_is_reached() -> None:
    try:
        hub = Hub("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with raw_socket_after(hub) as (peer, received):
        assert received == HELLO
        assert peer


@contextlib.contextmanager
def raw_socket_after(hub: Hub) -> Iterator[tuple[bytes, Message]]:
    try:
        with raw_socket(zmq.DEALER, hub.work_endpoint, IPV6=1) as sock:
            sock.send_multipart(codec.encode(HELLO))
            deadline = time.monotonic() + DEADLINE_S
            while time.monotonic() < deadline:
                for peer, message in hub.poll(1.0):
                    yield peer, message
                    return
    finally:
        hub.close()


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:notaport", "smoke://x:1"])
async def test_link_refuses_a_malformed_endpoint_by_name(endpoint: str) -> None:
    with pytest.raises(ValueError, match=f"learner address: found '{endpoint}', allowed: tcp://HOST:PORT"):
        Link(endpoint, "actor-0", "i")


def test_peer_id_is_new_for_every_connection() -> None:
    ids = {peer_id("actor-0", "abc") for _ in range(50)}
    assert len(ids) == 50
    assert all(one.startswith(b"actor-0.abc.") for one in ids)


# --- what strangers send ---


BAD_FRAMES: dict[str, tuple[str, list[bytes]]] = {
    "empty": ("malformed", [b""]),
    "no magic": ("malformed", [b"GET / HTTP/1.1"]),
    "truncated": ("malformed", [bytes(codec.encode(HELLO)[0])[:-3]]),
    "only preamble": ("malformed", [PREAMBLE]),
    "unknown message": ("malformed", [PREAMBLE + msgspec.msgpack.encode({"t": "launch"})]),
    "wrong type": ("malformed", [PREAMBLE + msgspec.msgpack.encode({"t": "hello", "actor": 3})]),
    "learner's message": ("malformed", [bytes(f) for f in codec.encode(Rehello())]),
    "superfluous buffer": ("malformed", [bytes(codec.encode(HELLO)[0]), b"more"]),
    "large frame": ("oversized", [b"x" * 2001]),
    "many frames": ("oversized", [b"x"] * 9),
    "other version": ("unknown version", [b"TNDM\x63" + bytes(codec.encode(HELLO)[0])[5:]]),
}


@pytest.mark.parametrize("bad", BAD_FRAMES)
def test_hub_counts_a_bad_frame_and_goes_on_serving(bad: str) -> None:
    fault, frames = BAD_FRAMES[bad]
    with (
        RunningHub(limits=codec.Limits(max_frame_bytes=2000)) as running,
        raw_socket(zmq.DEALER, running.hub.work_endpoint) as stranger,
        raw_socket(zmq.DEALER, running.hub.bulk_endpoint) as puller,
    ):
        for sock in (stranger, puller):
            sock.send_multipart(frames)
            sock.send_multipart(frames)
        stranger.send_multipart(codec.encode(HELLO))
        puller.send_multipart(codec.encode(UpdateRequest()))
        running.until(lambda: [message for _, message in running.received] == [HELLO])
        running.until(lambda: dict(running.hub.faults.counts) == {fault: 4})
        if fault == "unknown version":
            for sock in (stranger, stranger, puller, puller):
                refusal = codec.decode_from_learner(sock.recv_multipart())
                assert isinstance(refusal, Refused)
                assert "version 99" in refusal.reason
                assert f"speaks {PROTOCOL_VERSION}" in refusal.reason
        assert codec.decode_from_learner(puller.recv_multipart()) == Gone(0, 0)


def test_hub_survives_frames_that_zeromq_itself_cuts_off() -> None:
    limits = codec.Limits(max_frame_bytes=1000)
    with (
        RunningHub(limits=limits) as running,
        raw_socket(zmq.DEALER, running.hub.work_endpoint) as stranger,
        raw_socket(zmq.DEALER, running.hub.work_endpoint) as actor,
    ):
        stranger.send_multipart([b"x" * (1000 * sockets.HARD_LIMIT_FACTOR + 1)])
        actor.send_multipart(codec.encode(HELLO))
        running.until(lambda: [message for _, message in running.received] == [HELLO])


def test_hub_ignores_what_subscribers_send() -> None:
    with RunningHub() as running, raw_socket(zmq.SUB, running.hub.news_endpoint) as sub:
        for _ in range(3):
            sub.subscribe(b"")
        with raw_socket(zmq.XSUB, running.hub.news_endpoint) as xsub:
            xsub.send_multipart([b"\x07junk", b"more junk"])
            xsub.send_multipart([b"\x01"])
            assert xsub.poll(0) == 0
            deadline = time.monotonic() + DEADLINE_S
            version = 0
            while not xsub.poll(50):  # a subscription takes a moment: announce until it is heard
                assert time.monotonic() < deadline
                version += 1
                running.run(lambda v=version: running.hub.announce(snapshot(v)))
            assert isinstance(codec.decode_from_learner(xsub.recv_multipart()), Update)


def test_faults_of_a_kind_are_logged_at_most_once_a_second(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(sockets.time, "monotonic", lambda: now)
    faults = FaultCounter()
    with caplog.at_level(logging.WARNING, "protocol.sockets"):
        for _ in range(500):
            faults("malformed", "x")
        now += 0.9
        faults("oversized", "y")
        now += 0.2
        faults("malformed", "z")
    assert [record.getMessage() for record in caplog.records] == [
        "dropped a frame (malformed): x; so far: {'malformed': 1}",
        "dropped a frame (oversized): y; so far: {'malformed': 500, 'oversized': 1}",
        "dropped a frame (malformed): z; so far: {'malformed': 501, 'oversized': 1}",
    ]


async def test_link_counts_bad_frames_and_reads_on() -> None:
    def answer(hub: Hub, peer: bytes, message: Message) -> None:
        for frames in ([b"nonsense"], [b""], codec.encode(HELLO)):
            hub._work.send_multipart([peer, *frames])
        hub.send(peer, Beat(4))

    with RunningHub(answer=answer) as running:
        async with link_to(running.hub) as link:
            await link.send(HELLO)
            assert await soon(link.receive()) == Beat(4)
            assert dict(link.faults.counts) == {"malformed": 3}


async def test_link_reads_a_learner_of_another_version_as_a_refusal() -> None:
    later = b"TNDM" + bytes([PROTOCOL_VERSION + 1])

    def answer(hub: Hub, peer: bytes, message: Message) -> None:
        hub._work.send_multipart([peer, later + bytes(codec.encode(Refused("unreadable"))[0])[5:]])

    with RunningHub(answer=answer) as running:
        async with link_to(running.hub) as link:
            await link.send(HELLO)
            refusal = await soon(link.receive())
            assert isinstance(refusal, Refused)
            expected = f"peer speaks protocol version {PROTOCOL_VERSION + 1}, this side speaks {PROTOCOL_VERSION}"
            assert expected in refusal.reason


# --- nobody is waited for ---


def test_full_pipe_is_that_peers_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 4)
    ticket = msgspec.structs.replace(make_ticket(0), answer="x" * 100_000)
    with (
        RunningHub() as running,
        raw_socket(zmq.DEALER, running.hub.work_endpoint, RCVHWM=1, RCVBUF=4096) as stalled,
        raw_socket(zmq.DEALER, running.hub.work_endpoint) as healthy,
    ):
        for number, sock in enumerate((stalled, healthy)):
            sock.send_multipart(codec.encode(msgspec.structs.replace(HELLO, actor=f"actor-{number}")))
            running.until(lambda count=number + 1: len(running.received) == count)
        (slow, _), (quick, _) = running.received

        def fill() -> int:
            for sent in range(5000):
                if not running.hub.send(slow, ticket):
                    return sent
            return -1

        assert running.run(fill) > 0, "the pipe never filled"
        assert running.hub.faults.counts["pipe full"] == 1
        assert running.run(lambda: running.hub.send(quick, Beat(1))) is True
        assert codec.decode_from_learner(healthy.recv_multipart()) == Beat(1)
        assert codec.decode_from_learner(stalled.recv_multipart()) == ticket, "what was accepted arrives"


def test_send_to_a_peer_that_is_gone_is_counted() -> None:
    with RunningHub() as running:
        assert running.run(lambda: running.hub.send(b"nobody", Beat(1))) is False
        assert running.hub.faults.counts["unroutable"] == 1


def test_wake_ends_a_poll_from_another_thread_and_is_harmless_later() -> None:
    hub = Hub("127.0.0.1", 0)
    polled = threading.Thread(target=lambda: list(hub.poll(600)), daemon=True)
    polled.start()
    hub.wake()
    polled.join(DEADLINE_S)
    assert not polled.is_alive()
    for _ in range(100_000):  # more than the pipe holds
        hub.wake()
    assert list(hub.poll(600)) == []
    assert list(hub.poll(0)) == []
    hub.close()
    hub.wake()


# --- weights ---


async def fetched(link: Link, manifest: Manifest, chunk_bytes: int = 64, window: int = 2) -> bytes:
    data = bytearray(manifest.total_bytes)

    def write(offset: int, chunk: memoryview) -> None:
        data[offset : offset + len(chunk)] = chunk

    await soon(link.fetch(manifest.version, manifest.total_bytes, chunk_bytes, window, write))
    return bytes(data)


async def fetched_delta(link: Link, wanted: Delta, chunk_bytes: int = 64, window: int = 2) -> bytes:
    data = bytearray(wanted.nbytes)

    def write(offset: int, chunk: memoryview) -> None:
        data[offset : offset + len(chunk)] = chunk

    await soon(link.fetch(wanted.version, wanted.nbytes, chunk_bytes, window, write, "delta"))
    return bytes(data)


async def test_link_pulls_the_newest_version_whole() -> None:
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            with pytest.raises(WeightsError, match="the learner has no weights yet"):
                await soon(link.fetch_update())
            first, second = snapshot(1), snapshot(2, 777)
            running.run(lambda: running.hub.announce(first))
            running.run(lambda: running.hub.announce(second))
            assert await soon(link.fetch_update()) == Update(second.manifest)
            assert await fetched(link, second.manifest) == second.data
            assert running.run(lambda: running.hub.bytes_sent) == 777
            assert await fetched(link, first.manifest) == first.data, "the version before stays for pulls in flight"


async def test_link_is_told_that_a_version_is_gone_and_asks_again_undisturbed() -> None:
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            old = snapshot(1)
            for version in (1, 2, 3):
                running.run(lambda v=version: running.hub.announce(snapshot(v)))
            with pytest.raises(WeightsError, match="the snapshot of version 1 is gone, version 3 can be had"):
                await fetched(link, old.manifest, window=4)  # three more answers of the same kind are on their way
            manifest = (await soon(link.fetch_update())).manifest
            assert manifest.version == 3
            assert await fetched(link, manifest) == snapshot(3).data


def test_hub_refuses_ranges_outside_a_version_and_beyond_the_frame_limit() -> None:
    old, new = snapshot(1), snapshot(2)
    made = delta(old, new, 600)
    snapshots = [(2, 990, 20), (2, -1, 5), (2, 0, 0), (2, 0, 501), (3, 0, 5)]
    deltas = [(2, 590, 20), (2, -1, 5), (2, 0, 0), (2, 0, 501), (3, 0, 5), (1, 0, 5)]
    with (
        RunningHub(limits=codec.Limits(max_frame_bytes=500)) as running,
        raw_socket(zmq.DEALER, running.hub.bulk_endpoint) as puller,
    ):
        running.run(lambda: running.hub.announce(old))
        running.run(lambda: running.hub.announce(new, made))
        for form, requests in (("snapshot", snapshots), ("delta", deltas)):
            for request in requests:
                puller.send_multipart(codec.encode(ChunkRequest(*request, form)))
            for version, _, _ in requests:
                assert codec.decode_from_learner(puller.recv_multipart()) == Gone(version, 2, form)
        puller.send_multipart(codec.encode(ChunkRequest(2, 990, 10)))
        expected = Chunk(2, 990, "snapshot", bytes(new.data[990:]))
        assert codec.decode_from_learner(puller.recv_multipart()) == expected
        puller.send_multipart(codec.encode(ChunkRequest(2, 590, 10, "delta")))
        assert codec.decode_from_learner(puller.recv_multipart()) == Chunk(2, 590, "delta", made[1][590:])


async def test_link_keeps_exactly_window_requests_in_flight() -> None:
    source = snapshot(1, 640)
    async with fake_learner() as (router, link):
        pulling = asyncio.ensure_future(fetched(link, source.manifest, chunk_bytes=64, window=3))
        open_requests: list[ChunkRequest] = []
        peer = b""
        for answered in range(10):
            expected = min(3, 10 - answered)
            while len(open_requests) < expected:
                peer, *frames = await soon(router.recv_multipart())
                open_requests.append(codec.decode_from_actor(frames))
            assert not await router.poll(20), "more requests in flight than the window allows"
            request = open_requests.pop(-1 if answered % 2 else 0)  # out of order
            data = source.chunk(request.offset, request.length)
            await router.send_multipart([peer, *codec.encode(Chunk(1, request.offset, data=data))])  # type: ignore[arg-type]
        assert await soon(pulling) == source.data


async def test_link_asks_for_the_next_chunk_before_it_writes_one() -> None:
    """Else the wire would stand still while bytes are written."""
    order: list[tuple[str, int]] = []
    with RunningHub() as running:
        running.run(lambda: running.hub.announce(snapshot(1, 192)))
        async with link_to(running.hub) as link:
            send = link._put

            async def request(sock: zmq.asyncio.Socket, message: ChunkRequest) -> None:
                order.append(("ask", message.offset))
                await send(sock, message)

            with mock.patch.object(link, "_put", request):
                await soon(link.fetch(1, 192, 64, 1, lambda offset, _: order.append(("write", offset))))
    assert order == [("ask", 0), ("ask", 64), ("write", 0), ("ask", 128), ("write", 64), ("write", 128)]


async def test_link_asks_again_for_a_lost_chunk_and_then_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CHUNK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(link_module, "CHUNK_ATTEMPTS", 50)
    source = snapshot(1, 100)
    async with fake_learner() as (router, link):
        pulling = asyncio.ensure_future(fetched(link, source.manifest, chunk_bytes=100))
        for _ in range(2):  # the first is lost, the second answered with too little
            peer, *frames = await soon(router.recv_multipart())
        await router.send_multipart([peer, *codec.encode(Chunk(1, 0, data=bytes(source.data[:50])))])
        peer, *frames = await soon(router.recv_multipart())
        assert codec.decode_from_actor(frames) == ChunkRequest(1, 0, 100)
        for other in (Chunk(9, 0, data=bytes(100)), Gone(9, 1), Chunk(1, 0, "delta", bytes(100)), Gone(1, 1, "delta")):
            await router.send_multipart([peer, *codec.encode(other)])  # to what was asked for earlier
        await router.send_multipart([peer, *codec.encode(Chunk(1, 0, data=bytes(source.data)))])
        assert await soon(pulling) == source.data
        monkeypatch.setattr(link_module, "CHUNK_ATTEMPTS", 3)
        with pytest.raises(DeadlineExceeded, match=r"bytes 0\.\. of version 1 from the learner"):
            await fetched(link, source.manifest, chunk_bytes=100)
        with pytest.raises(DeadlineExceeded, match="the newest version from the learner"):
            await soon(link.fetch_update())


@contextlib.asynccontextmanager
async def fake_learner() -> AsyncIterator[tuple[zmq.asyncio.Socket, Link]]:
    """A bulk ROUTER in the test's own hands, and a link that pulls from it."""
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    link = Link(f"tcp://127.0.0.1:{port}", "actor-0", "i")
    link.open_weights(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}")
    try:
        yield router, link
    finally:
        link.close()
        context.destroy(0)


async def test_slow_puller_does_not_stall_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 4)
    source = snapshot(1, 2_000_000)
    with (
        RunningHub() as running,
        raw_socket(zmq.DEALER, running.hub.bulk_endpoint, RCVHWM=1, RCVBUF=4096) as stalled,
    ):
        running.run(lambda: running.hub.announce(source))
        for _ in range(200):  # asks for 200 MB and reads nothing
            stalled.send_multipart(codec.encode(ChunkRequest(1, 0, 1_000_000)))
        running.until(lambda: running.hub.faults.counts["pipe full"] > 0)
        async with link_to(running.hub) as link:
            data = await fetched(link, (await soon(link.fetch_update())).manifest, chunk_bytes=100_000, window=2)
            assert data == source.data
            check_data(source.manifest, memoryview(data))


# --- deltas ---


OLD, NEW, OTHER = snapshot(1), snapshot(2), snapshot(3)
DELTA, PAYLOAD = delta(OLD, NEW, 300)
UPDATE = Update(NEW.manifest, (DELTA,), PAYLOAD)
DAMAGED: dict[str, Message] = {
    "manifest": Update(msgspec.structs.replace(NEW.manifest, step=99), (DELTA,), PAYLOAD),
    "manifest of unknown types": Update(
        resealed(NEW.manifest, tensors=(msgspec.structs.replace(NEW.manifest.tensors[0], dtype="float4"),))
    ),
    "chain to another version": Update(OTHER.manifest, (DELTA,), PAYLOAD),
    "chain with a gap": Update(NEW.manifest, (delta(OTHER, OLD, 0)[0], delta(OTHER, NEW, 300)[0]), PAYLOAD),
    "payload too short": Update(NEW.manifest, (DELTA,), PAYLOAD[:-1]),
    "payload too long": Update(NEW.manifest, (DELTA,), PAYLOAD + b"x"),
    "payload of no delta": Update(NEW.manifest, (), PAYLOAD),
    "delta larger than a snapshot": Update(NEW.manifest, (msgspec.structs.replace(DELTA, nbytes=1001),)),
    "delta of less than nothing": Update(NEW.manifest, (msgspec.structs.replace(DELTA, nbytes=-1),)),
}


@pytest.mark.parametrize("damage", DAMAGED)
async def test_link_refuses_a_damaged_update(damage: str) -> None:
    async with fake_learner() as (router, link):
        for answer in (DAMAGED[damage], UPDATE):
            asking = asyncio.ensure_future(link.fetch_update(1, "digest"))
            peer, *frames = await soon(router.recv_multipart())
            assert codec.decode_from_actor(frames) == UpdateRequest(1, "digest")
            await router.send_multipart([peer, *codec.encode(answer)])
            if answer is UPDATE:
                assert await soon(asking) == UPDATE
            else:
                with pytest.raises(WeightsError, match=r"version [23]: "):
                    await soon(asking)


async def test_link_counts_damaged_news_and_reads_on() -> None:
    """One after the other: the hub keeps only a few for a subscriber that has not read yet."""
    news = [*DAMAGED.values(), Beat(2), Chunk(2, 0, data=b"abc")]
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 1)
            listening = asyncio.ensure_future(link.news())
            for number, message in enumerate(news, start=1):
                running.run(lambda m=message: running.hub._news.send_multipart(codec.encode(m)))
                await asyncio.to_thread(running.until, lambda n=number: link.faults.counts["malformed"] == n)
            running.run(lambda: running.hub._news.send_multipart(codec.encode(UPDATE)))
            assert await soon(listening) == UPDATE
            assert dict(link.faults.counts) == {"malformed": len(news)}


async def test_news_bring_a_small_delta_with_its_payload() -> None:
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 1)
            running.run(lambda: running.hub.announce(OLD))
            assert await soon(link.news()) == Update(OLD.manifest)
            running.run(lambda: running.hub.announce(NEW, (DELTA, PAYLOAD)))
            assert await soon(link.news()) == UPDATE
            assert await soon(link.fetch_update(1, OLD.manifest.digest)) == UPDATE
            assert await soon(link.fetch_update(1, "another")) == Update(NEW.manifest)
            assert await soon(link.fetch_update(2, NEW.manifest.digest)) == Update(NEW.manifest)


async def test_link_pulls_a_large_delta_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "INLINE_BYTES", 299)
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 1)
            running.run(lambda: running.hub.announce(OLD))
            running.run(lambda: running.hub.announce(NEW, (DELTA, PAYLOAD)))
            without_payload = Update(NEW.manifest, (DELTA,))
            assert await soon(link.news()) == Update(OLD.manifest)
            assert await soon(link.news()) == without_payload
            assert await soon(link.fetch_update(1, OLD.manifest.digest)) == without_payload
            assert running.run(lambda: running.hub.bytes_sent) == 0
            assert await fetched_delta(link, DELTA) == PAYLOAD
            assert running.run(lambda: running.hub.bytes_sent) == 300
            assert await fetched(link, NEW.manifest) == NEW.data, "the snapshot of the same version is something else"


async def test_link_is_told_that_a_delta_is_gone() -> None:
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            running.run(lambda: running.hub.announce(OLD))
            running.run(lambda: running.hub.announce(NEW, (DELTA, PAYLOAD)))
            last, payload = delta(NEW, OTHER, 701)  # with it, more than a snapshot
            running.run(lambda: running.hub.announce(OTHER, (last, payload)))
            with pytest.raises(WeightsError, match="the delta of version 2 is gone, version 3 can be had"):
                await fetched_delta(link, DELTA, window=4)
            assert await soon(link.fetch_update(1, OLD.manifest.digest)) == Update(OTHER.manifest)
            assert await fetched_delta(link, last) == payload
            assert await fetched(link, NEW.manifest) == NEW.data, "its snapshot is still there"


async def test_hub_counts_the_bytes_of_weights_that_it_sends() -> None:
    """Chunks and payloads, the latter for each of those who listen."""
    versions = [snapshot(number) for number in range(1, 5)]
    with RunningHub() as running, raw_socket(zmq.SUB, running.hub.news_endpoint) as other:
        other.subscribe(b"")
        running.until(lambda: running.hub._subscribers == 1)

        def announced(number: int, size: int) -> int:
            made = delta(versions[number - 2], versions[number - 1], size) if size else None
            running.run(lambda: running.hub.announce(versions[number - 1], made))
            return sent()

        def sent() -> int:
            return running.run(lambda: running.hub.bytes_sent)

        async with link_to(running.hub) as link:
            await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 2)
            assert announced(1, 0) == 0
            assert announced(2, 100) == 200
            for heard in (1, 2):
                update = codec.decode_from_learner(other.recv_multipart())
                assert update == await soon(link.news())
                assert (update.manifest.version, len(update.payload)) == (heard, 100 * (heard - 1))
            await soon(link.fetch_update(1, versions[0].manifest.digest))
            assert sent() == 300
            await soon(link.fetch_update())
            assert sent() == 300, "a manifest is none of the weights"
            await fetched(link, versions[1].manifest)
            assert sent() == 1300
        await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 1)
        assert announced(3, 10) == 1310
        other.unsubscribe(b"")
        await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 0)
        assert announced(4, 10) == 1310


async def test_hub_keeps_little_for_a_subscriber_that_reads_nothing() -> None:
    """What it is not given it asks for later; meanwhile nobody else misses anything."""
    size, num_versions = 1 << 20, 50
    small = snapshot(1, size)
    with (
        RunningHub() as running,
        raw_socket(zmq.SUB, running.hub.news_endpoint, RCVHWM=1, RCVBUF=4096) as stalled,
    ):
        stalled.subscribe(b"")
        running.until(lambda: running.hub._subscribers == 1)
        async with link_to(running.hub) as link:
            await asyncio.to_thread(running.until, lambda: running.hub._subscribers == 2)
            running.run(lambda: running.hub.announce(small))
            await soon(link.news())
            tracemalloc.start()
            try:
                for number in range(2, num_versions):
                    base = resealed(small.manifest, version=number - 1)
                    new = resealed(small.manifest, version=number)
                    made = delta(Snapshot(base, small.data), Snapshot(new, small.data), size)
                    running.run(lambda n=new, d=made: running.hub.announce(Snapshot(n, small.data), d))
                    update = await soon(link.news())
                    assert (update.manifest.version, len(update.payload)) == (number, size)
                    del update, made
                bound = (sockets.NEWS_HIGH_WATER_MARK + 8) * size
                await asyncio.to_thread(running.until, lambda: tracemalloc.get_traced_memory()[0] < bound)
            finally:
                tracemalloc.stop()
        heard: list[int] = []
        while num_versions not in heard:  # what it was not told while it did not read is not told later
            running.run(lambda: running.hub.announce(snapshot(num_versions)))
            heard.append(codec.decode_from_learner(stalled.recv_multipart()).manifest.version)
        assert heard[:-1] == list(range(1, len(heard)))
        assert sockets.NEWS_HIGH_WATER_MARK < len(heard) < num_versions / 2


# --- a learner that comes back ---


async def test_link_hears_rehello_from_a_learner_restarted_on_the_same_port() -> None:
    def answer(hub: Hub, peer: bytes, message: Message) -> None:
        hub.send(peer, Beat(1) if isinstance(message, Hello) else Rehello())

    with RunningHub(answer=answer) as first:
        port = int(first.hub.work_endpoint.rpartition(":")[2])
        link = Link(first.hub.work_endpoint, "actor-0", "i")
        await link.send(HELLO)
        assert await soon(link.receive()) == Beat(1)
        waiting = asyncio.ensure_future(link.receive())
        await asyncio.sleep(0)
    try:
        with RunningHub(port, answer=answer) as second:
            await link.send(Heartbeat((), (), 1, 1, "serving", 0.0))
            assert await soon(waiting) == Rehello(), "whoever waited goes on waiting over the restart"
            await link.send(HELLO)
            assert await soon(link.receive()) == Beat(1)
            second.until(lambda: [type(message) for _, message in second.received] == [Heartbeat, Hello])
    finally:
        link.close()


async def test_link_moves_to_another_address_without_disturbing_who_waits() -> None:
    def answer(hub: Hub, peer: bytes, message: Message) -> None:
        hub.send(peer, Ack((TicketId(0, 1),)))

    with RunningHub(answer=answer) as first, RunningHub(answer=answer) as second:
        async with link_to(first.hub) as link:
            await link.send(HELLO)
            await soon(link.receive())
            waiting, news = asyncio.ensure_future(link.receive()), asyncio.ensure_future(link.news())
            await asyncio.sleep(0)
            link.reconnect(second.hub.work_endpoint, None)
            link.open_weights(second.hub.bulk_endpoint, second.hub.news_endpoint)
            await link.send(HELLO)
            assert await soon(waiting) == Ack((TicketId(0, 1),))
            assert second.received[0][0] != first.received[0][0], "another routing id"
            version = 0
            while not news.done():  # a subscription takes a moment: announce until it is heard
                version += 1
                await asyncio.to_thread(second.run, lambda v=version: second.hub.announce(snapshot(v)))
                await asyncio.wait([news], timeout=0.05)
                assert version < 400
            assert (await soon(link.fetch_update())).manifest.version == version
            with pytest.raises(ValueError, match="learner address: found 'bad'"):
                link.reconnect("bad", None)
            await link.send(HELLO)
            assert isinstance(await soon(link.receive()), Ack), "a malformed address changes nothing"


async def test_frames_keep_their_order_and_bytes_on_the_work_socket() -> None:
    def answer(hub: Hub, peer: bytes, message: Message) -> None:
        for index in range(50):
            hub.send(peer, make_ticket(index))

    with RunningHub(answer=answer) as running:
        async with link_to(running.hub) as link:
            await link.send(HELLO)
            tickets = [await soon(link.receive()) for _ in range(50)]
    assert tickets == [make_ticket(index) for index in range(50)]
    assert all(isinstance(ticket, Ticket) for ticket in tickets)


async def test_pull_from_a_learner_that_was_restarted_ends_at_once() -> None:
    source = snapshot(1)
    async with fake_learner() as (router, link):
        for pull in (lambda: link.fetch(1, 1000, 64, 2, lambda offset, data: None), link.fetch_update):
            pulling = asyncio.ensure_future(pull())
            await soon(router.recv_multipart())
            with RunningHub() as second:
                link.open_weights(second.hub.bulk_endpoint, second.hub.news_endpoint)
                with pytest.raises(WeightsError, match="the connection was made anew during a pull"):
                    await asyncio.wait_for(pulling, link_module.CHUNK_TIMEOUT_S / 2)
                await asyncio.to_thread(second.run, lambda hub=second.hub: hub.announce(source))
                assert (await soon(link.fetch_update())).manifest == source.manifest
            port = router.getsockopt_string(zmq.LAST_ENDPOINT)
            link.open_weights(port, port)
