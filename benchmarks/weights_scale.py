"""One learner hub and 1 to 256 simulated actors on one machine: how long a version takes to reach the last of them.

python -m benchmarks.weights_scale [--actors 1,4,16,64,256] [--mib 16]

The hub, the wire, the staging and its checks are the real ones; the engines are not there. Every simulated actor is a
node of its own: its own link and its own staging directory. Many live in one process. One in ten is slow (it waits
before it pulls on, and holds what it has staged for a second); one in twenty is killed in the middle of a transfer,
which here means that its link and its locks are closed under it without a word. The seconds count until the last quick
survivor has a version's bytes, and until it has confirmed the right digest: between the two all nodes decode and check,
which they do here on the same cores. The slow are shown apart, since nobody else may wait for them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from actor.staging import Staging
from benchmarks.run import machine
from protocol import threads
from protocol.deltas import DeltaCoder
from protocol.errors import WeightsError
from protocol.hub import Hub
from protocol.link import Link
from protocol.messages import Welcome
from protocol.weights import Snapshot, layout, make_snapshot

RESULTS = Path(__file__).resolve().parent / "results"
TENSOR_BYTES = 1 << 20
CHANGED = 0.004
"""Share of elements that an update moves: as measured for lr 1e-6."""
ROUNDS = 6
PER_PROCESS = 64
SLOW_EVERY, KILLED_EVERY = 10, 20
SLOW_S = 0.5
"""A slow actor waits so long before every chunk, and after every announcement."""
DEADLINE_S = 300.0


def make_versions(total_bytes: int, count: int) -> list[tuple[Snapshot, Any]]:
    """(snapshot, delta from the one before) of synthetic bfloat16 weights."""
    draw = np.random.default_rng(0)
    tensors = total_bytes // TENSOR_BYTES
    specs = layout((f"tensor.{i}", "bfloat16", (TENSOR_BYTES // 2,)) for i in range(tensors))
    values = (draw.normal(0, 0.05, tensors * TENSOR_BYTES // 2).astype("<f4").view("<u4") >> 16).astype("<u2")
    coder = DeltaCoder()
    made: list[tuple[Snapshot, Any]] = [(make_snapshot(1, 0, specs, values.copy().view(np.uint8).data), None)]
    for version in range(2, count + 1):
        moved = draw.integers(0, len(values), int(CHANGED * len(values)))
        values[moved] += draw.choice(np.array([1, 65535], "<u2"), len(moved))
        snapshot = make_snapshot(version, version, specs, values.copy().view(np.uint8).data)
        made.append((snapshot, coder.encode(made[-1][0], snapshot)))
    return made


class ServingHub:
    """A hub in a thread of its own, as in the learner."""

    def __init__(self) -> None:
        self.hub = Hub("127.0.0.1", 0)
        self._offers: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while not self._stop.is_set():
            for _ in self.hub.poll(0.05):
                pass
            while self._offers:
                self.hub.announce(*self._offers.pop(0))
        self.hub.close()

    def announce(self, snapshot: Snapshot, delta: Any) -> None:
        self._offers.append((snapshot, delta))
        self.hub.wake()

    def __enter__(self) -> ServingHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.hub.wake()
        self._thread.join(20)


# --- the simulated actors ---


@dataclass
class Simulated:
    """One actor of one node."""

    name: str
    slow: bool
    doomed_at: int
    """Version during whose transfer it is killed; 0: it lives."""
    root: Path
    report: Callable[[tuple[str, int]], None]
    """Told (name, version) when it has confirmed one."""
    served: dict[int, tuple[str, float, float]] = field(default_factory=dict)
    """Version -> (digest of its manifest after the check of all tensors, when it had come, when it was confirmed)."""

    async def run(self, endpoints: tuple[str, str, str], run: str, chunk_bytes: int, last: int) -> None:
        work, bulk, news = endpoints
        link = SlowLink(work, self.name, "i") if self.slow else Link(work, self.name, "i")
        link.open_weights(bulk, news)
        self.root.mkdir(parents=True)
        staging = Staging(f"{run}-{self.name}", self.root)
        welcome = Welcome(run, "", "bfloat16", 1, bulk, news, 1.0, 15.0, 0, 1, chunk_bytes=chunk_bytes)
        serving = 0
        try:
            while serving < last:
                heard = None
                with contextlib.suppress(TimeoutError):
                    heard = await asyncio.wait_for(link.news(), 1.0)
                with contextlib.suppress(WeightsError):
                    if self.doomed_at and heard and heard.manifest.version >= self.doomed_at:
                        await self._die(staging.bring(link, welcome, None, heard.manifest.version, serving))
                        return
                    newest = heard.manifest.version if heard else 0
                    staged = await staging.bring(link, welcome, heard, newest, serving)
                    if staged is not None:
                        serving = staged.manifest.version
                        now = time.monotonic()
                        came = now - staged.seconds["decode"] - staged.seconds["check"]
                        self.served[serving] = staged.manifest.digest, came, now
                        self.report((self.name, serving))
                        if self.slow:
                            await asyncio.sleep(SLOW_S)
                        staged.release()
        finally:
            link.close()

    async def _die(self, pulling: Any) -> None:
        """In the middle of a transfer: a few turns of the loop after it began."""
        task = asyncio.ensure_future(pulling)
        for _ in range(random.Random(self.name).randint(1, 20)):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class SlowLink(Link):
    """Of an actor behind a bad line."""

    async def _send_bulk(self, message: Any) -> None:
        await asyncio.sleep(SLOW_S)
        await super()._send_bulk(message)


def is_slow(number: int) -> bool:
    return number % SLOW_EVERY == SLOW_EVERY - 1


def is_doomed(number: int) -> bool:
    return number % KILLED_EVERY == KILLED_EVERY - 2


def _simulate(
    names: list[int], endpoints: tuple[str, str, str], run: str, root: str, chunk: int, last: int, pipe: Connection
) -> None:
    threads.MAX_THREADS = 1  # for each node; and one node of a process at a time, there are two cores for all of them
    actors = [
        Simulated(
            f"actor-{number}",
            slow=is_slow(number),
            doomed_at=3 if is_doomed(number) else 0,
            root=Path(root) / f"node-{number}",
            report=pipe.send,
        )
        for number in names
    ]

    async def run_all() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        tasks = [asyncio.ensure_future(actor.run(endpoints, run, chunk, last)) for actor in actors]
        pipe.send("ready")
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*tasks)

    asyncio.run(run_all())
    pipe.send([(actor.name, actor.slow, bool(actor.doomed_at), actor.served) for actor in actors])


# --- one measurement ---


def measure(count: int, made: list[tuple[Snapshot, Any]], deltas: bool, root: Path) -> dict[str, Any]:
    """Every version announced to `count` actors, the next when all quick survivors have confirmed the one before."""
    last = made[-1][0].manifest.version
    chunk = 4 << 20
    spawn = multiprocessing.get_context("spawn")
    me = psutil.Process()
    peak, began_cpu = 0, 0.0
    with ServingHub() as serving:
        endpoints = serving.hub.work_endpoint, serving.hub.bulk_endpoint, serving.hub.news_endpoint
        pipes: list[Connection] = []
        children = []
        for start in range(0, count, PER_PROCESS):
            ours, theirs = spawn.Pipe()
            names = list(range(start, min(start + PER_PROCESS, count)))
            child = spawn.Process(
                target=_simulate, args=(names, endpoints, f"scale-{os.getpid()}", str(root), chunk, last, theirs)
            )
            child.start()
            children.append(child)
            pipes.append(ours)
        for pipe in pipes:
            assert pipe.poll(60), "simulated actors did not start"
            pipe.recv()
        deadline = time.monotonic() + DEADLINE_S
        while serving.hub._subscribers < count:
            assert time.monotonic() < deadline, f"{serving.hub._subscribers} of {count} actors subscribed"
            time.sleep(0.01)
        announced: dict[int, float] = {}
        before = me.memory_info().rss
        began, cpu = time.monotonic(), me.cpu_times()
        confirmed: dict[str, int] = {}
        found: list[Any] = []

        def listen() -> None:
            nonlocal peak
            assert time.monotonic() < deadline, f"not all actors came to an end: {confirmed}"
            for pipe in cast(list[Connection], multiprocessing.connection.wait(pipes, 0.05)):
                told = pipe.recv()
                if isinstance(told, list):
                    found.extend(told)
                    pipes.remove(pipe)
                else:
                    confirmed.__setitem__(*told)
            peak = max(peak, me.memory_info().rss)

        waited_for = [f"actor-{number}" for number in range(count) if not is_slow(number) and not is_doomed(number)]
        for snapshot, delta in made:
            version = snapshot.manifest.version
            announced[version] = time.monotonic()
            serving.announce(snapshot, delta if deltas else None)
            while any(confirmed.get(name, 0) < version for name in waited_for):
                listen()
        while pipes:
            listen()
        wall = time.monotonic() - began
        after = me.cpu_times()
        began_cpu = after.user + after.system - cpu.user - cpu.system
        sent = serving.hub.bytes_sent
        for child in children:
            child.join(20)
    digests = {snapshot.manifest.version: snapshot.manifest.digest for snapshot, _ in made}
    survivors = [row for row in found if not row[2]]
    wrong = [
        (name, version) for name, _, _, served in found for version, (digest, *_) in served.items()
        if digest != digests[version]
    ]  # fmt: skip
    assert not wrong, f"wrong digests confirmed: {wrong}"
    assert all(last in served for _, _, _, served in survivors), "a survivor does not serve the last version"
    settled = [version for version in announced if version > 2]

    def latency(rows: list[Any], version: int, what: int) -> float:
        """Seconds until the last of them had (1) or had confirmed (2) that version or a later one."""
        return max(
            min((row[what] for v, row in served.items() if v >= version), default=float("inf")) - announced[version]
            for *_, served in rows
        )

    quick = [row for row in survivors if not row[1]]
    slow = [row for row in survivors if row[1]]
    return {
        "actors": count,
        "way": "delta" if deltas else "dense",
        "killed": len(found) - len(survivors),
        "last_came_s": statistics.median(latency(quick, version, 1) for version in settled),
        "last_confirmed_s": statistics.median(latency(quick, version, 2) for version in settled),
        "last_slow_s": statistics.median(latency(slow, version, 2) for version in settled) if slow else None,
        "hub_cpu_share": began_cpu / wall,
        "hub_cpu_s_per_version": began_cpu / len(made),
        "rss_growth_mb": (peak - before) / 1e6,
        "mb_sent_per_version_and_actor": sent / 1e6 / len(made) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", default="1,4,16,64,256")
    parser.add_argument("--mib", type=int, default=16, help="size of a version")
    options = parser.parse_args()
    console = Console(width=170)
    made = make_versions(options.mib << 20, ROUNDS)
    rows = []
    for count in map(int, options.actors.split(",")):
        for deltas in (False, True):
            root = Path(tempfile.mkdtemp(prefix="weights-scale-", dir="/dev/shm"))
            try:
                rows.append(measure(count, made, deltas, root))
            finally:
                shutil.rmtree(root, ignore_errors=True)
            console.print(rows[-1])
    table = Table(*rows[0], title=f"versions of {options.mib} MiB, delta {made[-1][1][0].nbytes / 1e3:.0f} kB")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    described = machine() | {"command": f"python -m benchmarks.weights_scale --actors {options.actors}"}
    path = RESULTS / f"{described['date']}-{described['commit'] or 'uncommitted'}-weights-scale.json"
    delta_bytes = made[-1][1][0].nbytes
    path.write_text(
        json.dumps({"machine": described, "mib": options.mib, "delta_bytes": delta_bytes, "rows": rows}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
