"""Ten thousand connections at a hub with keys: nothing is accepted, nothing stops, memory stays flat.

The strangers are a process of their own, since their sockets take as many file descriptors as the hub's.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from learner.__main__ import raise_file_limit
from protocol import codec, door, handshakes
from protocol.hub import Hub
from protocol.keys import ActorKeys, LearnerKeys, load_actor_keys, load_learner_keys, make_keys
from protocol.messages import Beat, Hello, Message
from tests.hub_harness import DEADLINE_S, RunningHub

STRANGERS = 10_000
GROWTH_BYTES = 64 << 20
"""Of the hub's process, of a second flood after a first: what connections need is 9 KB each while they are open."""
HELLO = Hello("actor-0", "i", slots=1)

FLOOD = """
import contextlib, random, resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
ports, count = [int(port) for port in sys.argv[1].split(",")], int(sys.argv[2])
greeting = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x01CURVE" + bytes(15) + b"\\x00" + bytes(31)
words = [b"", greeting[:10], greeting, greeting + b"\\x04\\xc8\\x05HELLO\\x01\\x00", random.Random(0).randbytes(500)]
held = []
for number in range(count):
    with contextlib.suppress(OSError):  # cut, or not let in for the moment
        held.append(socket.create_connection(("127.0.0.1", ports[number % 3]), 5))
        held[-1].sendall(words[number % 5])
    if number % 1000 == 999 or number == count - 1:
        print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run_keys(tmp_path: Path) -> tuple[LearnerKeys, ActorKeys]:
    make_keys(tmp_path / "keys")
    return load_learner_keys(tmp_path / "keys"), load_actor_keys(tmp_path / "keys" / "actor.json")


@contextlib.contextmanager
def file_limit(soft: int) -> Iterator[None]:
    """The process's limit of open files, for a while."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


class Honest:
    """Context manager: an allowed actor in a thread that says something and waits for the answer, again and again."""

    def __init__(self, hub: Hub, pair: ActorKeys) -> None:
        self._endpoint, self._pair = hub.work_endpoint, pair
        self.asked = self.answered = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
            sock.linger, sock.rcvtimeo = 0, int(DEADLINE_S * 1000)
            sock.curve_serverkey, sock.curve_publickey = self._pair.learner.encode(), self._pair.own.public.encode()
            sock.curve_secretkey = self._pair.own.secret.encode()
            sock.connect(self._endpoint)
            while not self._stop.is_set():
                self.asked += 1
                sock.send_multipart(codec.encode(HELLO))
                assert codec.decode_from_learner(sock.recv_multipart()) == Beat(self.asked)
                self.answered += 1

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert self.answered == self.asked, "every message was answered, in order"


class Strangers:
    """Context manager: a process that opens connections and holds them; some say nothing, some half a handshake."""

    def __init__(self, hub: Hub, count: int) -> None:
        ports = ",".join(end.rpartition(":")[2] for end in (hub.work_endpoint, hub.bulk_endpoint, hub.news_endpoint))
        self._count = count
        self._process = subprocess.Popen(
            [sys.executable, "-c", FLOOD, ports, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def knocked(self) -> int:
        """Waits until all have knocked; how many connections were made."""
        assert self._process.stdout is not None
        for _ in range(-(-self._count // 1000)):
            made = int(self._process.stdout.readline())
        return made

    def __enter__(self) -> Strangers:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def beats(hub: Hub, peer: bytes, message: Message) -> None:
    """Answers with the number of the message."""
    hub.counted = getattr(hub, "counted", 0) + 1  # type: ignore[attr-defined]
    hub.send(peer, Beat(hub.counted))  # type: ignore[attr-defined]


def standing(running: RunningHub) -> int:
    return sum(len(listener.connections) for listener in running.hub._door._listeners)


@pytest.mark.timeout(120)
def test_ten_thousand_strangers_are_counted_and_gone_while_an_actor_is_served(
    run_keys: tuple[LearnerKeys, ActorKeys], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: what the first flood leaves in the allocator is no leak, what the second adds would be one."""
    monkeypatch.setattr(handshakes, "HANDSHAKE_MS", 2000)
    raise_file_limit()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(STRANGERS, limit // 2)
    process, sizes, hub_keys = psutil.Process(), [], run_keys[0]
    with RunningHub(keys=hub_keys, answer=beats) as running, Honest(running.hub, run_keys[1]) as honest:
        running.until(lambda: honest.answered > 0)
        for flood in (1, 2):
            with Strangers(running.hub, count) as strangers:
                deadline, before = time.monotonic() + DEADLINE_S, honest.answered
                files = 0
                while standing(running) < min(500, count // 2):
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                while standing(running) > 1 and time.monotonic() < deadline:
                    (tmp_path / f"checkpoint-{flood}-{files}").write_bytes(os.urandom(4096))  # as the learner does
                    files += 1
                made = strangers.knocked()
                running.until(lambda: standing(running) <= 1)
                assert honest.answered > before + 10, "served while they stood there"
                assert files > 10
            refused = sum(running.hub.turned_away.counts[kind] for kind in running.hub.turned_away.counts)
            assert refused >= flood * made * 0.99, "each is counted; one beside an actor that joins may be missed"
            running.received.clear()
            sizes.append(process.memory_info().rss)
        assert made >= count * 0.9
        assert {kind.split(" (")[0] for kind in running.hub.turned_away.counts} <= {
            "handshake failed",
            "too many connections",
        }
        assert running.hub.rejected == {}
    assert sizes[1] - sizes[0] < GROWTH_BYTES, sizes
    mib = [size >> 20 for size in sizes]
    print(f"{made} connections of {count}; resident after the first flood and the second: {mib} MiB")


def test_more_connections_than_files_leave_the_learner_its_files(
    run_keys: tuple[LearnerKeys, ActorKeys], tmp_path: Path
) -> None:
    """The limit of open files is reached long before the strangers are cut: newcomers are sent away at once."""
    with (
        file_limit(len(os.listdir("/proc/self/fd")) + 1600),
        RunningHub(keys=run_keys[0], answer=beats) as running,
        Honest(running.hub, run_keys[1]) as honest,
    ):
        running.until(lambda: honest.answered > 0)
        allowed = running.hub._door.allowed
        assert 700 < allowed <= 800
        with Strangers(running.hub, 4000) as strangers:
            strangers.knocked()
            running.until(lambda: running.hub.turned_away.counts["too many connections"] > 200)
            before = honest.answered
            for number in range(20):
                (tmp_path / f"file-{number}").write_bytes(b"x")
            running.until(lambda: honest.answered > before + 10)
        running.until(lambda: standing(running) == 1)


def test_full_house_opens_again_when_strangers_leave(run_keys: tuple[LearnerKeys, ActorKeys]) -> None:
    with RunningHub(keys=run_keys[0], answer=beats) as running:
        running.hub._door.allowed = 8
        ports = [int(e.rpartition(":")[2]) for e in (running.hub.work_endpoint, running.hub.bulk_endpoint)]
        held = [socket.create_connection(("127.0.0.1", ports[number % 2]), DEADLINE_S) for number in range(8)]
        running.until(lambda: standing(running) == 8)
        with socket.create_connection(("127.0.0.1", ports[0]), DEADLINE_S) as late:
            late.settimeout(DEADLINE_S)
            with contextlib.suppress(ConnectionResetError):
                while late.recv(1024):
                    pass
        running.until(lambda: standing(running) == 8)
        assert running.hub.turned_away.counts == {"too many connections": 1}
        for sock in held:
            sock.close()
        with Honest(running.hub, run_keys[1]) as honest:  # it knocks until there is room
            running.until(lambda: honest.answered > 3)


@pytest.mark.parametrize(("soft", "in_use", "allowed"), [(1024, 100, 462), (20_000, 100, 9_950), (64, 60, 16)])
def test_connections_leave_a_share_of_the_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, in_use: int, allowed: int
) -> None:
    monkeypatch.setattr(door.resource, "getrlimit", lambda _: (soft, soft))
    monkeypatch.setattr(door.os, "listdir", lambda _: ["fd"] * in_use)
    assert door.connections_allowed() == allowed


def test_learner_takes_all_the_files_that_it_may_have() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with file_limit(min(hard, 500)):
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
