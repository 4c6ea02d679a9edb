"""What CURVE costs beside plain sockets, for groups and for dense weights; and what a flood of strangers costs.

Plain and CURVE take turns on this machine, each with a hub in this process and an actor's link in one of its own, so
that ratios hold although the machine is not the same all the time. Under the flood the same actor sends the same groups
beside nothing, beside strangers who knock as fast as one process can, and beside a process that only burns as much CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import os
import random
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from protocol.hub import Hub
from protocol.keys import LearnerKeys, load_actor_keys, load_learner_keys, make_keys
from protocol.link import Link
from protocol.messages import Ack, Completion, Group, TicketId
from protocol.weights import layout, make_snapshot

GROUPS = 3_000
COMPLETIONS, TOKENS, PROMPT = 8, 256, 200
IN_FLIGHT = 32
"""Groups that an actor has sent and that are not acknowledged yet."""
DENSE_BYTES = 269_000_000
"""The bundled model in bfloat16."""
CHUNK_BYTES, WINDOW = 8 << 20, 4
PAIRS = 12
FLOOD_ROUNDS = 8
HELD = 5_000
"""Connections that the strangers hold at once."""
TIMEOUT_S = 120.0


def measure() -> dict[str, Any]:
    """Medians and, of what was paired, quartiles of the ratios."""
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "keys"
        make_keys(keys)
        with Serving(None) as plain, Serving(keys) as curve:
            groups = _pairs(plain, curve, "groups", GROUPS)
            dense = _pairs(plain, curve, "pull", DENSE_BYTES)
        with Serving(keys) as serving:
            flood = _flood(serving)
    return {"groups": groups, "dense": dense, "flood": flood}


def _pairs(plain: Serving, curve: Serving, what: str, amount: int) -> dict[str, Any]:
    """Amount a second of both, in turn; `price`: plain / CURVE."""
    for serving in (plain, curve):
        serving.ask(what, amount)  # the first one fills buffers
    rates: dict[str, list[float]] = {"plain": [], "curve": []}
    for number in range(PAIRS):
        order = [("plain", plain), ("curve", curve)]
        for name, serving in order if number % 2 else reversed(order):
            rates[name].append(amount / serving.ask(what, amount))
    ratios = [before / after for before, after in zip(rates["plain"], rates["curve"], strict=True)]
    return {name: statistics.median(found) for name, found in rates.items()} | {
        "price": statistics.quantiles(ratios, n=4)
    }


class Serving:
    """Context manager: a hub in a thread that acknowledges groups and gives out weights, and an actor's link."""

    def __init__(self, keys: Path | None) -> None:
        self._keys = keys
        self._stop = threading.Event()

    def __enter__(self) -> Serving:
        keys: LearnerKeys | None = load_learner_keys(self._keys) if self._keys else None
        self.hub = Hub("127.0.0.1", 0, keys=keys)
        data = memoryview(os.urandom(DENSE_BYTES))
        self.hub.announce(make_snapshot(1, 1, layout([("w", "uint8", (DENSE_BYTES,))]), data))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        endpoints = self.hub.work_endpoint, self.hub.bulk_endpoint, self.hub.news_endpoint
        self._child = start(_act, *endpoints, str(self._keys / "actor.json") if self._keys else "", theirs)
        return self

    def _serve(self) -> None:
        while not self._stop.is_set():
            for peer, message in self.hub.poll(0.1):
                if isinstance(message, Group):
                    self.hub.send(peer, Ack((message.id,)))
        self.hub.close()

    def ask(self, what: str, amount: int) -> float:
        """Seconds that the actor needs for an amount of groups, or of bytes."""
        self._pipe.send((what, amount))
        assert self._pipe.poll(TIMEOUT_S), f"no end of {what} within {TIMEOUT_S:.0f} s"
        return float(self._pipe.recv())

    def __exit__(self, *_: object) -> None:
        self._pipe.send(("end", 0))
        self._child.join(TIMEOUT_S)
        self._stop.set()
        self.hub.wake()
        self._thread.join(TIMEOUT_S)


def _act(work: str, bulk: str, news: str, key_file: str, pipe: Connection) -> None:
    """The actor's process."""

    async def act() -> None:
        link = Link(work, "bench", "i", keys=load_actor_keys(Path(key_file)) if key_file else None)
        link.open_weights(bulk, news)
        try:
            while True:
                what, amount = await asyncio.to_thread(pipe.recv)
                if what == "end":
                    return
                began = time.perf_counter()
                await (_send_groups(link, amount) if what == "groups" else _pull(link, amount))
                pipe.send(time.perf_counter() - began)
        finally:
            link.close()

    asyncio.run(act())


async def _send_groups(link: Link, count: int) -> None:
    sent = acknowledged = 0
    while acknowledged < count:
        while sent < count and sent - acknowledged < IN_FLIGHT:
            await link.send(_group(sent))
            sent += 1
        message = await link.receive()
        assert isinstance(message, Ack)
        acknowledged += len(message.ids)


async def _pull(link: Link, size: int) -> None:
    data = bytearray(size)

    def write(offset: int, chunk: memoryview) -> None:
        data[offset : offset + len(chunk)] = chunk

    await link.fetch(1, size, CHUNK_BYTES, WINDOW, write)


_TOKENS = COMPLETIONS * TOKENS
_COMPLETION = Completion(TOKENS, ((1, 0),), "stop", {"reward": 1.0})


def _group(index: int) -> Group:
    return Group(
        id=TicketId(0, index), kind="train", attempt=1, actor="bench", prompt_ids=tuple(range(PROMPT)),
        temperature=1.0, completions=(_COMPLETION,) * COMPLETIONS, token_ids=bytes(4 * _TOKENS),
        logprobs=bytes(4 * _TOKENS), mask=b"\1" * _TOKENS,
    )  # fmt: skip


# --- strangers ---


def _flood(serving: Serving) -> dict[str, Any]:
    """Groups a second beside nothing, beside strangers, and beside processes that burn the CPU that those cost: their
    own, and what the hub's process needs for them beyond what it needs for the groups."""
    serving.ask("groups", GROUPS)
    ports = [int(e.rpartition(":")[2]) for e in (serving.hub.work_endpoint, serving.hub.bulk_endpoint)]
    rates: dict[str, list[float]] = {"alone": [], "strangers": [], "burning": []}
    shares, knocks = [], []
    for _ in range(FLOOD_ROUNDS):
        before = time.process_time()
        rates["alone"].append(GROUPS / serving.ask("groups", GROUPS))
        for_groups = time.process_time() - before
        with Load(_knock, ports) as strangers:
            before = time.process_time()
            seconds = serving.ask("groups", GROUPS)
            for_strangers = max(0.0, time.process_time() - before - for_groups)
        rates["strangers"].append(GROUPS / seconds)
        shares.append((strangers.cpu_s / strangers.wall_s) + for_strangers / seconds)
        knocks.append(strangers.count / strangers.wall_s)
        with contextlib.ExitStack() as stack:
            for _ in range(cores := math.ceil(shares[-1])):
                stack.enter_context(Load(_burn, shares[-1] / cores))
            rates["burning"].append(GROUPS / serving.ask("groups", GROUPS))
    ratios = [one / other for one, other in zip(rates["strangers"], rates["burning"], strict=True)]
    return {name: statistics.median(found) for name, found in rates.items()} | {
        "strangers_over_burning": statistics.quantiles(ratios, n=4),
        "cpu_share": statistics.median(shares),
        "connections_per_s": statistics.median(knocks),
        "turned_away": dict(serving.hub.turned_away.counts),
    }


class Load:
    """Context manager: a process that does something until it is left; then what CPU it took, and what it counted."""

    def __init__(self, work: Callable[..., None], argument: Any) -> None:
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self._child = start(work, argument, theirs)
        self.cpu_s = self.wall_s = 0.0
        self.count = 0

    def __enter__(self) -> Load:
        assert self._pipe.poll(TIMEOUT_S), "the load did not begin"
        self._pipe.recv()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send("stop")
        self.wall_s = time.perf_counter() - self._began
        assert self._pipe.poll(TIMEOUT_S), "the load did not end"
        self.cpu_s, self.count = self._pipe.recv()
        self._child.join(TIMEOUT_S)


def _knock(ports: list[int], pipe: Connection) -> None:
    """Strangers: connections as fast as they come, each with another beginning of a handshake, HELD at once."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\x00" + bytes(31)
    words = [b"", greeting[:10], greeting, greeting + b"\x04\xc8\x05HELLO\x01\x00", random.Random(0).randbytes(500)]
    held: deque[socket.socket] = deque()
    count, before = 0, 0.0
    while not pipe.poll():
        if count == HELD // 5:  # in full swing
            before = time.process_time()
            pipe.send("begun")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave no port waiting
        held.append(sock)
        count += 1
        try:
            sock.connect(("127.0.0.1", ports[count % len(ports)]))
            sock.sendall(words[count % len(words)])
        except OSError:  # cut already
            pass
        if len(held) > HELD:
            held.popleft().close()
    pipe.recv()
    pipe.send((time.process_time() - before, count - HELD // 5))


def _burn(share: float, pipe: Connection) -> None:
    """Only CPU, the share of a core that is asked for, a hundredth of a second at a time."""
    pipe.send("begun")
    before = time.process_time()
    while not pipe.poll():
        until = time.perf_counter() + 0.01
        spent = time.process_time() + 0.01 * share
        while time.process_time() < spent:
            pass
        time.sleep(max(0.0, until - time.perf_counter()))
    pipe.recv()
    pipe.send((time.process_time() - before, 0))


def start(target: Any, *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process
