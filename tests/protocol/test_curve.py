"""Strangers and honest actors at a hub with keys, on real sockets: who is let in, who is turned away and counted how.

The many are in `test_stranger.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from protocol import codec, door, handshakes, keys, sockets
from protocol.hub import Hub
from protocol.keys import ActorKeys, LearnerKeys, allow, load_actor_keys, load_learner_keys, make_keys, new_pair
from protocol.link import Link
from protocol.messages import Beat, Hello, Message
from tests.hub_harness import DEADLINE_S, RunningHub, snapshot

HELLO = Hello("actor-0", "i", slots=1)


class Run:
    """Keys of a run."""

    def __init__(self, directory: Path) -> None:
        make_keys(directory / "keys")
        self.learner: LearnerKeys = load_learner_keys(directory / "keys")
        self.actor: ActorKeys = load_actor_keys(directory / "keys" / "actor.json")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(keys, "REREAD_S", 0.0)
    monkeypatch.setattr(handshakes, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(handshakes, "LONGEST_PAUSE_S", 0.1)
    return Run(tmp_path / "run")


@pytest.fixture
def hub(run: Run) -> Iterator[RunningHub]:
    with RunningHub(keys=run.learner, answer=answer) as running:
        yield running


def answer(hub: Hub, peer: bytes, message: Message) -> None:
    hub.send(peer, Beat(7))


@contextlib.asynccontextmanager
async def link_to(hub: Hub, pair: ActorKeys | None, name: str = "actor-0") -> AsyncIterator[Link]:
    link = Link(hub.work_endpoint, name, "i", hub.limits, pair)
    try:
        yield link
    finally:
        link.close()


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, DEADLINE_S)


async def until(condition: Any, what: str = "the condition") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        await asyncio.sleep(0.005)


async def is_served(link: Link) -> bool:
    await soon(link.send(HELLO))
    return bool(await soon(link.receive()) == Beat(7))


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def connect(hub: Hub) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port_of(hub.work_endpoint)), DEADLINE_S)
    sock.settimeout(DEADLINE_S)
    return sock


def read_to_the_end(sock: socket.socket) -> bytes:
    """All that the hub sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            found += data
    return found


# --- who is let in ---


async def test_actor_with_the_runs_key_uses_all_three_sockets(hub: RunningHub, run: Run) -> None:
    async with link_to(hub.hub, run.actor) as link:
        assert await is_served(link)
        link.open_weights(hub.hub.bulk_endpoint, hub.hub.news_endpoint)
        first = snapshot(1, 100_000)
        news = asyncio.ensure_future(link.news())
        await until(lambda: hub.hub._subscribers == 1, "the subscription")
        hub.run(lambda: hub.hub.announce(first))
        assert (await soon(news)).manifest == first.manifest
        data = bytearray(100_000)

        def write(offset: int, chunk: memoryview) -> None:
            data[offset : offset + len(chunk)] = chunk

        await soon(link.fetch(1, 100_000, 4096, 4, write))
        assert data == first.data
        assert link.problem == ""
    assert not hub.hub.turned_away.counts


def test_what_crosses_the_wire_cannot_be_read_there(hub: RunningHub, run: Run) -> None:
    secret_text = b"the answer that nobody on the network may read"
    with Recorder(port_of(hub.hub.work_endpoint)) as recorder:
        honest_exchange(recorder.endpoint, run.actor, [secret_text])
    sent, received = recorder.bytes()
    assert len(sent) > 500
    assert secret_text not in sent
    assert b"TNDM" not in sent + received
    assert b"actor-0" not in sent


# --- who is not ---


@pytest.mark.parametrize("socket_name", ["work", "bulk", "news"])
def test_peer_without_keys_is_not_let_in_anywhere(hub: RunningHub, socket_name: str) -> None:
    endpoint = getattr(hub.hub, f"{socket_name}_endpoint")
    kind = zmq.SUB if socket_name == "news" else zmq.DEALER
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.linger = 0
        if kind == zmq.SUB:
            sock.subscribe(b"")
        sock.connect(endpoint)
        if kind == zmq.DEALER:
            sock.send_multipart(codec.encode(HELLO))
        hub.until(lambda: sum(hub.hub.turned_away.counts.values()) >= 1)
        assert set(hub.hub.turned_away.counts) <= {  # whoever reads the other's greeting first hangs up
            "handshake failed (no keys)",
            "handshake failed (silent or closed)",
        }
        hub.run(lambda: hub.hub.announce(snapshot(1)))
        assert sock.poll(50) == 0
    assert hub.received == []
    assert hub.hub._subscribers == 0


async def test_wrong_key_is_rejected_and_named(hub: RunningHub, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    stranger = replace(run.actor, own=new_pair())
    with caplog.at_level(logging.WARNING):
        async with link_to(hub.hub, stranger) as link:
            await link.send(HELLO)
            await until(lambda: hub.hub.turned_away.counts["rejected"] >= 2, "a second attempt")
            name = f"127.0.0.1, key {stranger.own.public[:8]}…"
            assert set(hub.hub.rejected) == {name}
            assert hub.hub.rejected[name] >= 2
            assert link.problem == (
                f"the learner at {hub.hub.work_endpoint} does not accept this actor's key: put its public key"
                f" {stranger.own.public} into RUN/keys/allowed/NAME.pub there"
            )
    assert hub.received == []
    lines = [record.getMessage() for record in caplog.records]
    assert sum("does not accept this actor's key" in line for line in lines) == 1, "said once, not at every attempt"
    assert any(f"turned away a connection (rejected): {name} is not on the allow-list" in line for line in lines)
    assert run.learner.own.secret not in caplog.text
    assert stranger.own.secret not in caplog.text


async def test_key_of_another_run_opens_nothing_here(hub: RunningHub, tmp_path: Path, run: Run) -> None:
    """All that the other run's actors have; and their pair with this learner's public key."""
    other = Run(tmp_path / "other")
    async with link_to(hub.hub, other.actor) as link:
        await link.send(HELLO)
        await until(lambda: hub.hub.turned_away.counts["handshake failed (other keys)"] >= 3, "three attempts")
        await until(lambda: link.problem, "the link to say so")
        assert "it is not the learner whose public key is in this actor's key file" in link.problem
        assert hub.hub.rejected == {}
    async with link_to(hub.hub, replace(other.actor, learner=run.actor.learner)) as link:
        await link.send(HELLO)
        await until(lambda: hub.hub.rejected, "the rejection")
        assert set(hub.hub.rejected) == {f"127.0.0.1, key {other.actor.own.public[:8]}…"}
    assert hub.received == []


async def test_actor_tells_nothing_to_a_learner_that_is_not_its_own(run: Run, tmp_path: Path) -> None:
    """Somebody listens at the learner's address, with an allow-list that has this actor's key on it."""
    other = Run(tmp_path / "other")
    allow(other.learner.allowed, "victim", run.actor.own.public)
    with RunningHub(keys=other.learner, answer=answer) as impostor:
        async with link_to(impostor.hub, run.actor) as link:
            await link.send(HELLO)
            await until(lambda: link.problem, "the link to see it")
    assert impostor.received == []


async def test_actor_with_keys_tells_nothing_to_a_hub_without(run: Run) -> None:
    with RunningHub(answer=answer) as plain:
        async with link_to(plain.hub, run.actor) as link:
            await link.send(HELLO)
            await until(lambda: "uses no keys, this actor does" in link.problem, "the link to see it")
            plain.until(lambda: sum(plain.hub.turned_away.counts.values()) >= 1)
    assert plain.received == []


async def test_actor_without_keys_is_told_what_the_learner_wants(hub: RunningHub) -> None:
    async with link_to(hub.hub, None) as link:
        await link.send(HELLO)
        await until(lambda: "wants keys, this actor has none" in link.problem, "the link to see it")


async def test_actor_recovers_when_its_key_is_allowed(hub: RunningHub, run: Run) -> None:
    """Rejected on all three sockets; then the key is put on the list, and nothing is restarted."""
    late = replace(run.actor, own=new_pair())
    async with link_to(hub.hub, late) as link:
        link.open_weights(hub.hub.bulk_endpoint, hub.hub.news_endpoint)
        await until(lambda: hub.hub.turned_away.counts["rejected"] >= 4, "rejections")
        listening = asyncio.ensure_future(link.receive())
        allow(run.learner.allowed, "late", late.own.public)
        await until(lambda: not link.problem, "the link to be let in")
        await until(lambda: hub.hub._subscribers == 1, "the subscription")
        await soon(link.send(HELLO))
        assert await soon(listening) == Beat(7), "whoever waited goes on waiting over the refusal"
        hub.run(lambda: hub.hub.announce(snapshot(1)))
        assert (await soon(link.fetch_update())).manifest == snapshot(1).manifest


async def test_sender_that_waits_at_a_refused_socket_goes_on_when_it_is_let_in(hub: RunningHub, run: Run) -> None:
    late = replace(run.actor, own=new_pair())
    async with link_to(hub.hub, late) as link:
        await until(lambda: link.problem, "the refusal")

        async def hello() -> None:
            while hub.received == []:
                await link.send(HELLO)
                await asyncio.sleep(0.01)

        sending = asyncio.ensure_future(hello())
        await until(lambda: hub.hub.turned_away.counts["rejected"] >= 4, "rejections")
        allow(run.learner.allowed, "late", late.own.public)
        await soon(sending)
        assert await soon(link.receive()) == Beat(7)


async def test_withdrawn_key_keeps_its_connection_and_gets_no_other(hub: RunningHub, run: Run) -> None:
    async with link_to(hub.hub, run.actor) as link:
        assert await is_served(link)
        (run.learner.allowed / "actors.pub").unlink()
        assert await is_served(link), "CURVE asks at the handshake"
        async with link_to(hub.hub, run.actor, "actor-1") as second:
            await second.send(HELLO)
            await until(lambda: hub.hub.turned_away.counts["rejected"] >= 1, "the rejection")
        link.reconnect(hub.hub.work_endpoint, run.actor)
        await until(lambda: link.problem, "the refusal of a new connection")
    assert {message.actor for _, message in hub.received if isinstance(message, Hello)} == {"actor-0"}


async def test_link_takes_new_keys_to_a_learner_that_has_new_ones(run: Run, tmp_path: Path) -> None:
    """Keys were rotated: the learner is back at the same addresses, with others."""
    rotated = Run(tmp_path / "rotated")
    with RunningHub(keys=run.learner, answer=answer) as first:
        async with link_to(first.hub, run.actor) as link:
            link.open_weights(first.hub.bulk_endpoint, first.hub.news_endpoint)
            assert await is_served(link)
            with RunningHub(keys=rotated.learner, answer=answer) as second:
                link.reconnect(second.hub.work_endpoint, rotated.actor)
                link.open_weights(second.hub.bulk_endpoint, second.hub.news_endpoint)
                assert await is_served(link)
                await until(lambda: second.hub._subscribers == 1, "the subscription")
                with pytest.raises(ValueError, match="learner address: found 'bad'"):
                    link.reconnect("bad", run.actor)
                assert await is_served(link), "a malformed address changes nothing, nor do the keys that came with it"
        assert not second.hub.turned_away.counts


# --- bytes that are not ZeroMQ's, or not of now ---


class Recorder:
    """Context manager: a TCP proxy before a port that keeps what both sides say."""

    def __init__(self, port: int) -> None:
        self._port, self._threads, self.halves = port, [], []
        self.to_server: socket.socket
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.1)
        self._stop = threading.Event()
        self.endpoint = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                near.settimeout(None)
                self.to_server = far
                for source, target in ((near, far), (far, near)):
                    kept = bytearray()
                    self.halves.append(kept)
                    self._start(self._pump, source, target, kept)

    def _pump(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                kept += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def bytes(self) -> tuple[bytes, bytes]:
        """What the client and what the server said on the first connection."""
        return bytes(self.halves[0]), bytes(self.halves[1])

    def __enter__(self) -> Recorder:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._server.close()


def honest_exchange(endpoint: str, pair: ActorKeys, more: list[bytes]) -> None:
    """A whole connection: hello, its answer, goodbye to the connection. `more`: further frames, no message."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = int(DEADLINE_S * 1000)
        sock.rcvtimeo = int(DEADLINE_S * 1000)
        sock.curve_serverkey, sock.curve_publickey = pair.learner.encode(), pair.own.public.encode()
        sock.curve_secretkey = pair.own.secret.encode()
        sock.connect(endpoint)
        for frame in more:
            sock.send(frame)
        sock.send_multipart(codec.encode(HELLO))
        assert codec.decode_from_learner(sock.recv_multipart()) == Beat(7)


@pytest.mark.parametrize("pace", ["at once", "in turn"])
def test_replayed_connection_is_not_let_in(hub: RunningHub, run: Run, pace: str) -> None:
    """Byte for byte what an honest actor sent, also at the pace of the hub's answers."""
    with Recorder(port_of(hub.hub.work_endpoint)) as recorder:
        honest_exchange(recorder.endpoint, run.actor, [])
    sent, _ = recorder.bytes()
    assert len(hub.received) == 1
    greeting, hello = 64, 202
    with connect(hub.hub) as sock:
        if pace == "in turn":
            for part, answer_bytes in ((sent[:greeting], 64), (sent[greeting : greeting + hello], 170)):
                sock.sendall(part)
                while answer_bytes:
                    answer_bytes -= len(sock.recv(answer_bytes))
            sent = sent[greeting + hello :]
        sock.sendall(sent)
        assert read_to_the_end(sock)[64 + 170 :] == b"", "nothing behind the welcome that anybody gets"
    kind = "other keys" if pace == "in turn" else "protocol"
    hub.until(lambda: hub.hub.turned_away.counts == {f"handshake failed ({kind})": 1})
    assert len(hub.received) == 1, "the hello was not taken a second time"
    assert hub.hub.rejected == {}


def test_doubled_frame_is_not_taken_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody on the way doubles a frame of a live connection: its number does not fit any more. The connection ends,
    at once or when its heartbeat is missed, and ZeroMQ makes a new one."""
    monkeypatch.setattr(sockets, "TRANSPORT_HEARTBEAT_MS", 1000)
    with (
        RunningHub(keys=run.learner, answer=answer) as hub,
        Recorder(port_of(hub.hub.work_endpoint)) as recorder,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as sock,
    ):
        sock.linger, sock.rcvtimeo = 0, int(DEADLINE_S * 1000)
        sock.curve_serverkey, sock.curve_publickey = run.actor.learner.encode(), run.actor.own.public.encode()
        sock.curve_secretkey = run.actor.own.secret.encode()
        sock.connect(recorder.endpoint)
        sock.send_multipart(codec.encode(HELLO))
        sock.recv_multipart()
        before = len(recorder.bytes()[0])
        sock.send_multipart(codec.encode(HELLO))
        sock.recv_multipart()
        recorder.to_server.sendall(recorder.bytes()[0][before:])
        sent = 2
        deadline = time.monotonic() + DEADLINE_S
        while len(recorder.halves) < 4 or not sock.poll(50):  # on a connection of its own
            assert time.monotonic() < deadline
            sock.send_multipart(codec.encode(HELLO))
            sent += 1
        assert len(hub.received) <= sent
        assert hub.hub.turned_away.counts == {"handshake failed (protocol)": 1}


def test_noise_is_cut_and_counted(hub: RunningHub) -> None:
    noise = random.Random(1).randbytes(1_000_000)
    for start in (b"", b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31)):
        with connect(hub.hub) as sock:
            with contextlib.suppress(OSError):  # it is cut long before the end
                sock.sendall(start + noise)
            read_to_the_end(sock)
    hub.until(lambda: sum(hub.hub.turned_away.counts.values()) == 2)
    assert hub.hub.turned_away.counts["handshake failed (not ZeroMQ)"] >= 1
    assert hub.received == []


@pytest.mark.parametrize("says", ["nothing", "half a greeting", "a greeting", "half a hello"])
def test_peer_that_does_not_go_on_is_cut(run: Run, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_MS", 200)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\x00" + bytes(31)
    hello = b"\x04\xc8\x05HELLO\x01\x00" + bytes(72)
    words = {"nothing": b"", "half a greeting": greeting[:12], "a greeting": greeting, "half a hello": greeting + hello}
    with RunningHub(keys=run.learner) as running, connect(running.hub) as sock:
        sock.sendall(words[says])
        read_to_the_end(sock)
        running.until(lambda: running.hub.turned_away.counts == {"handshake failed (silent or closed)": 1})
    assert running.received == []


def test_port_scan_leaves_counts_and_nothing_else(hub: RunningHub, run: Run) -> None:
    for _ in range(50):
        for endpoint in (hub.hub.work_endpoint, hub.hub.bulk_endpoint, hub.hub.news_endpoint):
            socket.create_connection(("127.0.0.1", port_of(endpoint)), DEADLINE_S).close()
    hub.until(lambda: sum(hub.hub.turned_away.counts.values()) == 150)
    honest_exchange(hub.hub.work_endpoint, run.actor, [])
    assert [message for _, message in hub.received] == [HELLO]
    hub.until(lambda: not any(listener.connections for listener in hub.hub._door._listeners))


def test_allowed_peers_that_come_and_go_are_not_counted_as_turned_away(hub: RunningHub, run: Run) -> None:
    for _ in range(5):
        honest_exchange(hub.hub.work_endpoint, run.actor, [])
    hub.until(lambda: not any(listener.connections for listener in hub.hub._door._listeners))
    assert not hub.hub.turned_away.counts


def test_many_rejected_names_are_kept_up_to_a_bound(hub: RunningHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "NAMED_AT_MOST", 3)
    strangers = [new_pair() for _ in range(5)]
    with zmq.Context() as context:
        for number, pair in enumerate(strangers, start=1):
            with context.socket(zmq.DEALER) as sock:
                sock.linger = 0
                sock.curve_serverkey, sock.curve_publickey = run.actor.learner.encode(), pair.public.encode()
                sock.curve_secretkey = pair.secret.encode()
                sock.connect(hub.hub.work_endpoint)
                hub.until(lambda count=number: hub.hub.turned_away.counts["rejected"] == count)
    named = {f"127.0.0.1, key {pair.public[:8]}…": 1 for pair in strangers[:3]}
    assert hub.hub.rejected == named | {"others": 2}


def test_hub_with_keys_binds_any_address_of_this_machine(run: Run) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no other address than loopback")
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no other address than loopback")
    hub = Hub(address, 0, keys=run.learner)
    hub.close()
    assert hub.work_endpoint.startswith(f"tcp://{address}:")
    with pytest.raises(ValueError, match=f"wire.host: found '{address}', allowed without keys: a loopback address"):
        Hub(address, 0)


def test_environment_and_arguments_hold_no_secret(run: Run) -> None:
    """This process has loaded both sides' keys."""
    text = Path("/proc/self/environ").read_bytes() + Path("/proc/self/cmdline").read_bytes()
    assert run.learner.own.secret.encode() not in text
    assert run.actor.own.secret.encode() not in text
    assert os.environ
