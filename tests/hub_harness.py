"""A bare hub in a thread, for tests of what is connected to it; and small versions of weights. Not a test itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from protocol import codec
from protocol.deltas import payload_digest
from protocol.hub import Hub
from protocol.keys import LearnerKeys
from protocol.messages import Delta, DeltaPart, Message
from protocol.weights import Snapshot, layout, make_snapshot

DEADLINE_S = 20.0


def snapshot(version: int, size: int = 1000) -> Snapshot:
    data = _counting(version, size, 251)
    return make_snapshot(version, version, layout([("w", "uint8", (size,))]), memoryview(data))


def _counting(first: int, size: int, modulus: int) -> bytes:
    period = bytes((first + i) % modulus for i in range(modulus))
    return (period * (size // modulus + 1))[:size]


def delta(base: Snapshot, new: Snapshot, size: int = 10) -> tuple[Delta, bytes]:
    """What looks like the delta from one to the other, with a payload of a size: for those who only pass it on."""
    payload = _counting(3 * new.manifest.version, size, 241)
    digests = base.manifest.digest, new.manifest.digest
    parts = (DeltaPart(len(new.manifest.tensors), "delta", size),)
    versions = new.manifest.version, base.manifest.version
    return Delta(*versions, *digests, parts, size, payload_digest(payload)), payload


class RunningHub:
    """A hub polled by a thread. `run` calls a function in that thread, as only it may touch the sockets."""

    def __init__(
        self,
        port: int = 0,
        limits: codec.Limits | None = None,
        answer: Callable[..., Any] | None = None,
        keys: LearnerKeys | None = None,
    ) -> None:
        self.hub = Hub("127.0.0.1", port, limits or codec.Limits(), keys)
        self.received: list[tuple[bytes, Message]] = []
        self._answer = answer or (lambda hub, peer, message: None)
        self._calls: list[Callable[[], None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while not self._stop.is_set():
            for peer, message in self.hub.poll(0.5):
                self.received.append((peer, message))
                self._answer(self.hub, peer, message)
            while self._calls:
                self._calls.pop(0)()

    def run(self, function: Callable[[], Any]) -> Any:
        done, result = threading.Event(), []
        self._calls.append(lambda: (result.append(function()), done.set())[0])
        self.hub.wake()
        assert done.wait(DEADLINE_S)
        return result[0]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, (
                f"received {self.received[-5:]}, faults {self.hub.faults.counts}, {self.hub.turned_away.counts}"
            )
            time.sleep(0.005)

    def __enter__(self) -> RunningHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.hub.wake()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.hub.close()
