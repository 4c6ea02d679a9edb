"""A hub, actors of one node, and a line of versions for them: what the tests of staging share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actor import staging as staging_module
from actor.locks import FileLock
from actor.staging import Staged, Staging
from protocol.deltas import Changes, DeltaCoder
from protocol.link import Link
from protocol.messages import Delta, TensorSpec, Update, Welcome
from protocol.weights import Snapshot, layout, make_snapshot
from tests.hub_harness import DEADLINE_S, RunningHub

WELCOME = Welcome(
    run="r", model="m", dtype="bfloat16", max_model_len=64, bulk="", news="", heartbeat_s=1.0, dead_after_s=15.0,
    seed=0, group_size=2, chunk_bytes=50, window=2,
)  # fmt: skip
SPECS = layout([("w", "bfloat16", (10, 20)), ("b", "float32", (7,)), ("scale", "float32", ())])
SIZE = 10 * 20 * 2 + 7 * 4 + 4
ALL_FILES = ["slot-0.safetensors", "slot-1.safetensors", "slots.json", "users.lock", "writing.lock"]

Version = tuple[Snapshot, tuple[Delta, bytes] | None]


def make_line(count: int, specs: tuple[TensorSpec, ...] = SPECS) -> dict[int, Version]:
    """Versions 1 to `count`: each changes five elements of `w`, every second one all of `b` as well."""
    chance, coder = np.random.default_rng(0), DeltaCoder(1)
    data = chance.integers(0, 256, SIZE, dtype=np.uint8)
    versions: dict[int, Version] = {1: (make_snapshot(1, 1, specs, data.data), None)}
    for version in range(2, count + 1):
        data = data.copy()
        data[32 + 2 * chance.choice(200, 5, replace=False)] ^= 1
        if version % 2 == 0:
            data[:28] = chance.integers(0, 256, 28, dtype=np.uint8)
        new = make_snapshot(version, version, specs, data.data)
        versions[version] = new, coder.encode(versions[version - 1][0], new)
    return versions


VERSIONS = make_line(6)


def nbytes(*versions: int) -> int:
    """Of the payloads of these versions' deltas."""
    return sum(delta[0].nbytes for version in versions if (delta := VERSIONS[version][1]))


@dataclass
class Actor:
    """What an actor has of it: a link and a staging."""

    staging: Staging
    link: Link
    welcome: Welcome = WELCOME

    async def bring(self, newest: int, serving: int = 0, news: Update | None = None) -> Staged | None:
        return await self.staging.bring(self.link, self.welcome, news, newest, serving)

    async def stage(self, newest: int, news: Update | None = None) -> Staged:
        """Bring a version, and have an engine load it at once."""
        staged = await self.bring(newest, newest - 1, news)
        assert staged is not None
        staged.release()
        return staged

    async def news_of(self, version: int) -> Update:
        while (news := await asyncio.wait_for(self.link.news(), DEADLINE_S)).manifest.version != version:
            pass
        return news

    @property
    def held(self) -> dict[int, int]:
        """Slot -> version, by the record."""
        return {slot: held.version for slot, held in self.staging._slots.held().items()}

    @property
    def files(self) -> list[str]:
        assert self.staging.directory is not None
        return sorted(path.name for path in self.staging.directory.iterdir())

    def die(self) -> None:
        """As kill -9 does: nothing is put in order, the kernel closes the files."""
        assert self.staging._users is not None
        self.staging._users.release()


class Bench:
    """A hub, and actors of one node under a root of the test's own."""

    def __init__(self, running: RunningHub, root: Path) -> None:
        self.running, self.root = running, root
        self.links: list[Link] = []

    def actor(self, run: str = "r") -> Actor:
        hub, name = self.running.hub, f"actor-{len(self.links)}"
        self.links.append(link := Link(hub.work_endpoint, name, "abc"))
        link.open_weights(hub.bulk_endpoint, hub.news_endpoint)
        self.running.until(lambda: hub._subscribers == len(self.links))
        return Actor(Staging(run, self.root), link)

    def offer(self, snapshot: Snapshot, delta: tuple[Delta, bytes] | None = None) -> None:
        self.running.run(lambda: self.running.hub.announce(snapshot, delta))

    def announce(self, *versions: int) -> None:
        for version in versions:
            self.offer(*VERSIONS[version])

    @property
    def bytes_sent(self) -> int:
        return self.running.run(lambda: self.running.hub.bytes_sent)  # not before the hub has counted all it sent


def assert_holds(staged: Staged, snapshot: Snapshot) -> None:
    """Bit for bit, by safetensors' own reader."""
    assert staged.manifest == snapshot.manifest
    loaded = load_file(staged.path)
    assert set(loaded) == {spec.name for spec in snapshot.manifest.tensors}
    for spec in snapshot.manifest.tensors:
        assert tuple(loaded[spec.name].shape) == spec.shape
        data = loaded[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data == bytes(snapshot.data[spec.offset : spec.offset + len(data)]), spec.name


def assert_is(staged: Staged, version: int, form: str, slot: int) -> None:
    """Staged.form says how it came; bit for bit."""
    assert (staged.manifest.version, staged.form, staged.path.name) == (version, form, f"slot-{slot}.safetensors")
    assert_holds(staged, VERSIONS[version][0])


def spied_copies(monkeypatch: pytest.MonkeyPatch) -> list[Changes | None]:
    """What changed between the slots as far as is known, for every copy of one to the other."""
    seen: list[Changes | None] = []
    copy = staging_module.copy

    def spy(source: Any, target: Any, changed: Changes | None) -> None:
        seen.append(changed)
        copy(source, target, changed)

    monkeypatch.setattr(staging_module, "copy", spy)
    return seen


def bytes_of(changed: Changes) -> set[int]:
    """Bytes of a version that the runs' elements cover."""
    found: set[int] = set()
    for run, indices, _ in changed:
        elements = range((run.stop - run.start) // run.itemsize) if indices is None else indices.tolist()
        found |= {run.start + run.itemsize * n + byte for n in elements for byte in range(run.itemsize)}
    return found


def differing(first: int, second: int) -> set[int]:
    """Bytes that differ between two versions."""
    old, new = (np.frombuffer(VERSIONS[version][0].data, np.uint8) for version in (first, second))
    return set(np.flatnonzero(old != new).tolist())


def refused(monkeypatch: pytest.MonkeyPatch, name: str) -> asyncio.Event:
    """Set once somebody had to wait for the lock on the file of that name."""
    event, try_to = asyncio.Event(), FileLock.try_to

    def spy(lock: FileLock, share: bool) -> bool:
        taken = try_to(lock, share)
        if not taken and lock.path.name == name:
            event.set()
        return taken

    monkeypatch.setattr(FileLock, "try_to", spy)
    return event


def flip(path: Path, byte: int) -> None:
    """Damage a byte of a file, counted from its end."""
    data = bytearray(path.read_bytes())
    data[-byte] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
