"""A weight update to another process: dense and as a delta, beside raw TCP, raw ZeroMQ and torch.save, in one run.

The versions are those of a real model between updates at two learning rates (`weight_versions.py`). Dense and delta
take turns, version by version, each through a hub and a staging directory of its own; the receiver is a process of its
own every time. An update is encode (digests, and the delta), wire, decode (into the slot) and check (digests again);
the engine's own reload is the same for both and measured apart (`pause`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from actor.staging import Staging
from protocol.deltas import DeltaCoder
from protocol.hub import Hub
from protocol.link import Link
from protocol.messages import Sampling, Welcome
from protocol.tensors import tensor_view
from protocol.weights import Snapshot, make_snapshot

if TYPE_CHECKING:  # the receivers are processes of their own and need no torch
    import torch

LEARNING_RATES = (1e-6, 1e-5)
VERSIONS = 8
SETTLED = 3
"""Versions before the first that counts: a snapshot, the first delta (a second slot is filled), one more."""
ROUNDS = 5
PAIRS = 20
"""Of a dense update and a raw one, one after the other."""
CHUNK_BYTES = 8 << 20
TIMEOUT_S = 120.0
STAGES = ("encode", "wire", "decode", "check")


def measure(engine: bool = True) -> dict[str, Any]:
    """Medians of bytes and seconds. `engine`: measure a real engine's pause, too, which takes a minute."""
    from benchmarks.weight_versions import versions

    found: dict[str, Any] = {}
    for lr in LEARNING_RATES:
        made = list(versions(lr, VERSIONS))
        found[f"lr {lr:g}"] = compare(made)
    specs, last = made[-1]
    data = last.numpy()
    state = {spec.name: tensor_view(spec, last) for spec in specs}
    raw: dict[str, list[dict[str, float]]] = {"raw TCP": [], "raw ZeroMQ": [], "torch.save": []}
    with Receiver("again") as dense:  # in turn with what it is compared with: this machine is not the same all the time
        shares = []
        for number in range(1, SETTLED + PAIRS + 1):
            row = dense.update(number, specs, data.data)
            raw["raw TCP"].append({"wire": raw_tcp(data)})
            raw["raw ZeroMQ"].append({"wire": raw_zmq(data)})
            if number > SETTLED:
                shares.append(raw["raw ZeroMQ"][-1]["wire"] / row["wire"])
    for _ in range(ROUNDS):
        raw["torch.save"].append(torch_save(state))
    for name, rows in raw.items():
        found[name] = _medians(rows[-PAIRS:]) | {"bytes": len(data)}
    found["dense_wire_over_raw_zmq"] = statistics.quantiles(shares, n=4)
    if engine:
        found["pause_s"] = pause()
    return found


def compare(made: list[Any]) -> dict[str, Any]:
    """The versions dense and as deltas, in turn."""
    rows: dict[str, list[dict[str, float]]] = {"dense": [], "delta": []}
    with Receiver("dense") as dense, Receiver("delta") as delta:
        for number, (specs, buffer) in enumerate(made, start=1):
            for way, receiver in (("dense", dense), ("delta", delta)):
                row = receiver.update(number, specs, buffer.numpy().data)
                if number > SETTLED:
                    rows[way].append(row)
    figures: dict[str, Any] = {way: _medians(rows[way]) for way in rows}
    figures["delta_bytes"] = [row["bytes"] for row in rows["delta"]]
    figures["changed"] = [
        float(np.mean(old.numpy().view("<u2") != new.numpy().view("<u2")))
        for (_, old), (_, new) in zip(made[SETTLED - 1 :], made[SETTLED:], strict=False)
    ]
    figures["smaller"] = figures["dense"]["bytes"] / figures["delta"]["bytes"]
    figures["faster"] = figures["dense"]["total"] / figures["delta"]["total"]
    return figures


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    totals = [sum(row.get(stage, 0.0) for stage in STAGES) for row in rows]
    return found | {"total": statistics.median(totals)}


class Receiver:
    """A hub in a thread, and an actor's staging in a process that follows it."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.coder = DeltaCoder()
        self.last: Snapshot | None = None

    def __enter__(self) -> Receiver:
        self.hub = Hub("127.0.0.1", 0)
        self._offers: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        endpoints = self.hub.work_endpoint, self.hub.bulk_endpoint, self.hub.news_endpoint
        self._child = _start(_follow, f"bench-{self.way}-{os.getpid()}", *endpoints, theirs)
        self._answer()  # it listens
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._child.join(TIMEOUT_S)
        self._stop.set()
        self.hub.wake()
        self._thread.join(TIMEOUT_S)

    def _serve(self) -> None:
        while not self._stop.is_set():
            for _ in self.hub.poll(0.1):
                pass
            while self._offers:
                snapshot, delta, sent = self._offers.pop(0)
                sent.append(time.monotonic())
                self.hub.announce(snapshot, delta)
        self.hub.close()

    def update(self, version: int, specs: Any, data: memoryview) -> dict[str, float]:
        """One version: seconds of every stage, and bytes."""
        began = time.monotonic()
        snapshot = make_snapshot(version, version, specs, data)
        delta = self.coder.encode(self.last, snapshot) if self.way == "delta" and self.last else None
        encoded = time.monotonic()
        self.last = snapshot
        sent: list[float] = []
        self._pipe.send(version)
        self._offers.append((snapshot, delta, sent))
        self.hub.wake()
        heard, stages = self._answer()
        wire = heard - sent[0] + stages.get("fetch", 0.0)
        size = delta[0].nbytes if delta else snapshot.manifest.total_bytes
        return {
            "encode": encoded - began, "wire": wire, "decode": stages.get("decode", 0.0), "check": stages["check"],
            "bytes": size,
        }  # fmt: skip

    def _answer(self) -> Any:
        assert self._pipe.poll(TIMEOUT_S), f"the receiver of {self.way} gave no answer within {TIMEOUT_S:.0f} s"
        return self._pipe.recv()


def _follow(run: str, work: str, bulk: str, news: str, pipe: Connection) -> None:
    async def follow() -> None:
        link = Link(work, "bench", run)
        link.open_weights(bulk, news)
        staging = Staging(run)
        welcome = Welcome(run, "", "bfloat16", 1, bulk, news, 1.0, 15.0, 0, 1, chunk_bytes=CHUNK_BYTES)
        pipe.send(None)
        serving = 0
        while (version := await asyncio.to_thread(pipe.recv)) is not None:
            heard = None
            with contextlib.suppress(TimeoutError):  # the first subscription may come too late for the first news
                heard = await asyncio.wait_for(link.news(), 2.0)
            at = time.monotonic()
            staged = await staging.bring(link, welcome, heard, version, serving)
            assert staged is not None
            staged.release()
            serving = staged.manifest.version
            pipe.send((at, staged.seconds))
        staging.leave()
        link.close()

    asyncio.run(follow())


# --- what it is compared with ---


def raw_tcp(data: np.ndarray) -> float:
    """Seconds from the first byte to the receiver's word that it has all."""
    with _listening(_receive_raw, len(data)) as connection:
        began = time.perf_counter()
        connection.sendall(data.data)
        assert connection.recv(2) == b"ok"
        return time.perf_counter() - began


def _receive_raw(port: int, total: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        buffer = bytearray(1 << 20)
        while total:
            total -= connection.recv_into(buffer, min(len(buffer), total))
        connection.sendall(b"ok")


def raw_zmq(data: np.ndarray) -> float:
    """The same through one ZeroMQ socket, in the chunks of a pull, without copies."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.rcvtimeo = int(TIMEOUT_S * 1000)
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        child = _start(_receive_zmq, port, len(data))
        sock.recv()
        began = time.perf_counter()
        view = data.data
        for start in range(0, len(data), CHUNK_BYTES):
            sock.send(view[start : start + CHUNK_BYTES], copy=False)
        sock.recv()
        seconds = time.perf_counter() - began
        child.join(TIMEOUT_S)
    return seconds


def _receive_zmq(port: int, total: int) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.connect(f"tcp://127.0.0.1:{port}")
        sock.send(b"ready")
        while total:
            total -= len(sock.recv(copy=False).buffer)
        sock.send(b"ok")


def torch_save(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a script does: torch.save, one socket, torch.load. Nothing is checked."""
    import torch

    began = time.perf_counter()
    file = io.BytesIO()
    torch.save(state, file)
    encoded = time.perf_counter()
    data = file.getbuffer()
    with _listening(_receive_and_load, len(data)) as connection:
        assert connection.recv(5) == b"ready"
        sending = time.perf_counter()
        connection.sendall(data)
        decode = float(connection.recv(64))
        seconds = time.perf_counter() - sending
    return {"encode": encoded - began, "wire": seconds - decode, "decode": decode, "bytes": len(data)}


def _receive_and_load(port: int, total: int) -> None:
    import torch

    with socket.create_connection(("127.0.0.1", port)) as connection:
        buffer = memoryview(bytearray(total))
        connection.sendall(b"ready")
        have = 0
        while have < total:
            have += connection.recv_into(buffer[have:])
        began = time.perf_counter()
        torch.load(io.BytesIO(buffer), weights_only=True)
        connection.sendall(str(time.perf_counter() - began).encode())


@contextlib.contextmanager
def _listening(receiver: Any, total: int) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        child = _start(receiver, server.getsockname()[1], total)
        connection, _ = server.accept()
        connection.settimeout(TIMEOUT_S)
        with connection:
            yield connection
        child.join(TIMEOUT_S)


def _start(target: Any, *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


# --- the engine ---


def pause() -> float:
    """Median seconds that a real engine stands still to load a staged version, with nothing else to do."""
    from actor.vllm_engine import VLLMEngine
    from deploy.models import resolve_model
    from protocol.messages import Manifest

    model = resolve_model("bundled", lambda line: None)
    path = next(model.glob("*.safetensors"))

    async def load() -> float:
        engine = VLLMEngine()
        welcome = Welcome("bench", str(model), "bfloat16", 256, "", "", 1.0, 15.0, 0, 1, engine={"max_running": 8})
        await engine.start(welcome)
        try:
            pauses = []
            for version in range(1, 2 + ROUNDS):
                pauses.append(await engine.load(Manifest(version, version, (), 0, ""), path))
                await engine.generate(f"r{version}", (1, 2, 3), Sampling(max_tokens=4), 0, str(version))
            return statistics.median(pauses[1:])
        finally:
            await engine.stop()

    return asyncio.run(load())
