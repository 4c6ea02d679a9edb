"""A dense weight update over the hub's sockets, beside the same bytes through raw loopback TCP, in one run.

The receiver is a process of its own in both cases. An update is fetch (windowed chunk pull), staging to shared memory
and the check of every digest; raw TCP receives into memory and throws it away.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from actor.staging import Staging
from protocol.messages import Manifest, Welcome
from protocol.sockets import Hub, Link
from protocol.weights import layout, make_snapshot

ROUNDS = 5
SEND_BYTES = 1 << 20


def measure(total_bytes: int, tensors: int = 272) -> dict[str, Any]:
    """Seconds and GB/s, medians of ROUNDS each, the two ways in turn."""
    data = np.random.default_rng(0).integers(0, 256, total_bytes // (2 * tensors) * 2 * tensors, dtype=np.uint8)
    each = len(data) // tensors
    specs = layout((f"tensor.{i}", "bfloat16", (each // 2,)) for i in range(tensors))
    began = time.perf_counter()
    snapshot = make_snapshot(1, 0, specs, data.data)
    digest_s = time.perf_counter() - began
    updates, raw = [], []
    for number in range(ROUNDS):
        raw.append(raw_tcp(data))
        updates.append(update(snapshot, number))
    update_s = statistics.median(row["seconds"] for row in updates)
    raw_s = statistics.median(raw)
    return {
        "bytes": len(data),
        "digest_s": digest_s,
        "update_s": update_s,
        "update_gb_per_s": len(data) / update_s / 1e9,
        "pull_only_s": statistics.median(row["pull_s"] for row in updates),
        "raw_tcp_s": raw_s,
        "raw_tcp_gb_per_s": len(data) / raw_s / 1e9,
        "update_over_raw_tcp": update_s / raw_s,
    }


def raw_tcp(data: np.ndarray) -> float:
    """Seconds from the first byte to the receiver's word that it has all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = _start(_receive_raw, server.getsockname()[1], len(data))
        connection, _ = server.accept()
        with connection:
            began = time.perf_counter()
            connection.sendall(data)
            assert connection.recv(2) == b"ok"
            seconds = time.perf_counter() - began
        child.join(timeout=60)
    return seconds


def _receive_raw(port: int, total: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        buffer = bytearray(SEND_BYTES)
        while total:
            total -= connection.recv_into(buffer, min(SEND_BYTES, total))
        connection.sendall(b"ok")


def update(snapshot: Any, number: int) -> dict[str, float]:
    """One actor's fetch, staging and check, and the pull alone, as the actor measures them."""
    hub = Hub("127.0.0.1", 0)
    stop = threading.Event()

    def serve() -> None:
        hub.announce(snapshot)
        while not stop.is_set():
            for _ in hub.poll(0.1):
                pass
        hub.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = _start(_pull, hub.bulk_endpoint, hub.news_endpoint, hub.work_endpoint, number, theirs)
    try:
        assert ours.poll(120), "the puller gave no figures within 120 s"
        figures: dict[str, float] = ours.recv()
    finally:
        stop.set()
        hub.wake()
        thread.join(timeout=10)
        child.join(timeout=60)
    return figures


def _pull(bulk: str, news: str, work: str, number: int, result: Connection) -> None:
    async def pull() -> dict[str, float]:
        link = Link(work, "bench", f"{number}")
        link.open_weights(bulk, news)
        welcome = Welcome("bench", "", "bfloat16", 1, bulk, news, 1.0, 15.0, 0, 1)
        staging = Staging("bench", "bench", f"{number}")
        manifest: Manifest = await link.fetch_manifest()
        began = time.perf_counter()
        await link.fetch(manifest, welcome.chunk_bytes, welcome.window, lambda offset, data: None)
        pull_s = time.perf_counter() - began
        staged = await staging.fetch(link, manifest, welcome)
        staging.remove()
        link.close()
        return {"seconds": staged.seconds, "pull_s": pull_s}

    result.send(asyncio.run(pull()))


def _start(target: Any, *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process
