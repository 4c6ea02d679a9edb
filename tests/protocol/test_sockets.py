"""The hub and the link on real sockets: what strangers send, who is waited for (nobody), how weights are pulled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from protocol import codec, sockets
from protocol.errors import DeadlineExceeded, WeightsError
from protocol.messages import (
    Ack,
    Beat,
    Chunk,
    ChunkRequest,
    Gone,
    Heartbeat,
    Hello,
    Manifest,
    ManifestRequest,
    Message,
    Refused,
    Rehello,
    Ticket,
    TicketId,
)
from protocol.sockets import FaultCounter, Hub, Link, peer_id
from protocol.weights import check_data
from tests.hub_harness import DEADLINE_S, RunningHub, snapshot
from tests.intake_harness import make_ticket

HELLO = Hello("actor-0", "i", slots=1)


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


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, DEADLINE_S)


# --- binding ---


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "192.0.2.1", "example.org"])
def test_hub_refuses_what_is_not_loopback(host: str) -> None:
    with pytest.raises(ValueError, match="allowed: a loopback address"):
        Hub(host, 0)


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
    "only preamble": ("malformed", [b"TNDM\x01"]),
    "unknown message": ("malformed", [b"TNDM\x01" + msgspec.msgpack.encode({"t": "launch"})]),
    "wrong type": ("malformed", [b"TNDM\x01" + msgspec.msgpack.encode({"t": "hello", "actor": 3})]),
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
        puller.send_multipart(codec.encode(ManifestRequest()))
        running.until(lambda: [message for _, message in running.received] == [HELLO])
        running.until(lambda: dict(running.hub.faults.counts) == {fault: 4})
        if fault == "unknown version":
            for sock in (stranger, stranger, puller, puller):
                refusal = codec.decode_from_learner(sock.recv_multipart())
                assert isinstance(refusal, Refused)
                assert "version 99" in refusal.reason
                assert "speaks 1" in refusal.reason
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
            assert isinstance(codec.decode_from_learner(xsub.recv_multipart()), Manifest)


def test_faults_are_logged_at_most_once_a_second(
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
    def answer(hub: Hub, peer: bytes, message: Message) -> None:
        hub._work.send_multipart([peer, b"TNDM\x02" + bytes(codec.encode(Refused("unreadable"))[0])[5:]])

    with RunningHub(answer=answer) as running:
        async with link_to(running.hub) as link:
            await link.send(HELLO)
            refusal = await soon(link.receive())
            assert isinstance(refusal, Refused)
            assert "peer speaks protocol version 2, this side speaks 1" in refusal.reason


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

    await soon(link.fetch(manifest, chunk_bytes, window, write))
    return bytes(data)


async def test_link_pulls_the_newest_version_whole() -> None:
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            with pytest.raises(WeightsError, match="the learner has no weights yet"):
                await soon(link.fetch_manifest())
            first, second = snapshot(1), snapshot(2, 777)
            running.run(lambda: running.hub.announce(first))
            running.run(lambda: running.hub.announce(second))
            manifest = await soon(link.fetch_manifest())
            assert manifest == second.manifest
            assert await fetched(link, manifest) == second.data
            assert running.hub.bytes_sent == 777
            assert await fetched(link, first.manifest) == first.data, "the version before stays for pulls in flight"


async def test_link_is_told_that_a_version_is_gone_and_asks_again_undisturbed() -> None:
    with RunningHub() as running:
        async with link_to(running.hub) as link:
            old = snapshot(1)
            for version in (1, 2, 3):
                running.run(lambda v=version: running.hub.announce(snapshot(v)))
            with pytest.raises(WeightsError, match="version 1 is gone, 3 can be had"):
                await fetched(link, old.manifest, window=4)  # three more answers of the same kind are on their way
            manifest = await soon(link.fetch_manifest())
            assert manifest.version == 3
            assert await fetched(link, manifest) == snapshot(3).data


def test_hub_refuses_ranges_outside_a_version_and_beyond_the_frame_limit() -> None:
    requests = [(1, 990, 20), (1, -1, 5), (1, 0, 0), (1, 0, 501), (2, 0, 5)]
    with (
        RunningHub(limits=codec.Limits(max_frame_bytes=500)) as running,
        raw_socket(zmq.DEALER, running.hub.bulk_endpoint) as puller,
    ):
        running.run(lambda: running.hub.announce(snapshot(1)))
        for request in requests:
            puller.send_multipart(codec.encode(ChunkRequest(*request)))
        for version, _, _ in requests:
            assert codec.decode_from_learner(puller.recv_multipart()) == Gone(version, 1)
        puller.send_multipart(codec.encode(ChunkRequest(1, 990, 10)))
        assert codec.decode_from_learner(puller.recv_multipart()) == Chunk(1, 990, bytes(snapshot(1).data[990:]))


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
            await router.send_multipart([peer, *codec.encode(Chunk(1, request.offset, data))])  # type: ignore[arg-type]
        assert await soon(pulling) == source.data


async def test_link_asks_again_for_a_lost_chunk_and_then_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CHUNK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(sockets, "CHUNK_ATTEMPTS", 3)
    source = snapshot(1, 100)
    async with fake_learner() as (router, link):
        pulling = asyncio.ensure_future(fetched(link, source.manifest, chunk_bytes=100))
        for _ in range(2):  # the first is lost, the second answered with too little
            peer, *frames = await soon(router.recv_multipart())
        await router.send_multipart([peer, *codec.encode(Chunk(1, 0, bytes(source.data[:50])))])
        peer, *frames = await soon(router.recv_multipart())
        assert codec.decode_from_actor(frames) == ChunkRequest(1, 0, 100)
        await router.send_multipart([peer, *codec.encode(Chunk(9, 0, bytes(100)))])  # another version's
        await router.send_multipart([peer, *codec.encode(Chunk(1, 0, bytes(source.data)))])
        assert await soon(pulling) == source.data
        with pytest.raises(DeadlineExceeded, match=r"bytes 0\.\. of version 1 from the learner"):
            await fetched(link, source.manifest, chunk_bytes=100)
        with pytest.raises(DeadlineExceeded, match="the newest manifest from the learner"):
            await soon(link.fetch_manifest())


async def test_link_refuses_a_damaged_manifest() -> None:
    async with fake_learner() as (router, link):
        asking = asyncio.ensure_future(link.fetch_manifest())
        peer, *_ = await soon(router.recv_multipart())
        damaged = msgspec.structs.replace(snapshot(1).manifest, step=99)
        await router.send_multipart([peer, *codec.encode(damaged)])
        with pytest.raises(WeightsError, match="digest does not fit"):
            await soon(asking)


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
            data = await fetched(link, await soon(link.fetch_manifest()), chunk_bytes=100_000, window=2)
            assert data == source.data
            check_data(source.manifest, memoryview(data))


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
            link.reconnect(second.hub.work_endpoint)
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
            assert (await soon(link.fetch_manifest())).version == version
            with pytest.raises(ValueError, match="learner address: found 'bad'"):
                link.reconnect("bad")
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
        for pull in (lambda: link.fetch(source.manifest, 64, 2, lambda offset, data: None), link.fetch_manifest):
            pulling = asyncio.ensure_future(pull())
            await soon(router.recv_multipart())
            with RunningHub() as second:
                link.open_weights(second.hub.bulk_endpoint, second.hub.news_endpoint)
                with pytest.raises(WeightsError, match="the learner was restarted during a pull"):
                    await asyncio.wait_for(pulling, sockets.CHUNK_TIMEOUT_S / 2)
                await asyncio.to_thread(second.run, lambda hub=second.hub: hub.announce(source))
                assert await soon(link.fetch_manifest()) == source.manifest
            port = router.getsockopt_string(zmq.LAST_ENDPOINT)
            link.open_weights(port, port)
